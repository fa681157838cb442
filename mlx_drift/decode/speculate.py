"""Speculative decoding: draft, verify, accept, roll back, ingest.

Between rounds one invariant holds. Of the committed tokens t₀ … t_p the target's cache holds all
but the last, and the drafter's holds rows 1 … p (row s: token s with the taps of position s − 1).
So every round is alike, the first after the prompt included, and each has one host
synchronisation: the `tolist` that brings the number of accepted drafts and the tokens.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_drift.caches import TargetCache
from mlx_drift.decode.sampling import GREEDY, Chooser, Sampling
from mlx_drift.drafters.protocol import Drafter, DrafterCache
from mlx_drift.target import Target

PLAIN_RUNS, PLAIN_STEPS = 3, 4
ROUNDS_BETWEEN_CLEARS = 64  # mlx-lm clears its buffers every 256 tokens

Progress = Callable[[int, int], None]
"""Called with the prompt tokens processed so far, and all of them."""


@dataclass(frozen=True)
class Round:
    """What one round committed."""

    tokens: list[int]
    log_probabilities: list[mx.array]  # [V] for each token: the target's, it was chosen from
    accepted: int  # the first `accepted` tokens were drafted
    tested: int  # drafts that were tested (see `mlx_drift.decode.statistics`)
    seconds: float  # from the round's start to its synchronisation
    host_seconds: float  # of it and after it, spent in Python: building graphs, reading results


def prefill(
    target: Target,
    drafter: Drafter,
    prompt: mx.array,
    target_cache: TargetCache,
    drafter_cache: DrafterCache,
    *,
    step_size: int,
    progress: Progress,
    done: int = 0,
) -> None:
    """Feeds all prompt tokens but the last to the target, and rows 1 … p to the drafter.

    In chunks cut as mlx-lm cuts them; the taps of a chunk are dropped when it is ingested.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The drafter.
        prompt: Token ids `[p+1]`.
        target_cache: The target's cache, holding the first `done` rows.
        drafter_cache: The drafter's cache, holding as many.
        step_size: Tokens a chunk.
        progress: Told after each chunk.
        done: How many tokens need not be fed.
    """
    last = prompt.size - 1
    if not done:
        drafter.start(prompt[:1], drafter_cache)
    progress(done, prompt.size)
    for start in range(done, last, step_size):
        stop = min(start + step_size, last)
        _, taps = target(prompt[start:stop], target_cache)
        drafter.ingest(prompt[start + 1 : stop + 1], taps, drafter_cache)
        mx.eval(target_cache.state, drafter_cache.state)
        progress(stop, prompt.size)
        mx.clear_cache()


def speculate(
    target: Target,
    drafter: Drafter,
    last: mx.array,
    target_cache: TargetCache,
    drafter_cache: DrafterCache,
    *,
    num_draft_tokens: int,
    max_tokens: int,
    stop_tokens: AbstractSet[int],
    sampling: Sampling = GREEDY,
    key: mx.array | None = None,
    history: Sequence[int] = (),
) -> Iterator[Round]:
    """Decodes; greedily, token for token what the target alone would give.

    At a temperature above 0, what is committed has exactly the distribution of what the target
    alone would give.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The drafter.
        last: The last committed token `[1]`, which neither cache was fed as a target row.
        target_cache: The target's cache, holding all committed tokens but the last.
        drafter_cache: The drafter's cache, holding a row for every committed token but the first.
        num_draft_tokens: Drafts a round, K.
        max_tokens: Tokens to commit in all; −1 for no limit.
        stop_tokens: Token ids after which nothing is wanted.
        sampling: What tokens are drawn from.
        key: The randomness, at a temperature above 0.
        history: All committed tokens, for logits processors.

    Yields:
        A `Round` for each target pass; the last one ends at a stop token or at `max_tokens`.
    """
    remaining = max_tokens
    round_key = None
    committed = mx.array(list(history), dtype=mx.int32) if sampling.logits_processors else None
    for count in itertools.count(1):
        start = time.perf_counter()
        k = num_draft_tokens if remaining < 0 else min(num_draft_tokens, remaining - 1)
        k = min(k, target_cache.room - 1)  # keys and values that are about to be quantized
        if key is not None:
            key, round_key = mx.random.split(key)
        chooser = Chooser(sampling, k, round_key, committed)
        proposed = drafter.propose(k, drafter_cache, chooser)
        draft = proposed.tokens
        logits, taps = target.verify(mx.concatenate([last, draft]), target_cache)
        log_probabilities = chooser.log_probabilities(logits, draft)
        decided = chooser.accept(proposed, log_probabilities)
        built = time.perf_counter()
        verdict: Any = decided.tolist()  # the synchronisation
        read = time.perf_counter()
        accepted, *tokens = verdict

        tokens = tokens[: accepted + 1]
        stop = next((i for i, token in enumerate(tokens) if token in stop_tokens), None)
        tested = min(accepted + 1, draft.size)
        if stop is not None and stop < accepted:
            tokens, accepted, tested = tokens[: stop + 1], stop + 1, stop + 1
        rows = len(tokens)

        target.rollback(target_cache, draft.size + 1 - rows)
        fresh = mx.array(tokens)
        last = mx.array(tokens[-1:])
        if committed is not None:
            committed = mx.concatenate([committed, fresh])
        drafter.ingest(fresh, taps[:rows], drafter_cache)
        chosen_from = [log_probabilities[row] for row in range(rows)]
        # Under way while the caller has its turn. And once they are, another thread may ask for
        # the next round or read the probabilities: what is lazy belongs to this thread's stream.
        mx.async_eval(drafter_cache.state, target_cache.state, chosen_from, key, committed)
        host_seconds = time.perf_counter() - read + built - start
        yield Round(tokens, chosen_from, accepted, tested, read - start, host_seconds)
        remaining -= rows
        if stop is not None or remaining == 0:
            return
        if count % ROUNDS_BETWEEN_CLEARS == 0:
            mx.clear_cache()


def time_plain_steps(target: Target, last: mx.array, cache: TargetCache) -> float:
    """Times one-row target steps, each rolled back: what plain decoding costs a token here.

    Each run chains a few steps without reading them back, as mlx-lm's pipelined decoding does.

    Returns:
        Seconds a step: the median of some runs, after one to warm up.
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
    return statistics.median(runs[1:])
