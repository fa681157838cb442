"""One answer under way: a request, its place in the caches, and who hears of it."""

import secrets
import time
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors

from mlx_drift.decode.answer import Chunk, answer
from mlx_drift.decode.clock import Clock
from mlx_drift.decode.draft_length import PLAIN
from mlx_drift.decode.plain import time_plain_steps
from mlx_drift.decode.prompt_cache import PromptCache
from mlx_drift.decode.speculate import Cut
from mlx_drift.decode.statistics import Statistics
from mlx_drift.decode.text import Round
from mlx_drift.errors import DriftError
from mlx_drift.serve.model import LoadedModel
from mlx_drift.serve.request import (
    Drafted,
    Ended,
    Event,
    Piece,
    Reading,
    Request,
    Scored,
    Told,
    Usage,
)
from mlx_drift.serve.said import joined
from mlx_drift.serve.steering import steering
from mlx_drift.serve.watching import Drift, Watch
from mlx_drift.serve.wording import Wording

Sink = Callable[[Event], None]
"""Hears what happens, on the device's thread; it must not wait."""


@dataclass(eq=False)
class Ticket:
    """What the caller holds of a request: with it, it may leave.

    Attributes:
        request: What was asked.
        sink: Who hears of it.
        model: Who answers.
        deadline: When it is given up, in seconds of `time.monotonic`.
        cancelled: The caller left.
        asked_at: When it came.
    """

    request: Request
    sink: Sink
    model: LoadedModel
    deadline: float
    cancelled: bool = False
    asked_at: float = field(default_factory=time.monotonic)


class Conversation:
    """Runs one request, a step at a time.

    Args:
        ticket: The request.
        holds_up: Says whether answers of others wait for its chunks.

    Attributes:
        cache: Its caches, once it has them.
        is_reading: It has not read its prompt yet.
        rows: Tokens that its last step read or added.
        statistics: Of its rounds.
    """

    def __init__(self, ticket: Ticket, holds_up: Callable[[], bool]):
        self.ticket = ticket
        self.request = ticket.request
        self.model = ticket.model
        self.cache: PromptCache | None = None
        self.is_reading = True
        self.rows = 0
        self.statistics = Statistics()
        self.clock = Clock()
        self.clock.stop()
        self._holds_up = holds_up
        self._steps: Generator[Chunk | Round] | None = None
        self._number: int | None = None  # by which other ranks know it
        self._wording = Wording(self.model.tokenizer, self.request.stop, self.request.speech)
        self._done = 0
        self._count = 0
        self._reasoning = 0
        self._watch: Watch | None = None

    def begin(self, cache: PromptCache, marks: Collection[int]) -> None:
        """Takes its caches.

        Args:
            cache: Its caches, which may hold some of the prompt.
            marks: After how many tokens others may branch off; it may grow.
        """
        request, self.cache = self.request, cache
        leader = self.model.leader
        cut: Cut = lambda start: self.model.cut(start, self._holds_up())  # noqa: E731
        seed = secrets.randbits(63) if request.seed is None else request.seed
        self._steps = steps_of(
            self.model,
            cache,
            request,
            marks,
            cut if leader is None else leader.cut(cut),
            seed,
            self.statistics,
            self.clock,
        )
        cache.drafter = self.model.drafter  # it may be a fork of one that is watched
        if request.tells_drift:
            draft_length = self.statistics.draft_length
            if leader is not None or (draft_length is not None and draft_length.tree):
                raise DriftError(
                    "speculative.drift: chains are watched, not trees (num_draft_tokens asks for a "
                    "chain), and on one rank alone; else leave it out"
                )
            self._watch = Watch(self.model.drafter, len(request.tokens))
            cache.drafter = self._watch.drafter
        if leader is not None:
            self._number = leader.begin(request, cache, seed)
            self._steps = leader.steps(self._number, self._steps, marks)

    def step(self) -> list[Event]:
        """Takes one step: a chunk of the prompt, or a round.

        Returns:
            What came of it; the last one is `Ended` if nothing more is wanted.
        """
        assert self._steps is not None, "it has not begun"
        self.clock.go()
        try:
            step = next(self._steps)
        finally:
            self.clock.stop()
        drift = None if self._watch is None else self._watch.take()
        if isinstance(step, Chunk):
            self.rows, self._done = step.done - self._done, step.done
            self.is_reading = step.done < step.total - 1
            return [Reading(step.done, step.total)]
        self.rows = len(step.tokens)
        return self._events(step, drift if step.source == "network" else None)

    def wait(self) -> None:
        """Waits until the device has done all that was begun, on this conversation's account."""
        self.clock.go()
        mx.synchronize()
        self.clock.stop()

    def close(self) -> None:
        """Ends it, whole or not; its caches are as after its last step."""
        if self.model.leader is not None and self._number is not None:
            self.model.leader.close(self._number)
            self._number = None
        if self._steps is not None:
            self._steps.close()
        if self.cache is not None:
            self.cache.drafter = self.model.drafter
        self.model.learn(self.statistics)

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        s = self.statistics
        return Usage(
            prompt_tokens=len(self.request.tokens),
            cached_tokens=s.reused_tokens,
            completion_tokens=self._count,
            reasoning_tokens=self._reasoning,
            rounds=s.rounds,
            tested=tuple(s.tested),
            accepted=tuple(s.accepted),
            free={
                source: (rounds, s.free_tested[source], s.free_accepted[source])
                for source, rounds in s.free_rounds.items()
            },
            expected=s.expected,
            plain_tokens=s.plain_tokens,
            seconds=sum(s.round_seconds) + s.plain_seconds,
            plain_step_seconds=self.model.learned.costs.known().get(PLAIN),
        )

    def _events(self, round: Round, drift: Drift | None) -> list[Event]:
        """Returns what a round added; the answer may end within it."""
        ends = self.model.tokenizer.eos_token_ids
        told: list[Told] = []
        reason: Literal["stop", "tool_calls", "length"] | None = None
        scored: list[Scored] = []
        for token, log_probabilities, origin in zip(
            round.tokens, round.log_probabilities, round.origins, strict=True
        ):
            self._count += 1
            told.append(Told(token, origin, []))
            if token in ends:
                reason = "stop"
                break
            told[-1].said.extend(self._wording.add(token))
            self._reasoning += self._wording.is_reasoning
            if self.request.top_logprobs is not None:
                scored.append(_score(token, log_probabilities, self.request.top_logprobs))
            if self._wording.is_over:
                reason = "stop"
                break
            if self._count == self.request.max_tokens:
                reason = "length"
                break
        if reason is not None:
            told[-1].said.extend(self._wording.end(is_cut=reason == "length"))
            if self._wording.is_over or reason == "stop":
                reason = "tool_calls" if self._wording.calls else "stop"
        said = joined(one for token in told for one in token.said)
        drafted = None
        if self.request.tells_origins:
            drafted = Drafted(told, round.tested, round.seconds, drift)
        has_more = said or scored or drafted is not None
        events: list[Event] = [Piece(said, scored, drafted)] if has_more else []
        if reason is not None:
            self._time_plain_steps()
            events.append(Ended(reason, self.usage, self._wording.stopped))
        return events

    def _time_plain_steps(self) -> None:
        """Learns what plain decoding takes, once, for those who ask how drafting went."""
        if not self.request.tells_origins or PLAIN in self.model.learned.costs.known():
            return
        assert self.cache is not None, "it has begun"
        self.close()  # whatever is ahead of the text is taken back
        if self.model.leader is not None:
            self.model.leader.times(self.cache)
        seconds = seconds_of_plain_step(self.cache)
        if self.model.leader is not None:
            self.model.leader.timed(seconds)
        self.model.learned.costs.know(PLAIN, seconds)


def seconds_of_plain_step(cache: PromptCache) -> float:
    """Times plain decoding at the end of a conversation, which it leaves as it is."""
    with cache.under_way():
        return time_plain_steps(cache.target, mx.array(cache.tokens[-1:]), cache.target_cache)


def _score(token: int, log_probabilities: mx.array, count: int) -> Scored:
    """Reads a token's log-probability and the likeliest ones."""
    own: Any = log_probabilities[token].astype(mx.float32).item()
    top: list[tuple[int, float]] = []
    if count := min(count, log_probabilities.size):
        likeliest = mx.argpartition(-log_probabilities, count - 1)[:count]
        values: Any = log_probabilities[likeliest].astype(mx.float32).tolist()
        tokens: Any = likeliest.tolist()
        top = sorted(zip(tokens, values, strict=True), key=lambda pair: -pair[1])
    return Scored(token, own, top)


def steps_of(
    model: LoadedModel,
    cache: PromptCache,
    request: Request,
    marks: Collection[int],
    cut: Cut,
    seed: int,
    statistics: Statistics,
    clock: Clock | None = None,
) -> Generator[Chunk | Round]:
    """Returns the steps of an answer, none of them taken.

    Args:
        model: Who answers.
        cache: Its caches, which may hold some of the prompt.
        request: What is asked.
        marks: After how many tokens others may branch off; it may grow.
        cut: Says where a chunk of the prompt ends.
        seed: Of what is drawn, if anything is.
        statistics: Grows with the rounds.
        clock: What the steps are timed by.
    """
    is_seeded = request.seed is not None and request.sampling.is_random
    draft_length = model.draft_length(request.num_draft_tokens, is_seeded)
    statistics.draft_length = draft_length
    processors = make_logits_processors(**request.penalties)
    processors += steering(model.tokenizer, request.speech, len(request.tokens))
    if request.grammar is not None:
        processors.append(request.grammar.processor(model.tokenizer, request.tokens))
    sampling = replace(request.sampling, logits_processors=tuple(processors))
    return answer(
        cache,
        request.tokens,
        cut=cut,
        marks=marks,
        draft_length=draft_length,
        max_tokens=request.max_tokens,
        stop_tokens=set(model.tokenizer.eos_token_ids),
        sampling=sampling,
        key=mx.random.key(seed) if sampling.is_random else None,
        statistics=statistics,
        clock=clock,
        expected=request.expected,
    )
