"""How many bytes of caches a conversation will take, before it is begun.

Read off caches that are fed two rows, lazily and never computed: buffers come in steps, so shapes
tell bytes a row. An upper bound: a machine that runs out of memory takes everything with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache

from mlx_drift.decode.prompt_cache import PromptCache
from mlx_drift.decode.snapshots import MOST_KEPT
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS
from mlx_drift.target.caches import KVQuantization
from mlx_drift.target.sliding import ALL, STEP, SlidingKVCache

SLACK = STEP + MAX_DRAFT_TOKENS
"""Rows that a buffer may have beyond those committed."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one conversation's caches.

    Attributes:
        fixed: Bytes at any length: states, windows, and snapshots of both.
        row: Further bytes a row.
        start: Bytes while rows are not yet quantized.
        copies: Going back takes copies: rows cannot always be trimmed.
    """

    fixed: int
    row: float
    start: int
    copies: bool

    def bytes(self, tokens: int) -> int:
        """Returns the most that a conversation of so many tokens takes."""
        return self.fixed + self.start + int(self.row * (tokens + SLACK)) + 1

    def tokens(self, bytes: int) -> int:
        """Returns how many tokens a conversation may have in so many bytes."""
        rest = bytes - self.fixed - self.start - 1
        if self.row == 0:
            return 0 if rest < 0 else 1 << 40
        return max(0, int(rest / self.row) - SLACK - 1)

    @classmethod
    def of(cls, cache: PromptCache, step_size: int) -> "Footprint":
        """Measures it on an empty cache, which is of no use afterwards.

        Args:
            cache: The cache.
            step_size: Tokens of the longest chunk of a prompt.
        """
        tokens = mx.zeros(2, mx.int32)
        _, taps = cache.target(tokens, cache.target_cache)
        cache.drafter.start(tokens[:1], cache.drafter_cache)
        cache.drafter.ingest(tokens[:1], taps[:1], cache.drafter_cache)
        snapshots = [cache.target_cache.snapshot(), cache.drafter_cache.snapshot()]
        copies = any(arrays for snapshot in snapshots for arrays in snapshot)
        seed = sum(a.nbytes for _, a in tree_flatten([cache.drafter_cache.seed]))
        index = getattr(cache.drafter_cache, "token_bytes", 0)  # of lookup, which holds no arrays
        held, snapshot, row, start = seed, float(seed), float(index), 0.0
        for part in _parts(cache):
            if isinstance(part, ArraysCache):
                held, snapshot = held + part.nbytes, snapshot + part.nbytes
                continue
            capacity, bytes = _buffer(part)
            if isinstance(part, SlidingKVCache) and part.slack != ALL:
                window = part.window + part.slack
                held += int((window + max(STEP, step_size) + SLACK + part.sinks) * bytes / capacity)
                snapshot += (window + part.sinks) * bytes / capacity
            elif cache.quantization is not None and hasattr(part, "to_quantized"):
                row += bytes / capacity * _kept(cache.quantization, part.keys.itemsize)
                start += bytes / capacity * cache.quantization.start
            else:
                row += bytes / capacity
        most = cache.max_snapshots + MOST_KEPT if copies else 0
        return cls(held + int(most * snapshot), row, int(start), copies)


def _parts(cache: PromptCache) -> Iterator[Any]:
    yield from cache.target_cache.parts()
    parts = getattr(cache.drafter_cache, "parts", None)
    if parts is not None:
        yield from parts()


def _buffer(part: Any) -> tuple[int, int]:
    """Returns the rows and bytes of a cache's buffers."""
    arrays = [array for _, array in tree_flatten([part.keys, part.values])]
    return arrays[0].shape[-2], sum(array.nbytes for array in arrays)


def _kept(quantization: KVQuantization, itemsize: int) -> float:
    """Returns what is left of a value's bytes: its bits, and its share of a scale and a bias."""
    return (quantization.bits / 8 + 2 * itemsize / quantization.group_size) / itemsize
