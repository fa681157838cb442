"""A stretch of plain decoding between rounds, for where no number of drafts pays.

As in mlx-lm the next step is under way while a token is read, unless that token may well be the
beginning of a copy, of which the step would have no part. But its token is chosen only when
that one is committed, so logits processors see no position that may yet be taken back. The taps of
the stretch are kept, and the drafter catches up with them only when it is asked again, or when they
become too many.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_drift.decode.clock import Clock
from mlx_drift.decode.draft_length import PLAIN, DraftLength
from mlx_drift.decode.text import Round, Text
from mlx_drift.drafters.protocol import Draft, Drafter, DrafterCache
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.model import Target

MOST_PENDING = 2048
"""Rows whose taps are kept: 50 MB for three taps of an 8B model in 16 bits."""

TOKENS_BETWEEN_CLEARS = 256  # as in mlx-lm
PLAIN_RUNS, PLAIN_STEPS = 5, 3


@dataclass(frozen=True)
class Step:
    """One target step, under way."""

    logits: mx.array  # [1, V]
    taps: mx.array  # [1, A, T]


def decode_plain(
    target: Target,
    drafter: Drafter,
    text: Text,
    target_cache: TargetCache,
    drafter_cache: DrafterCache,
    draft_length: DraftLength,
    clock: Clock,
) -> Iterator[Round]:
    """Decodes without drafts until drafting seems worth a try, or nothing more is wanted.

    When it ends, or is closed, the caches are as after any round.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The drafter.
        text: What is committed; it grows.
        target_cache: The target's cache.
        drafter_cache: The drafter's cache.
        draft_length: Says when to stop.
        clock: What tokens are timed by.

    Yields:
        A `Round` for each token.
    """
    missed: list[tuple[mx.array, mx.array]] = []  # tokens and taps that the drafter has not seen
    unseen: list[int] = []  # the same tokens
    following: Step | None = None
    step = _step(target, text.last, target_cache)
    waits = True  # the step was not under way

    def settle(target_cache: TargetCache, drafter_cache: DrafterCache) -> None:
        if following is not None:
            target.rollback(target_cache, 1)
        _catch_up(drafter, drafter_cache, missed)

    start = clock()
    try:
        while True:
            token, log_probabilities = _choose(text, step)
            target.rollback(target_cache, 0)  # the step's own row stays
            draft_length.pick([*text.sources(drafter, drafter_cache, unseen, under_way=1)])
            more = text.remaining != 1 and draft_length.choose(len(missed) + 1) == PLAIN
            ahead = more and draft_length.is_ahead()
            following = _step(target, token, target_cache) if ahead else None
            built = clock()
            tokens = target.ranks.read(token)
            read = clock()
            text.commit(tokens)
            if text.finished and following is not None:
                target.rollback(target_cache, 1)
                following = None
            missed.append((text.fresh, step.taps))
            unseen += tokens
            if len(missed) == MOST_PENDING:
                _catch_up(drafter, drafter_cache, missed)
                missed.clear()
                unseen.clear()
                mx.async_eval(drafter_cache.state)
            seconds = clock() - start
            # One that neither waited nor started the next step did less than a token takes.
            draft_length.record_plain(seconds if ahead or waits else None, waited=waits)
            start = clock()
            clock.stop()
            yield Round(
                tokens,
                [log_probabilities[0]],
                accepted=0,
                tested=0,
                seconds=seconds,
                host_seconds=seconds - (read - built),
                is_plain=True,
                is_last=text.finished,
                settle=settle,
            )
            clock.go()
            waits = following is None
            if waits and more and not text.finished:
                draft_length.pick([*text.sources(drafter, drafter_cache, unseen)])
                if draft_length.choose(len(missed)) == PLAIN:
                    following = _step(target, text.last, target_cache)
            if following is None:
                break
            if len(missed) % TOKENS_BETWEEN_CLEARS == 0:
                mx.clear_cache()
            step, following = following, None
    except GeneratorExit:
        settle(target_cache, drafter_cache)
        raise
    start, rows = clock(), len(missed)
    _catch_up(drafter, drafter_cache, missed)
    if rows and not text.finished:  # else nobody may ask for them
        mx.eval(drafter_cache.state)
        draft_length.record_catch_up(rows, clock() - start)


def _step(target: Target, last: mx.array, cache: TargetCache) -> Step:
    """Starts a target step after the last token."""
    step = Step(*target.verify(last, cache))
    mx.async_eval(step.logits, step.taps, cache.state)
    return step


def _choose(text: Text, step: Step) -> tuple[mx.array, mx.array]:
    """Starts choosing the token `[1]` to commit next; with the log-probabilities `[1, V]`."""
    none = Draft(mx.zeros((0,), mx.int32))
    decided, log_probabilities = text.chooser(0).verify(none, step.logits)
    token = decided[1:]
    mx.async_eval(token, log_probabilities, text.state)
    return token, log_probabilities


def _catch_up(
    drafter: Drafter, cache: DrafterCache, missed: list[tuple[mx.array, mx.array]]
) -> None:
    """Gives the drafter the rows that it missed."""
    if missed:
        tokens, taps = (mx.concatenate(list(parts)) for parts in zip(*missed, strict=True))
        drafter.ingest(tokens, taps, cache)


def time_plain_steps(target: Target, last: mx.array, cache: TargetCache) -> float:
    """Times one-row target steps, each rolled back: what plain decoding costs a token here.

    Each run chains a few steps without reading them back, as mlx-lm's pipelined decoding does.

    Returns:
        Seconds a step: the second shortest of some runs, after one to warm up. Other work on the
        machine only ever adds, and may well add to most of them.
    """
    runs = []
    for _ in range(PLAIN_RUNS + 1):
        start = time.perf_counter()
        token = last
        for _ in range(PLAIN_STEPS):
            logits, _ = target.verify(token, cache)
            token = mx.argmax(logits, axis=-1)
            target.rollback(cache, 1)
        mx.eval(token)
        runs.append((time.perf_counter() - start) / PLAIN_STEPS)
    return sorted(runs[1:])[1]
