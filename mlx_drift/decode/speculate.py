"""Speculative decoding: draft, verify, accept, roll back, ingest.

Between rounds one invariant holds. Of the committed tokens t₀ … t_p the target's cache holds all
but the last, and the drafter's holds rows 1 … p (row s: token s with the taps of position s − 1).
So every round is alike, the first after the prompt included, and each has one host
synchronisation: the `tolist` that brings the number of accepted drafts and the tokens. (One a
token where a logits processor keeps a state, `mlx_drift.decode.fork`; one a draft, or a level of a
tree, that a network chooses under a grammar, `mlx_drift.decode.ahead`; one more for a tree that
recurrent layers verify, `mlx_drift.target.recurrent`.)
"""

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import mlx.core as mx

from mlx_drift.decode.accept import read_verdict
from mlx_drift.decode.clock import Clock
from mlx_drift.decode.draft_length import PLAIN, DraftLength
from mlx_drift.decode.plain import decode_plain
from mlx_drift.decode.sampling import GREEDY, Sampling
from mlx_drift.decode.text import Round, Text
from mlx_drift.drafters.protocol import Drafter, DrafterCache
from mlx_drift.errors import DriftError
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.model import Target

ROWS_BETWEEN_CLEARS = 2048  # mlx-lm's chunk; rounds that take turns with smaller ones need buffers
ROUNDS_BETWEEN_CLEARS = 64  # mlx-lm clears its buffers every 256 tokens

Progress = Callable[[int, int], None]
"""Called with the prompt tokens processed so far, and all of them."""

Cut = Callable[[int], int]
"""Says where a chunk of the prompt that begins at some row is to end, at most."""


def every(step_size: int) -> Cut:
    """Cuts a prompt as mlx-lm cuts it: every so many tokens.

    Raises:
        DriftError: If that is less than one.
    """
    if step_size < 1:
        raise DriftError(f"prefill_step_size is {step_size}; expected at least 1")
    return lambda start: start + step_size


def prefill(
    target: Target,
    drafter: Drafter,
    prompt: mx.array,
    target_cache: TargetCache,
    drafter_cache: DrafterCache,
    *,
    cut: Cut,
    done: int = 0,
) -> Iterator[int]:
    """Feeds all prompt tokens but the last to the target, and rows 1 … p to the drafter.

    Chunk by chunk; the taps of a chunk are dropped when it is ingested. After each the caches are
    as after any round.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The drafter.
        prompt: Token ids `[p+1]`.
        target_cache: The target's cache, holding the first `done` rows.
        drafter_cache: The drafter's cache, holding as many.
        cut: Says where a chunk ends.
        done: How many tokens need not be fed.

    Yields:
        How many tokens have been fed: before the first chunk and after each.
    """
    last = prompt.size - 1
    if not done:
        drafter.start(prompt[:1], drafter_cache)
    yield done
    cleared = done
    while done < last:
        stop = min(cut(done), last)
        _, taps = target(prompt[done:stop], target_cache)
        drafter.ingest(prompt[done + 1 : stop + 1], taps, drafter_cache)
        mx.eval(target_cache.state, drafter_cache.state)
        if stop - cleared >= ROWS_BETWEEN_CLEARS or stop == last:
            mx.clear_cache()
            cleared = stop
        done = stop
        yield done


def speculate(
    target: Target,
    drafter: Drafter,
    last: mx.array,
    target_cache: TargetCache,
    drafter_cache: DrafterCache,
    *,
    num_draft_tokens: int | DraftLength,
    max_tokens: int,
    stop_tokens: AbstractSet[int],
    sampling: Sampling = GREEDY,
    key: mx.array | None = None,
    history: Sequence[int] = (),
    clock: Clock | None = None,
) -> Generator[Round]:
    """Decodes; greedily, token for token what the target alone would give.

    At a temperature above 0, what is committed has exactly the distribution of what the target
    alone would give.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The drafter.
        last: The last committed token `[1]`, which neither cache was fed as a target row.
        target_cache: The target's cache, holding all committed tokens but the last.
        drafter_cache: The drafter's cache, holding a row for every committed token but the first.
        num_draft_tokens: Drafts a round, K; or what chooses it before every round.
        max_tokens: Tokens to commit in all; −1 for no limit.
        stop_tokens: Token ids after which nothing is wanted.
        sampling: What tokens are drawn from.
        key: The randomness, at a temperature above 0.
        history: All committed tokens, for logits processors.
        clock: What rounds are timed by; it stands while the caller has its turn, unless that sets
            it going: for what the device does for this answer meanwhile.

    Yields:
        A `Round` for each target pass; the last one ends at a stop token or at `max_tokens`.
    """
    draft_length = num_draft_tokens
    if not isinstance(draft_length, DraftLength):
        draft_length = DraftLength(fixed=draft_length)
    text = Text(last, max_tokens, stop_tokens, sampling, key, history)
    clock = clock or Clock()
    start = clock()
    for count in itertools.count(1):
        sources = text.sources(drafter, drafter_cache)
        source = draft_length.pick([*sources])
        k = draft_length.choose()
        if k == PLAIN:
            yield from decode_plain(
                target, drafter, text, target_cache, drafter_cache, draft_length, clock
            )
            if text.finished:
                return
            start = clock()
            continue
        if text.remaining >= 0:
            k = min(k, text.remaining - 1)
        k = min(k, target_cache.room - 1)  # keys and values that are about to be quantized
        chooser = text.chooser(k)
        proposed = sources[source](k, drafter_cache, chooser)
        draft = proposed.tokens
        waited = _start(draft)  # the device drafts while the host goes on
        logits, taps = target.verify(
            mx.concatenate([text.last, draft]), target_cache, proposed.tree
        )
        decided, log_probabilities = chooser.verify(proposed, logits)
        if proposed.finite is not None:  # comes along with the verdict
            decided = mx.concatenate([decided, proposed.finite.astype(decided.dtype)])
        built = clock()
        values = target.ranks.read(decided, draft)  # the synchronisation
        read = clock()
        is_finite = bool(values.pop()) if proposed.finite is not None else True
        verdict = read_verdict(values, proposed)

        tokens = text.commit(verdict.tokens)
        path = verdict.path[: len(tokens)]
        tested, accepted = min(verdict.tested, len(path)), min(verdict.accepted, len(path))
        levels = verdict.levels[:tested]
        target.keep(target_cache, path)
        drafter.ingest(text.fresh, _rows(taps, path), drafter_cache)
        chosen_from = [log_probabilities[row] for row in path]
        # Under way while the caller has its turn. And once they are, another thread may ask for
        # the next round or read the probabilities: what is lazy belongs to this thread's stream.
        waited += _start(drafter_cache.state, target_cache.state, chosen_from, text.state)
        seconds = clock() - start
        draft_length.record_round(k, draft.size, tested, accepted, seconds, source, levels)
        host_seconds = seconds - (read - built) - waited
        round = Round(
            tokens,
            chosen_from,
            accepted,
            tested,
            read - start,
            host_seconds,
            source.kind,
            levels,
            is_finite=is_finite,
            is_last=text.finished,
        )
        start = clock()
        clock.stop()
        yield round
        clock.go()
        if text.finished:
            return
        if count % ROUNDS_BETWEEN_CLEARS == 0:
            mx.clear_cache()


def _rows(taps: mx.array, path: Sequence[int]) -> mx.array:
    """Takes the rows of a path, the first ones of a chain."""
    return taps[: len(path)] if path == range(len(path)) else taps[mx.array(list(path))]


def _start(*arrays: Any) -> float:
    """Starts computing; returns what that took: on a CPU it waits when too much is under way."""
    start = time.perf_counter()
    mx.async_eval(*arrays)
    return time.perf_counter() - start
