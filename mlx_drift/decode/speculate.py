"""Speculative decoding: draft, verify, accept, roll back, ingest.

Between rounds one invariant holds. Of the committed tokens t₀ … t_p the target's cache holds all
but the last, and the drafter's holds rows 1 … p (row s: token s with the taps of position s − 1).
So every round is alike, the first after the prompt included, and each has one host
synchronisation: the `tolist` that brings the number of accepted drafts and the tokens.
"""

import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import mlx.core as mx

from mlx_drift.decode.accept import accept_greedy
from mlx_drift.drafters.protocol import Drafter, DrafterCache
from mlx_drift.target import Cache, Target

Progress = Callable[[int, int], None]
"""Called with the prompt tokens processed so far, and all of them."""


@dataclass(frozen=True)
class Round:
    """What one round committed."""

    tokens: list[int]
    logits: mx.array  # [len(tokens), V], the target's, from which each token was chosen
    accepted: int  # the first `accepted` tokens were drafted
    tested: int  # drafts that were tested (see `mlx_drift.decode.statistics`)
    seconds: float  # from the round's start to its synchronisation


def prefill(
    target: Target,
    drafter: Drafter,
    prompt: mx.array,
    target_cache: Cache,
    drafter_cache: DrafterCache,
    *,
    step_size: int,
    progress: Progress,
) -> None:
    """Feeds all prompt tokens but the last to the target, and rows 1 … p to the drafter.

    In chunks cut as mlx-lm cuts them; the taps of a chunk are dropped when it is ingested.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The drafter.
        prompt: Token ids `[p+1]`.
        target_cache: The target's cache, empty.
        drafter_cache: The drafter's cache, empty.
        step_size: Tokens a chunk.
        progress: Told after each chunk.
    """
    last = prompt.size - 1
    progress(0, prompt.size)
    for start in range(0, last, step_size):
        stop = min(start + step_size, last)
        _, taps = target(prompt[start:stop], target_cache)
        drafter.ingest(prompt[start + 1 : stop + 1], taps, drafter_cache)
        mx.eval([c.state for c in target_cache], drafter_cache.state)
        progress(stop, prompt.size)
        mx.clear_cache()


def speculate(
    target: Target,
    drafter: Drafter,
    last: mx.array,
    target_cache: Cache,
    drafter_cache: DrafterCache,
    *,
    num_draft_tokens: int,
    max_tokens: int,
    stop_tokens: AbstractSet[int],
) -> Iterator[Round]:
    """Decodes greedily; token for token what the target alone would give.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The drafter.
        last: The last committed token `[1]`, which neither cache was fed as a target row.
        target_cache: The target's cache, holding all committed tokens but the last.
        drafter_cache: The drafter's cache, holding a row for every committed token but the first.
        num_draft_tokens: Drafts a round, K.
        max_tokens: Tokens to commit in all; −1 for no limit.
        stop_tokens: Token ids after which nothing is wanted.

    Yields:
        A `Round` for each target pass; the last one ends at a stop token or at `max_tokens`.
    """
    remaining = max_tokens
    while remaining != 0:
        start = time.perf_counter()
        k = num_draft_tokens if remaining < 0 else min(num_draft_tokens, remaining - 1)
        draft = drafter.propose(k, drafter_cache).tokens
        logits, taps = target(mx.concatenate([last, draft]), target_cache)
        accepted, *tokens = accept_greedy(draft, logits).tolist()  # the synchronisation
        seconds = time.perf_counter() - start

        tokens = tokens[: accepted + 1]
        stop = next((i for i, token in enumerate(tokens) if token in stop_tokens), None)
        tested = min(accepted + 1, draft.size)
        if stop is not None and stop < accepted:
            tokens, accepted, tested = tokens[: stop + 1], stop + 1, stop + 1
        rows = len(tokens)

        target.rollback(target_cache, draft.size + 1 - rows)
        last = mx.array(tokens[-1:])
        drafter.ingest(mx.array(tokens), taps[:rows], drafter_cache)
        yield Round(tokens, logits[:rows], accepted, tested, seconds)
        if stop is not None:
            return
        remaining -= rows


def time_plain_step(target: Target, last: mx.array, cache: Cache, repeats: int = 7) -> float:
    """Times one-row target steps, each rolled back: what plain decoding costs a token here.

    Returns:
        The median seconds of `repeats` steps, after one to warm up.
    """
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        logits, _ = target(last, cache)
        mx.eval(mx.argmax(logits, axis=-1))
        seconds.append(time.perf_counter() - start)
        target.rollback(cache, 1)
    return sorted(seconds[1:])[repeats // 2]
