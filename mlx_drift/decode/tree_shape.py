"""What a tree of drafts is expected to give: learned by depth and by rank.

How often the first of the drafts that follow the same is right is what a chain's acceptance says,
depth by depth. What it misses, those beside it catch: that share is learned here, by rank.
"""

import heapq
from collections.abc import Sequence

from mlx_drift.decode.acceptance import Counts
from mlx_drift.drafters.tree import DEPTH

CAUGHT = 0.48, 0.20, 0.12
"""The shares that are believed of the second, third and fourth at first, in parts of how often the
first is right: a head that is right more often knows more of what it misses, too. The five embedded
heads, the first of whose drafts are right at 0.49 to 0.92, have 0.41–0.63, 0.17–0.23 and 0.11–0.14.
"""

CAUGHT_WEIGHT = 16.0  # and how many misses that counts for

Levels = Sequence[tuple[int, int]]
"""Of every level of a tree that was tested, how many drafts followed the path there, and which of
them was accepted, counted from 1; 0 for none."""


class Ranks:
    """Which share of the first draft's misses those beside it catch."""

    def __init__(self) -> None:
        self._counts = Counts()

    def record(self, levels: Levels) -> None:
        """Notes one round."""
        for drafts, right in levels:
            for beside in range(min(drafts - 1, len(CAUGHT))) if right != 1 else ():
                self._counts.record(beside, right == beside + 2)

    def fade(self, kept: float) -> None:
        """Lets the past count for less: this part of it is kept."""
        self._counts.fade(kept)

    def shares(self, rate: float) -> list[float]:
        """Returns the shares of the second draft, the third and so on.

        Args:
            rate: How often the first is right.
        """
        guesses = [rate * part for part in CAUGHT]
        return [self._counts.rate(i, guess, CAUGHT_WEIGHT) for i, guess in enumerate(guesses)]


def tokens_of_trees(
    rates: Sequence[float], shares: Sequence[float], levels: int = DEPTH
) -> list[float]:
    """Returns how many tokens rounds of trees commit on average, of 0 … k drafts.

    Each is of the likeliest nodes, one after another: a node is not likelier than what it follows.

    Args:
        rates: How often the first of a level's drafts is accepted if the path before it is: k.
        shares: Which share of its misses those beside it catch.
        levels: Levels at most.
    """
    by_rank = [[rate, *((1 - rate) * share for share in shares)] for rate in rates]
    tokens = [1.0]
    following = [(-by_rank[0][0], 0, 0, 1.0)] if by_rank else []
    while len(tokens) <= len(rates):
        if not following:  # no further draft has a place
            tokens.append(tokens[-1])
            continue
        chance, depth, rank, before = heapq.heappop(following)
        tokens.append(tokens[-1] - chance)
        if rank + 1 < len(by_rank[depth]):
            beside = before * by_rank[depth][rank + 1]
            heapq.heappush(following, (-beside, depth, rank + 1, before))
        if depth + 1 < min(levels, len(by_rank)):
            heapq.heappush(following, (chance * by_rank[depth + 1][0], depth + 1, 0, -chance))
    return tokens
