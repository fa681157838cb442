"""What the caches of a target are, and how large they grow, from rows that are never computed."""

import copy
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, QuantizedKVCache

from mlx_drift.doctor.diagnosis import CacheKind
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.model import Target
from mlx_drift.target.rewind import Caches, parts
from mlx_drift.target.sliding import ALL, STEP, SlidingKVCache


def two_tokens() -> mx.array:
    """Two tokens: a block, of which a row can be taken back."""
    return mx.zeros((2,), mx.int32)


def verified(target: Target, empty: TargetCache) -> TargetCache:
    """Verifies two rows and takes one back, lazily.

    Args:
        target: The target.
        empty: Its cache, which stays empty.

    Returns:
        A copy of it with buffers as the model fills them, not quantized yet.

    Raises:
        DriftError: If that is refused.
    """
    cache = copy.deepcopy(empty)
    target.verify(two_tokens(), cache)
    fed = TargetCache([*cache])
    target.rollback(cache, 1)
    return fed


def cache_kinds(fed: Caches, empty: TargetCache, rows: int, step_size: int) -> list[CacheKind]:
    """Sorts caches into kinds, and tells how large they are once so many rows were fed.

    One cache of a kind is fed alone, with rows of the shape that the model has fed it.

    Args:
        fed: The caches of a conversation that was fed a few rows.
        empty: Those of one that was not; they are fed lazily.
        rows: How many rows.
        step_size: How many at a time.
    """
    counts: dict[tuple[Any, ...], list[int]] = {}
    for i, cache in enumerate(fed):
        counts.setdefault(_signature(cache), []).append(i)
    alone = TargetCache([copy.deepcopy(empty[i]) for i, *_ in counts.values()], empty.quantization)
    likes = [part for i, *_ in counts.values() for part in parts(fed[i])]
    for start in range(0, rows, step_size):
        for part, like in zip(alone.parts(), likes, strict=True):
            _feed(part, like, min(step_size, rows - start))
        alone.quantize()
    kinds: dict[tuple[str, str, str], CacheKind] = {}
    for cache, indices in zip(alone, counts.values(), strict=True):
        for part in parts(cache):
            if not part.empty():
                words = _words(part, step_size)
                kinds[words] = _added(
                    kinds.get(words, CacheKind(0, *words, None, 0)), part, len(indices)
                )
    return [*kinds.values()]


def _signature(cache: Any) -> tuple[Any, ...]:
    """Tells caches apart that are not alike."""
    return tuple(
        (
            type(part).__name__,
            *(getattr(part, name, None) for name in ("window", "sinks", "chunk_size")),
            *((array.shape, array.dtype) for _, array in _arrays(part)),
        )
        for part in parts(cache)
    )


def _arrays(part: Any) -> list[tuple[str, mx.array]]:
    """Returns the arrays that a cache holds, under a name each."""
    held = part.cache if isinstance(part, ArraysCache) else [part.keys, part.values]
    return tree_flatten([array for array in held if array is not None])


def _feed(part: Any, like: Any, rows: int) -> None:
    """Feeds a cache rows such as another of its kind was fed."""
    if isinstance(part, ArraysCache):
        part.cache = list(like.cache)
    elif not like.empty():
        if isinstance(part, ChunkedKVCache):
            part.maybe_trim_front()  # as the model does before each block
        shapes = [(*buffer.shape[:2], rows, buffer.shape[3]) for buffer in (like.keys, like.values)]
        part.update_and_fetch(*(mx.zeros(shape, like.keys.dtype) for shape in shapes))


def _added(kind: CacheKind, part: Any, count: int) -> CacheKind:
    """Adds to a kind so many caches like one that was fed."""
    per_token = kind.bytes_per_token
    if not isinstance(part, ArraysCache):
        row = sum(array.nbytes // array.shape[2] for _, array in _arrays(part))
        per_token = (per_token or 0) + count * row
    return replace(
        kind,
        count=kind.count + count,
        bytes_per_token=per_token,
        nbytes=kind.nbytes + count * part.nbytes,
    )


def _words(part: Any, step_size: int) -> tuple[str, str, str]:
    """Says what a cache holds, how drafts are taken back in it, and how a conversation goes back.

    The latter two are what `mlx_drift.target.caches` and `mlx_drift.target.rewind` do with a
    cache of its type.
    """
    rows = "keys and values"
    turns = "to a turn's start or end, by a copy"
    match part:
        case ArraysCache():
            return "recurrent state", "its layer is called anew on the accepted rows", turns
        case SlidingKVCache() if part.slack != ALL:
            held = part.window - 1 + part.slack + max(STEP, step_size)
            kind = f"{rows}, a window of {part.window} rows"
            if part.sinks:
                kind = (
                    f"{rows}, the first {part.sinks} rows and the last {part.window - part.sinks}"
                )
            trimmed = f"trimmed; {held} rows are kept at most"
            return kind, trimmed, f"to any token that is kept with its window, else {turns}"
        case ChunkedKVCache():
            kind = f"{rows}, chunks of {part.chunk_size} rows"
            return kind, "trimmed", f"to any token whose chunk is still there, else {turns}"
        case QuantizedKVCache():
            kind = f"{rows} in {part.bits} bits, groups of {part.group_size}"
            return kind, "trimmed", "to any token"
    return rows, "trimmed", "to any token"
