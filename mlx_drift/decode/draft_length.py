"""How many drafts pay, learned from the rounds themselves.

A round of k drafts commits 1 + a₁ + a₁a₂ + … + a₁⋯a_k tokens on average, where a_i is how often
draft i is accepted if all before it were. What it costs is measured, not modelled: the limits of
fused attention, the tiles of a matrix kernel and the drafter's own steps are all in it. The k of
most tokens a second wins; 0 stands for plain decoding.

Notable:
- The past fades with every token. In a stretch of plain decoding nothing is learned about the
  drafter, so what is believed of it drifts back to a first guess, until drafting seems worth
  another try. No timer is needed for that, and where a round is too dear there is no further try.
- A length that was never tried is taken for cheaper than the line through the costs known, so that
  it is tried if it might be best: lengths are climbed one by one while that pays.
- What is copied has an acceptance of its own, by how many tokens agree, and costs of its own: no
  chain is run for it. Of the sources that a round may draft from the one that is expected to give
  most tokens a second is picked.
- A plain step that is begun ahead of its token loses the copy which that token may begin. So where
  copies often begin, and waiting for the token costs less than that, it waits.
- A length that is near best is timed again now and then, the less often the more it takes.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mlx_drift.decode.acceptance import COPY_FADING, FADING, Acceptance, CopyAcceptance
from mlx_drift.decode.costs import COLD, Costs, estimate
from mlx_drift.decode.tree_shape import Levels, tokens_of_trees
from mlx_drift.decode.tree_shape import Ranks as DraftRanks
from mlx_drift.drafters.protocol import NETWORK, TREE, Source
from mlx_drift.ranks.world import ALONE, Ranks

PLAIN = 0
"""The draft length that stands for plain decoding, a token at a time."""

MOST_DRAFTS = 16
"""Lengths beyond it are not tried: on no machine known do they pay for a chain of drafts."""

LOOK_AROUND, NEAR_BEST = 64, 0.9  # rounds after which a neighbour that is near best is timed again
HORIZON = 64  # tokens in which rows that the drafter missed must have paid for themselves

TREES = 2, 4, 7, 11, MOST_DRAFTS
"""Drafts of a tree: few, so that each is soon known; with the last token often a kernel's rows."""

COPIED = 1, 2, 4, 8, MOST_DRAFTS
"""Lengths of a copy: few, so that each is soon known."""

SURE = 5
"""Tokens that must agree for a copy to be preferred, where the number of drafts is fixed."""

FORCED_GUESS = 0.95
"""An untested forced token's acceptance: a model may write the same text in other tokens."""


@dataclass(frozen=True)
class Candidate:
    """A draft length, and what is expected of it.

    Attributes:
        num_draft_tokens: Drafts a round; 0 for plain decoding.
        seconds: Of a round.
        measured: Whether that was measured, or follows from other lengths.
        tokens: Committed by a round.
        tokens_per_second: The one over the other.
    """

    num_draft_tokens: int
    seconds: float
    measured: bool
    tokens: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


BELIEVED = "acceptance", "_copies", "_of_forced", "_of_trees", "_ranks", "_begun", "_saves"
"""What an answer takes over from another, and then learns on its own."""


class DraftLength:
    """Says before every round how many tokens to draft, and learns from it after.

    Args:
        fixed: Always so many drafts; it learns all the same, and tells what it would have chosen.
        costs: Seconds of a round by draft length, as measured before (`mlx-drift tune`); or what
            several answers measure together.
        acceptance: What is believed of the drafter to begin with.
        tree: Those of a network branch, where it can; without `fixed`, where that pays.
        ranks: Over which the target is cut: all learn what rank 0 measures, a round later.
    """

    def __init__(
        self,
        fixed: int | None = None,
        costs: Mapping[int, float] | Costs | None = None,
        acceptance: Acceptance | None = None,
        *,
        tree: bool = False,
        ranks: Ranks = ALONE,
    ):
        self.fixed, self.tree, self.ranks = fixed, tree, ranks
        self.costs = costs if isinstance(costs, Costs) else Costs(costs, COLD)
        self.copy_costs = Costs()
        self.acceptance = acceptance or Acceptance()
        self.tree_costs = Costs()
        self._of_trees = Acceptance()  # by depth
        self._ranks = DraftRanks()
        self._of_forced = Acceptance(FORCED_GUESS)
        self.tuned = bool(costs)
        self.rounds = 0
        self._copies = CopyAcceptance()
        self._sources: Sequence[Source] = (NETWORK,)
        self._source = NETWORK
        self._timed_at: dict[tuple[str, int], int] = {}
        self._waiting = Costs()  # of plain tokens whose step was begun when all before were known
        self._begun = Acceptance(0.0)  # how often a plain token is followed by a copy
        self._saves = 0.0  # a token of such a copy, of plain decoding's seconds
        self._is_followed = True
        self._catch_up_seconds = 0.0  # a row
        self._is_plain = False

    def for_another(self, fixed: int | None, *, tree: bool = False) -> "DraftLength":
        """Returns one for another answer: it knows all that this one does.

        Costs are measured together; what is believed of acceptance is its own.

        Args:
            fixed: Always so many drafts.
            tree: They branch, where there is a choice.
        """
        other = DraftLength(fixed, self.costs, tree=tree, ranks=self.ranks)
        for measured in ("copy_costs", "tree_costs", "_waiting"):
            setattr(other, measured, getattr(self, measured))
        for believed in BELIEVED:
            setattr(other, believed, copy.deepcopy(getattr(self, believed)))
        return other

    def pick(self, sources: Sequence[Source]) -> Source:
        """Returns what to draft from next.

        Args:
            sources: What there is: what is forced, then a copy, then what a network drafts.
        """
        if not self.tree:
            sources = [source for source in sources if source != TREE]
        elif self.fixed is not None and TREE in sources:
            sources = [source for source in sources if source != NETWORK]
        self._sources, self._source = sources, sources[-1]
        if len(sources) > 1 and self.fixed is not None:
            self._source = next(filter(self._is_preferred, sources), sources[-1])
        elif len(sources) > 1 and {PLAIN, 1} <= self.costs.known().keys():
            self._source = max(sources, key=lambda one: self._best(one).tokens_per_second)
        if not self._is_followed:
            self._note_what_follows()
        return self._source

    def choose(self, pending: int = 0) -> int:
        """Returns how many tokens to draft next, from the source that was picked last.

        Args:
            pending: Rows that the drafter missed, which it would have to catch up with first.
        """
        source = self._source
        longest = min(source.match, MOST_DRAFTS)
        if self.fixed is not None and source.kind == "forced":
            return longest
        if self.fixed is not None:  # a copy beside a network may be as long as its match
            return max(self.fixed, longest * (not self._sources[-1].is_free))
        if self.costs.is_cold:
            return PLAIN if source.is_empty else 1
        known = self._known(source)
        for k in (PLAIN, 1):
            if k not in known:
                return PLAIN if source.is_empty else k
        candidates = self.candidates(source)
        best = _fastest(candidates)
        if best.num_draft_tokens == PLAIN:
            return PLAIN
        if self._is_worth_a_look(candidates[PLAIN], best, source):
            return PLAIN
        if self._is_plain:
            a_token_saves = known[PLAIN] - 1 / best.tokens_per_second
            pays = a_token_saves * HORIZON >= pending * self._catch_up_seconds
            return best.num_draft_tokens if pays else PLAIN
        place = candidates.index(best)
        for candidate in candidates[max(1, place - 1) : place + 2]:
            if candidate != best and self._is_worth_a_look(candidate, best, source):
                return candidate.num_draft_tokens
        return best.num_draft_tokens

    def is_ahead(self) -> bool:
        """Tells whether a plain step is to be begun before the token that it follows is known.

        It is then under way while that token is read. But where the token turns out to be the
        beginning of a copy the step commits one token of what the copy had, all together.
        """
        ahead, waiting = self.costs.known().get(PLAIN), self._waiting.known().get(PLAIN)
        if ahead is None or waiting is None or self._is_overdue(NETWORK, PLAIN):
            return True
        return self._begun.rates(1)[0] * self._saves <= max(0.0, waiting - ahead)

    def record_round(
        self,
        asked: int,
        drafted: int,
        tested: int,
        accepted: int,
        seconds: float,
        source: Source = NETWORK,
        levels: Levels = (),
    ) -> None:
        """Learns from a round.

        Args:
            asked: How many drafts were asked for.
            drafted: How many there were. Where a drafter has nothing to say (prompt lookup), that
                counts as a draft refused: rounds of that length yield no more.
            tested: How many of them were tested.
            accepted: How many were accepted.
            seconds: What the round took.
            source: What was drafted from.
            levels: Which drafts of a tree were accepted.
        """
        self._is_plain = False
        self.rounds += 1
        # However long a copy was, it says nothing of the network.
        self._fade(1 if source.is_free else accepted + 1)
        fell_short = drafted < asked and accepted == drafted and not source.is_tree
        if source.kind == "copy":
            self._copies.record(source.match, tested + fell_short, accepted)
        else:
            self._acceptance_of(source).record(tested + fell_short, accepted)
        if source.is_tree:  # along its first drafts it is a chain
            self._ranks.record(levels)
            first = [right == 1 for _, right in levels]
            right = first.index(False) if False in first else len(first)
            self.acceptance.record(min(right + 1, len(first)), right)
        if asked:  # not so at the end of the text
            self._time(source, asked, seconds)

    def record_plain(self, seconds: float | None, *, waited: bool = False) -> None:
        """Learns from a token of plain decoding.

        Args:
            seconds: What it took; None if it was not timed.
            waited: Its step was begun only when the token before it was known.
        """
        self._is_plain, self._is_followed = True, False
        self.rounds += 1
        self._fade(1)
        if seconds is not None and waited:
            self.ranks.share(seconds, partial(self._waiting.add, PLAIN))
        elif seconds is not None:
            self._time(NETWORK, PLAIN, seconds)

    def record_catch_up(self, rows: int, seconds: float) -> None:
        """Learns what the rows cost that the drafter had missed."""
        self.ranks.share(seconds / rows, partial(setattr, self, "_catch_up_seconds"))

    def candidates(self, source: Source = NETWORK) -> list[Candidate]:
        """Returns plain decoding and the lengths that may be tried, the shortest first.

        Of a network's drafts every length up to one more than was tried; of its trees `TREES` up to
        one of them more; of a copy `COPIED`, and of what is forced those of them that it has, and
        all.
        """
        known = self._known(source)
        tokens = self._tokens(source)
        longest = max(known, default=0)
        lengths: Sequence[int] = range(min(longest + 1, MOST_DRAFTS) + 1)
        if source.is_tree:
            lengths = PLAIN, *(k for i, k in enumerate(TREES) if not i or TREES[i - 1] <= longest)
        if source.is_free:
            lengths = (PLAIN,) if source.is_empty else (PLAIN, *COPIED)
        if source.kind == "forced":
            most = min(source.match, MOST_DRAFTS)
            lengths = [*(k for k in lengths if k < most), most]
        own = self._costs_of(source).known() if source.is_tree else known
        costs = [(k, estimate(k, known)) for k in lengths]
        return [
            Candidate(k, seconds, k in own or k == PLAIN, tokens[k])
            for k, seconds in costs
            if seconds is not None
        ]

    def best(self) -> Candidate | None:
        """Returns the candidate of most tokens a second, if there is one."""
        found = [self._best(one) for one in self._of_network() if self.candidates(one)]
        return max(found, key=lambda one: one.tokens_per_second, default=None)

    @property
    def prefers_trees(self) -> bool:
        """Whether the best of all is a tree."""
        trees = self._best(TREE) if self.tree and self.candidates(TREE) else None
        return trees is not None and trees.num_draft_tokens > PLAIN and trees == self.best()

    def _of_network(self) -> list[Source]:
        """Returns what a network drafts, if it is there; else what there is."""
        return [one for one in self._sources if not one.is_free] or [self._sources[-1]]

    def to_dict(self) -> dict[str, Any]:
        """Returns the decision and its numbers, for `--json` and `--explain`."""
        best = self.best()
        source = self._sources[-1]
        acceptance = self._acceptance_of(source)
        return {
            "fixed": self.fixed,
            "auto": best.num_draft_tokens if best else None,
            "tuned": self.tuned,
            "catch_up_seconds": self._catch_up_seconds,
            "conditional_acceptance": acceptance.rates(max(1, len(acceptance))),
            "copy_acceptance": self._copies.to_dict(),
            "candidates": [
                asdict(c) | {"tokens_per_second": c.tokens_per_second}
                for c in self.candidates(source)
            ],
        }

    def _is_preferred(self, source: Source) -> bool:
        """Tells whether to draft from what is free, where the number of drafts is fixed."""
        if source.kind == "forced":  # a network is held to the grammar, too, and goes on after it
            return self._sources[-1].is_empty or source.match >= (self.fixed or 0)
        return source.kind == "copy" and source.match >= SURE

    def _best(self, source: Source) -> Candidate:
        return _fastest(self.candidates(source))

    def _known(self, source: Source) -> dict[int, float]:
        """Returns what rounds from a source take; of others a chain's, where theirs is unknown."""
        return dict(sorted((self.costs.known() | self._costs_of(source).known()).items()))

    def _costs_of(self, source: Source) -> Costs:
        return {"network": self.costs, "tree": self.tree_costs}.get(source.kind, self.copy_costs)

    def _tokens(self, source: Source) -> list[float]:
        """Returns how many tokens rounds of 0 … `MOST_DRAFTS` drafts commit on average."""
        if source.is_tree:
            rates = self.acceptance.rates(MOST_DRAFTS)
            return tokens_of_trees(rates, self._ranks.shares(rates[0]))
        if source.kind == "copy":
            return self._copies.tokens(source.match, MOST_DRAFTS)
        return self._acceptance_of(source).tokens(MOST_DRAFTS)

    def _acceptance_of(self, source: Source) -> Acceptance:
        of_kind = {"tree": self._of_trees, "forced": self._of_forced}
        return of_kind.get(source.kind, self.acceptance)

    def _fade(self, tokens: int) -> None:
        self.acceptance.fade(tokens)
        self._of_trees.fade(tokens)
        self._begun.fade(tokens)
        self._ranks.fade(FADING**tokens)
        self._of_forced.fade(tokens, COPY_FADING)
        self._copies.fade(tokens)

    def _note_what_follows(self) -> None:
        """Learns whether the plain token that was committed last is followed by a copy."""
        self._is_followed = True
        follows = self._source.is_free and self.choose() > PLAIN
        self._begun.record(1, int(follows))
        plain = self.costs.known().get(PLAIN)
        if follows and plain is not None:
            self._saves = max(0.0, plain - 1 / self._best(self._source).tokens_per_second)

    def _is_worth_a_look(self, one: Candidate, best: Candidate, source: Source) -> bool:
        """Tells whether one that is near best has not been timed for long, so that it might be."""
        is_near = one.tokens_per_second > NEAR_BEST * best.tokens_per_second
        takes = one.seconds / best.seconds
        return is_near and self._is_overdue(source, one.num_draft_tokens, takes)

    def _is_overdue(self, source: Source, k: int, takes: float = 1.0) -> bool:
        since = self.rounds - self._timed_at.get(_place(source, k), 0)
        return since > LOOK_AROUND * max(1.0, takes)

    def _time(self, source: Source, k: int, seconds: float) -> None:
        costs = self.costs if k == PLAIN else self._costs_of(source)
        self.ranks.share(seconds, partial(costs.add, k))
        self._timed_at[_place(source, k)] = self.rounds


def _fastest(candidates: Sequence[Candidate]) -> Candidate:
    return max(candidates, key=lambda one: one.tokens_per_second)


def _place(source: Source, k: int) -> tuple[str, int]:
    """Tells which costs rounds of a source belong to; plain decoding is nobody's."""
    if k == PLAIN:
        return "", k
    return "free" if source.is_free else source.kind, k
