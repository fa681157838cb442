"""Rounds over a recorded text: which drafts it would have accepted, and what that would have taken.

It is the real loop that runs (`speculate`), with a target that says what was recorded: one pass of
the model over the text brings the taps of every position, which no draft changes. So acceptance is
exact. What a round takes is measured once for each of its lengths; its clock is set by that, and
`auto` starts from it, as it does after `mlx-drift tune`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.decode.clock import Clock
from mlx_drift.decode.draft_length import COPIED, PLAIN, Costs, DraftLength, estimate
from mlx_drift.decode.prompt_cache import make_prompt_cache
from mlx_drift.decode.speculate import speculate
from mlx_drift.decode.statistics import Statistics
from mlx_drift.drafters.copying import CopyingDrafter, CopyingState
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.drafters.protocol import (
    Choose,
    Draft,
    Drafter,
    Propose,
    Source,
    first_chain,
    sources_of,
)
from mlx_drift.measure.speed.arms import Length
from mlx_drift.measure.speed.rounds import CERTAIN, Plan, round_costs
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.model import Target
from mlx_drift.target.tree import Tree

CHUNK, CATCH_UP, TURNS = 512, 64, 5
LONGEST = 8
"""Of the chains whose rounds are timed."""


@dataclass(frozen=True)
class Recorded:
    """A prompt and what was answered, token ids; what a conversation learned goes on within it."""

    prompt: list[int]
    answer: list[int]
    conversation: int = 0


@dataclass(frozen=True)
class ReplayCosts:
    """Seconds, as measured.

    Attributes:
        drafted: Of a round by the length of the chain; under 0 of a plain step.
        copied: Of a round by the length of the copy: no chain is run.
        missed_row: Of a row that the drafter catches up with.
    """

    drafted: dict[int, float]
    copied: dict[int, float]
    missed_row: float

    def of(self, k: int, is_copy: bool) -> float:
        """Returns what a round of k drafts takes."""
        known = self.copied if is_copy and k else self.drafted
        seconds = estimate(k, dict(sorted(({PLAIN: self.drafted[PLAIN]} | known).items())))
        assert seconds is not None
        return seconds


@dataclass
class ReplayArm:
    """One way of drafting, over all that was recorded.

    Attributes:
        name: `K=2`, `lookup K=2`, `K=2 + lookup`, `auto`.
        tokens: Answered.
        seconds: That it would have taken.
        statistics: Of its rounds.
    """

    name: str
    tokens: int = 0
    seconds: float = 0.0
    statistics: Statistics = field(default_factory=Statistics)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`."""
        told = self.statistics.to_dict()
        names = "rounds", "tokens_per_round", "acceptance_length", "conditional_acceptance"
        return {
            "name": self.name,
            "tokens": self.tokens,
            "seconds": self.seconds,
            **{name: told[name] for name in (*names, "plain_tokens", "sources")},
        }


@dataclass(frozen=True)
class Replay:
    """The arms, plain decoding first, and what a round of theirs was taken to cost."""

    arms: list[ReplayArm]
    costs: ReplayCosts

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`."""
        return {"arms": [arm.to_dict() for arm in self.arms], "costs": asdict(self.costs)}


class Simulated(Clock):
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """Returns the seconds spent."""
        return self.seconds

    def stop(self) -> None:
        """Does nothing: it does not run."""

    def go(self) -> None:
        """Does nothing."""


class RecordedCache(TargetCache):
    """Where the recording is."""

    def __init__(self, position: int):
        super().__init__([])
        self.position = position

    def rollback(self, back: int) -> None:
        """Goes back."""
        self.position -= back


class Recording(Target):
    """A target that says what was recorded.

    Args:
        target: What it was recorded with.
        tokens: All of it, `[N]`.
        taps: Of the rows from `first` on.
        first: The row of the last token of the prompt.
        spend: Told the rows of each pass.
    """

    def __init__(
        self,
        target: Target,
        tokens: mx.array,
        taps: mx.array,
        first: int,
        spend: Callable[[int], None],
    ):
        vars(self).update(vars(target))
        self._tokens, self._recorded, self._first, self._spend = tokens, taps, first, spend
        self._vocabulary = mx.arange(target.shape.vocab_size)

    def verify(
        self, tokens: mx.array, cache: TargetCache, tree: Tree | None = None
    ) -> tuple[mx.array, mx.array]:
        """Returns logits that make the recorded tokens certain, and the taps of their rows."""
        assert isinstance(cache, RecordedCache)
        assert tree is None
        self._spend(tokens.size)
        begin, end = cache.position, cache.position + tokens.size
        cache.position, cache.rows = end, tokens.size
        said = self._tokens[begin + 1 : end + 1]
        logits = CERTAIN * (self._vocabulary == said[:, None]).astype(mx.float32)
        return logits, self._recorded[begin - self._first : end - self._first]


class Metered:
    """A drafter whose rounds spend what they were measured to take."""

    def __init__(self, drafter: Drafter, costs: ReplayCosts, clock: Simulated):
        self.taps, self.model, self.network = drafter.taps, drafter.model, drafter.network
        self.make_cache, self.start = drafter.make_cache, drafter.start
        self._drafter, self._costs, self._clock = drafter, costs, clock
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
        draft = propose(k, cache, chooser)
        self._clock.seconds += self._costs.of(draft.tokens.size, source.is_free)
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
        self._drafter.ingest(tokens, taps, cache)


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
    turns: int = TURNS,
    progress: Callable[[], None] = lambda: None,
) -> ReplayCosts:
    """Measures what rounds take: chains up to `LONGEST`, copies of the lengths that are tried.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        drafter: A drafter loaded for it.
        prompt: Token ids of the context, at least two.
        turns: How often each length has its turn.
        progress: Told after each turn of all.
    """
    lengths = range(1, LONGEST + 1)
    drafted, plain = round_costs(
        model, drafter, prompt, [Plan(k, k // 2) for k in lengths], turns=turns, progress=progress
    )
    copied, its_plain = round_costs(
        model,
        Repeating(drafter),
        prompt,
        [Plan(k, k // 2) for k in COPIED],
        turns=turns,
        progress=progress,
    )
    return ReplayCosts(
        {PLAIN: plain} | {cost.plan.num_draft_tokens: cost.seconds for cost in drafted},
        {cost.plan.num_draft_tokens: cost.seconds * plain / its_plain for cost in copied},
        _time_missed_rows(model, drafter),
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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Replay:
    """Replays what was recorded with a drafter, with lookup alone, and with both.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        drafter: A drafter loaded for it.
        recorded: Prompts and answers.
        costs: What rounds take.
        lengths: The draft lengths, each alone and beside lookup; `auto` has both.
        progress: Told after each answer.
    """
    both = CopyingDrafter(drafter)
    lookup = PromptLookupDrafter(model)
    ways: dict[str, tuple[Length, Drafter, Callable[[Any], Any]]] = {}
    for k in lengths:
        if k == "auto":
            ways["auto, head alone"] = k, drafter, _own
            ways["auto"] = k, both, _all
        else:
            ways[f"K={k}"] = k, drafter, _own
            ways[f"K={k} + lookup"] = k, both, _all
    numbers = {k for k in lengths if k != "auto"} | set(COPIED[1:])
    ways |= {f"lookup K={k}": (k, lookup, _lookup) for k in sorted(numbers)}
    arms = {name: ReplayArm(name) for name in ways}
    plain = ReplayArm("plain")
    learned: dict[str, DraftLength] = {}
    conversation = None
    for number, one in enumerate(recorded):
        if one.conversation != conversation:
            conversation, cache = one.conversation, make_prompt_cache(model, both)
            learned = {name: _beginning(k, costs) for name, (k, _, _) in ways.items()}
        cache.read(one.prompt, step_size=CHUNK, progress=lambda done, total: None)
        tokens = mx.array([*one.prompt, *one.answer], dtype=mx.int32)
        first = len(one.prompt) - 1
        taps = _taps_of(cache.target, tokens[first:-1], cache.target_cache.fork())
        plain.tokens += len(one.answer)
        plain.seconds += len(one.answer) * costs.drafted[PLAIN]
        for name, (_, own, part) in ways.items():
            clock = Simulated()
            metered = Metered(own, costs, clock)
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
            for round in rounds:
                arms[name].statistics.record_round(round)
                said += round.tokens
                spent = clock.seconds
            assert said == one.answer
            arms[name].tokens += len(said)
            arms[name].seconds += spent
        progress(number + 1, len(recorded))
    return Replay([plain, *arms.values()], costs)


def _beginning(k: Length, costs: ReplayCosts) -> DraftLength:
    """Returns what chooses lengths in a new conversation: `auto` knows what rounds cost."""
    draft_length = DraftLength(None if k == "auto" else k, costs.drafted)
    draft_length.copy_costs = Costs(costs.copied)
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
