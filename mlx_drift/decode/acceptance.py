"""How often drafts are accepted, learned from the rounds: recent ones count most.

Notable:
- Of a network's drafts each position has an acceptance of its own, given that all before it were
  accepted.
- A copy's acceptance depends on how many tokens agree before it, and a copied token that is
  accepted is one more. So copies of all lengths are one curve, and every round tells much of it.
"""

import itertools
import operator
from bisect import bisect_right
from collections.abc import Iterable

GUESS, GUESS_WEIGHT = 0.7, 3.0  # an untested drafter's acceptance, and the rounds it counts for
FADING, COPY_FADING = 0.99, 0.997  # what is left of the past after a token; copies are rarer

COPY_GUESS = {0: 0.0, 3: 0.6, 4: 0.75, 5: 0.8, 6: 0.85, 12: 0.9, 16: 0.92, 24: 0.95, 32: 0.97}
"""An untested copied token's acceptance, by how many tokens agree before it."""


class Counts:
    """Tries and successes by place, recent ones counting most.

    What has faded is put down when a place is next looked at: in most rounds few are.
    """

    def __init__(self) -> None:
        self._tries: list[float] = []
        self._successes: list[float] = []
        self._kept = 1.0  # of both, at the next look

    def __len__(self) -> int:
        """Returns how many places there ever was a try in, or before."""
        return len(self._tries)

    def fade(self, kept: float) -> None:
        """Lets the past count for less: this part of it is kept."""
        self._kept *= kept

    def record(self, place: int, succeeded: bool) -> None:
        """Notes one try."""
        self._settle()
        missing = [0.0] * (place + 1 - len(self))
        self._tries += missing
        self._successes += missing
        self._tries[place] += 1
        self._successes[place] += succeeded

    def rate(self, place: int, guess: float, weight: float) -> float:
        """Returns how often a try succeeds; a guess counts for as many tries as its weight."""
        if place >= len(self):
            return guess
        self._settle()
        return (self._successes[place] + weight * guess) / (self._tries[place] + weight)

    def was_tried(self, place: int) -> bool:
        """Tells whether there was a try that still counts."""
        return place < len(self) and self._tries[place] > 0

    def _settle(self) -> None:
        if self._kept != 1.0:
            self._tries = [x * self._kept for x in self._tries]
            self._successes = [x * self._kept for x in self._successes]
            self._kept = 1.0


class Acceptance:
    """How often each draft is accepted if all before it were, recent rounds counting most.

    Args:
        guess: What is believed of the first one before it was tested.
    """

    def __init__(self, guess: float = GUESS) -> None:
        self._guess = guess
        self._counts = Counts()

    def __len__(self) -> int:
        """Returns how many drafts a round ever had tested."""
        return len(self._counts)

    def record(self, tested: int, accepted: int) -> None:
        """Notes one round."""
        for i in range(tested):
            self._counts.record(i, i < accepted)

    def fade(self, tokens: int, fading: float = FADING) -> None:
        """Lets the past count for less: `tokens` tokens went by."""
        self._counts.fade(fading**tokens)

    def rates(self, k: int) -> list[float]:
        """Returns the conditional acceptance of drafts 1 … k.

        One that was hardly tested is believed to fare as the one before it.
        """
        rates, belief = [], self._guess
        for i in range(k):
            belief = self._counts.rate(i, belief, GUESS_WEIGHT)
            rates.append(belief)
        return rates

    def tokens(self, k: int) -> list[float]:
        """Returns how many tokens rounds of 0 … k drafts commit on average."""
        return committed(self.rates(k))


class CopyAcceptance:
    """How often a copied token is accepted, by how many tokens agree before it."""

    def __init__(self) -> None:
        self._from = [*COPY_GUESS]
        self._counts = Counts()

    def record(self, match: int, tested: int, accepted: int) -> None:
        """Notes a round that copied after a match of so many tokens."""
        for i in range(tested):
            self._counts.record(self._place(match + i), i < accepted)

    def fade(self, tokens: int) -> None:
        """Lets the past count for less: `tokens` tokens went by."""
        self._counts.fade(COPY_FADING**tokens)

    def rates(self, match: int, k: int) -> list[float]:
        """Returns the conditional acceptance of copied tokens 1 … k after a match."""
        by_place = self._rates()
        return [by_place[self._place(match + i)] for i in range(k)]

    def tokens(self, match: int, k: int) -> list[float]:
        """Returns how many tokens rounds that copy 0 … k tokens commit on average."""
        return committed(self.rates(match, k))

    def to_dict(self) -> dict[int, float]:
        """Returns the acceptance by the tokens that agree, where it was tested."""
        rates = enumerate(zip(self._from, self._rates(), strict=True))
        return {agree: rate for place, (agree, rate) in rates if self._counts.was_tried(place)}

    def _rates(self) -> list[float]:
        guesses = enumerate(COPY_GUESS.values())
        return [self._counts.rate(place, guess, GUESS_WEIGHT) for place, guess in guesses]

    def _place(self, agree: int) -> int:
        return bisect_right(self._from, agree) - 1


def committed(rates: Iterable[float]) -> list[float]:
    """Returns how many tokens rounds of 0 … k drafts commit on average.

    Args:
        rates: The conditional acceptance of drafts 1 … k.
    """
    kept = itertools.accumulate(rates, operator.mul, initial=1.0)
    return list(itertools.accumulate(kept))
