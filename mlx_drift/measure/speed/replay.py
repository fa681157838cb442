"""Rounds over a recorded text: which drafts it would have accepted, and what that would have taken.

It is the real loop that runs (`speculate`), with a target that says what was recorded: one pass of
the model over the text brings the taps of every position, which no draft changes. So acceptance is
exact. What a round takes is measured once for each of its lengths; its clock is set by that, and
`auto` starts from it, as it does after `mlx-drift tune`.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.decode.costs import Costs, estimate
from mlx_drift.decode.draft_length import COPIED, PLAIN, TREES, DraftLength
from mlx_drift.decode.prompt_cache import make_prompt_cache
from mlx_drift.decode.speculate import speculate
from mlx_drift.decode.statistics import Statistics
from mlx_drift.decode.trees import Rows, prepare_trees
from mlx_drift.drafters.copying import CopyingDrafter, CopyingState
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.drafters.protocol import (
    NETWORK,
    Choose,
    Copies,
    Draft,
    Drafter,
    Propose,
    Source,
    first_chain,
    sources_of,
)
from mlx_drift.measure.bootstrap import Interval, ratio_of_ratios
from mlx_drift.measure.speed.arms import Length, name_of_tree
from mlx_drift.measure.speed.recording import Recorded, RecordedCache, Recording, Simulated
from mlx_drift.measure.speed.rounds import Plan, round_costs
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.model import Target

CHUNK, CATCH_UP, TURNS = 512, 64, 5
LONGEST = 8
"""Of the chains whose rounds are timed."""


@dataclass(frozen=True)
class ReplayCosts:
    """Seconds, as measured.

    Attributes:
        drafted: Of a round by the length of the chain; under 0 of a plain step.
        copied: Of a round by the length of the copy: no chain is run.
        missed_row: Of a row that the drafter catches up with.
        branched: Of a round by the drafts of its tree; none where trees are not replayed.
    """

    drafted: dict[int, float]
    copied: dict[int, float]
    missed_row: float
    branched: dict[int, float] = field(default_factory=dict)

    def of(self, k: int, source: Source = NETWORK) -> float:
        """Returns what a round of k drafts takes."""
        known = self.copied if source.is_free and k else self.drafted
        known = self.branched if source.is_tree else known
        seconds = estimate(k, dict(sorted(({PLAIN: self.drafted[PLAIN]} | known).items())))
        assert seconds is not None
        return seconds


@dataclass
class ReplayArm:
    """One way of drafting, over all that was recorded.

    Attributes:
        name: `K=2`, `tree of 3`, `lookup K=2`, `K=2 + lookup`, `auto`.
        tree: Rows of the trees; None where chains are drafted.
        tokens: Of each answer.
        seconds: That it would have taken.
        rounds: Of it.
        statistics: Of all rounds.
    """

    name: str
    tree: Rows | None = None
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def tokens_per_second(self) -> float:
        """Over all answers."""
        return sum(self.tokens) / sum(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`."""
        told = self.statistics.to_dict()
        counted = "rounds", "tokens_per_round", "acceptance_length", "plain_tokens", "sources"
        names = *counted, "conditional_acceptance", "acceptance_by_rank"
        return {
            "name": self.name,
            "tree": self.tree,
            "tokens": sum(self.tokens),
            "seconds": sum(self.seconds),
            **{name: told[name] for name in names},
        }


@dataclass(frozen=True)
class Replay:
    """The arms, plain decoding first, and what a round of theirs was taken to cost."""

    arms: list[ReplayArm]
    costs: ReplayCosts

    def over_chain(self, arm: ReplayArm) -> Interval | None:
        """Returns a tree's tokens a round over those of the chain of as many rows.

        None if it is no tree of so many, or there is no such chain.
        """
        if not isinstance(arm.tree, int):
            return None
        chain = next((one for one in self.arms if one.name == f"K={arm.tree - 1}"), None)
        if chain is None:
            return None
        return ratio_of_ratios((arm.tokens, arm.rounds), (chain.tokens, chain.rounds))

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`."""
        arms = [arm.to_dict() | {"over_chain": self.over_chain(arm)} for arm in self.arms]
        return {"arms": arms, "costs": asdict(self.costs)}


Drafts = dict[tuple[int, Source, int], Draft]
"""What a network drafted of an answer: by how much of it there was, chain or tree, and how many."""


class Metered:
    """A drafter whose rounds spend what they were measured to take.

    What a network drafts after a text is the same, however it came to be: where that was drafted
    before nothing is computed, nor is a row ingested until it is needed.

    Args:
        drafter: The drafter.
        costs: What rounds take.
        clock: What they spend it on.
        drafts: What was drafted of the answer before, to which is added.
    """

    def __init__(self, drafter: Drafter, costs: ReplayCosts, clock: Simulated, drafts: Drafts):
        self.taps, self.model, self.network = drafter.taps, drafter.model, drafter.network
        self.make_cache, self.start = drafter.make_cache, drafter.start
        self._drafter, self._costs, self._clock = drafter, costs, clock
        self._drafts, self._rows = drafts, 0
        self._waiting: list[tuple[mx.array, mx.array]] = []
        self._in_round = False

    def sources(self, cache: Any, missed: Sequence[int] = ()) -> dict[Source, Propose]:
        """Returns the drafter's."""
        offered = sources_of(self._drafter, cache, missed).items()
        return {source: partial(self._propose, source, propose) for source, propose in offered}

    def propose(self, k: int, cache: Any, chooser: Choose | None = None) -> Draft:
        """Drafts from the first source."""
        return first_chain(self.sources(cache))(k, cache, chooser)

    def _propose(
        self, source: Source, propose: Propose, k: int, cache: Any, chooser: Choose | None
    ) -> Draft:
        draft = self._drafts.get((self._rows, source, k))
        if draft is None:
            self._catch_up(cache)
            draft = propose(k, cache, chooser)
            if not source.is_free:
                self._drafts[self._rows, source, k] = draft
        self._clock.seconds += self._costs.of(draft.tokens.size, source)
        self._in_round = True
        return draft

    def spend(self, rows: int) -> None:
        """Spends what a plain step takes, unless the rows are a round's."""
        if not self._in_round:
            self._clock.seconds += rows * self._costs.drafted[PLAIN]

    def ingest(self, tokens: mx.array, taps: mx.array, cache: Any) -> None:
        """Ingests, and spends what rows take that were missed."""
        if not self._in_round:
            self._clock.seconds += tokens.size * self._costs.missed_row
        self._in_round = False
        self._rows += tokens.size
        self._waiting.append((tokens, taps))
        if isinstance(self._drafter, Copies):  # it looks at all there is before it is asked
            self._catch_up(cache)

    def _catch_up(self, cache: Any) -> None:
        for tokens, taps in self._waiting:
            self._drafter.ingest(tokens, taps, cache)
        self._waiting = []


class Repeating:
    """A drafter that drafts the last token over and over, at no cost: what a copy's rounds take."""

    def __init__(self, drafter: Drafter):
        self.taps, self.model, self.network = drafter.taps, drafter.model, drafter.network
        self.make_cache, self.start, self.ingest = drafter.make_cache, drafter.start, drafter.ingest

    def propose(self, k: int, cache: Any, chooser: Choose | None = None) -> Draft:
        """Drafts k tokens."""
        return Draft(mx.zeros((k,), mx.int32))


def measure_costs(
    model: nn.Module,
    drafter: Drafter,
    prompt: list[int],
    *,
    trees: bool = False,
    turns: int = TURNS,
    progress: Callable[[], None] = lambda: None,
) -> ReplayCosts:
    """Measures what rounds take: chains up to `LONGEST`, copies and trees as they are tried.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        drafter: A drafter loaded for it.
        prompt: Token ids of the context, at least two.
        trees: Measure trees, too.
        turns: How often each length has its turn.
        progress: Told after each turn of all.
    """
    chains = [Plan(k, k // 2) for k in range(1, LONGEST + 1)]
    branching = [Plan(k, (k + 1) // 2, tree=True) for k in TREES] if trees else []
    if trees:
        prepare_trees(drafter, Target(model, drafter.taps))
    drafted, plain = round_costs(
        model, drafter, prompt, [*chains, *branching], turns=turns, progress=progress
    )
    copied, its_plain = round_costs(
        model,
        Repeating(drafter),
        prompt,
        [Plan(k, k // 2) for k in COPIED],
        turns=turns,
        progress=progress,
    )
    chain_costs, tree_costs = drafted[: len(chains)], drafted[len(chains) :]
    return ReplayCosts(
        {PLAIN: plain} | {cost.plan.num_draft_tokens: cost.seconds for cost in chain_costs},
        {cost.plan.num_draft_tokens: cost.seconds * plain / its_plain for cost in copied},
        _time_missed_rows(model, drafter),
        {cost.plan.num_draft_tokens: cost.seconds for cost in tree_costs},
    )


def _time_missed_rows(model: nn.Module, drafter: Drafter) -> float:
    """Times rows that a drafter catches up with, many at a time: seconds a row."""
    target, tokens, taken = Target(model, drafter.taps), mx.zeros(CATCH_UP, mx.int32), []
    _, taps = target(tokens, target.make_cache())
    mx.eval(taps)
    for _ in range(4):
        cache = drafter.make_cache()
        drafter.start(tokens[:1], cache)
        start = time.perf_counter()
        drafter.ingest(tokens, taps, cache)
        mx.eval(cache.state)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]) / CATCH_UP


def replay(
    model: nn.Module,
    drafter: Drafter,
    recorded: Sequence[Recorded],
    costs: ReplayCosts,
    *,
    lengths: Sequence[Length],
    trees: Sequence[Rows] = (),
    drafts: defaultdict[int, Drafts] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Replay:
    """Replays what was recorded with a drafter: with lookup alone and with both, or with trees.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        drafter: A drafter loaded for it.
        recorded: Prompts and answers.
        costs: What rounds take.
        lengths: The draft lengths, each alone and beside lookup; `auto` has both.
        trees: Rows of trees, in place of lookup; `auto` chooses between them and chains.
        drafts: What was drafted of each answer, for replays of the same over other costs.
        progress: Told after each answer.

    Raises:
        DriftError: If the drafter drafts no trees, or the target cannot verify them.
    """
    both = CopyingDrafter(drafter)
    lookup = PromptLookupDrafter(model)
    if trees:
        prepare_trees(drafter, Target(model, drafter.taps))
    ways: dict[str, tuple[Length, Drafter, Callable[[Any], Any]]] = {}
    for k in lengths:
        ways["auto, head alone" if k == "auto" else f"K={k}"] = k, drafter, _own
        if not trees:
            ways["auto" if k == "auto" else f"K={k} + lookup"] = k, both, _all
    numbers = {k for k in lengths if k != "auto"} | set(COPIED[1:])
    for k in () if trees else sorted(numbers):
        ways[f"lookup K={k}"] = k, lookup, _lookup
    for n in trees:
        ways[name_of_tree(n)] = "auto" if n == "auto" else n - 1, drafter, _own
    rows_of = {name_of_tree(rows): rows for rows in trees}
    arms = {name: ReplayArm(name, rows_of.get(name)) for name in ways}
    plain = ReplayArm("plain")
    learned: dict[str, DraftLength] = {}
    conversation = None
    for number, one in enumerate(recorded):
        if one.conversation != conversation:
            conversation, cache = one.conversation, make_prompt_cache(model, both)
            learned = {
                name: _beginning(k, costs, tree=name in rows_of) for name, (k, _, _) in ways.items()
            }
        cache.read(one.prompt, step_size=CHUNK, progress=lambda done, total: None)
        tokens = mx.array([*one.prompt, *one.answer], dtype=mx.int32)
        first = len(one.prompt) - 1
        taps = _taps_of(cache.target, tokens[first:-1], cache.target_cache.fork())
        drafted = {} if drafts is None else drafts[number]
        plain.tokens.append(len(one.answer))
        plain.seconds.append(len(one.answer) * costs.drafted[PLAIN])
        for name, (_, own, part) in ways.items():
            clock = Simulated()
            metered = Metered(own, costs, clock, drafted)
            rounds = speculate(
                Recording(cache.target, tokens, taps, first, metered.spend),
                metered,
                tokens[first : first + 1],
                RecordedCache(first),
                part(cache.drafter_cache.fork()),
                num_draft_tokens=learned[name],
                max_tokens=len(one.answer),
                stop_tokens=frozenset(),
                clock=clock,
            )
            said: list[int] = []
            found, before = arms[name], arms[name].statistics.rounds
            for round in rounds:
                found.statistics.record_round(round)
                said += round.tokens
                spent = clock.seconds
            assert said == one.answer
            found.tokens.append(len(said))
            found.seconds.append(spent)
            found.rounds.append(found.statistics.rounds - before)
        progress(number + 1, len(recorded))
    return Replay([plain, *arms.values()], costs)


def _beginning(k: Length, costs: ReplayCosts, *, tree: bool) -> DraftLength:
    """Returns what chooses lengths in a new conversation: `auto` knows what rounds cost."""
    draft_length = DraftLength(None if k == "auto" else k, costs.drafted, tree=tree)
    draft_length.copy_costs = Costs(costs.copied)
    draft_length.tree_costs = Costs(costs.branched)
    return draft_length


def _own(state: CopyingState) -> Any:
    return state.own


def _lookup(state: CopyingState) -> Any:
    return state.lookup


def _all(state: CopyingState) -> Any:
    return state


def _taps_of(target: Target, tokens: mx.array, cache: TargetCache) -> mx.array:
    """Runs the model over an answer, and returns its taps `[M, A, T]`."""
    found = []
    for start in range(0, tokens.size, CHUNK):
        _, taps = target(tokens[start : start + CHUNK], cache)
        mx.eval(taps, cache.state)
        found.append(taps)
    return mx.concatenate(found)
