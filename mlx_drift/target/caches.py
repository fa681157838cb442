"""Target caches that can take rows back exactly.

Notable:
- The last rows: keys and values are trimmed (`mlx_drift.target.sliding` where a window slides), a
  recurrent layer is called anew on those that stay (`mlx_drift.target.recurrent`).
- Further back, to a turn of a conversation: `mlx_drift.target.rewind`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlx_drift.target.recurrent import Consumed, recurrent
from mlx_drift.target.rewind import Caches, parts
from mlx_drift.target.sliding import SlidingKVCache
from mlx_drift.target.tree import compact

TRIMMED = (KVCache, QuantizedKVCache, ChunkedKVCache)
"""Caches of which `trim` takes the last rows back exactly."""

NOT_EXACT = {
    "plamo3": "in a block a row sees one key more than alone",
}
"""Model types whose own rows differ between a block and single rows beyond rounding, and why."""


@dataclass(frozen=True)
class KVQuantization:
    """How keys and values are quantized, as in mlx-lm (`kv_bits` and what goes with it).

    Attributes:
        bits: Bits a value.
        group_size: Values that share a scale and a bias.
        start: From how many rows on.
    """

    bits: int
    group_size: int = 64
    start: int = DEFAULT_QUANTIZED_KV_START


class TargetCache(Caches):
    """One mlx-lm cache a layer, and what it takes to go back.

    Attributes:
        quantization: Whether and how keys and values are quantized.
        rows: How many rows were fed last.
        branched: Whether they were a tree's: then recurrent states are as before them.
        consumed: What each recurrent layer was given for them.
    """

    def __init__(self, caches: list[Any], quantization: KVQuantization | None = None):
        super().__init__(caches)
        self.quantization = quantization
        self.rows, self.branched = 0, False
        self.consumed: list[Consumed] = []
        self._sliding = [part for part in self.parts() if isinstance(part, SlidingKVCache)]

    @property
    def room(self) -> int:
        """How many rows one block may have if all its rows are to see what single rows would.

        mlx-lm quantizes all keys and values after the first row at or past the start.
        """
        if self.quantization is None:
            return sys.maxsize
        plain = [self.quantization.start - c.offset for c in self if hasattr(c, "to_quantized")]
        return max(1, min(plain)) if plain else sys.maxsize

    def quantize(self) -> None:
        """Quantizes keys and values where that is due, as mlx-lm does after each of its steps."""
        q = self.quantization
        if q is not None and any(getattr(cache, "offset", 0) for cache in self):
            maybe_quantize_kv_cache(self, q.start, q.group_size, q.bits)

    def let_sinks_fade(self, fade: bool) -> None:
        """Sets whether blocks to come see sinks as mlx-lm's prompts do, or as single rows do."""
        for part in self._sliding:
            part.sinks_fade = fade

    def rollback(self, back: int) -> None:
        """Takes back the last `back` of the rows that were fed last, once."""
        self.keep(range(self.rows - back))

    def keep(self, path: Sequence[int]) -> None:
        """Keeps of the rows that were fed last those of a path, as if only they had been fed, once.

        Args:
            path: Which of them, in ascending order; all but the first ones of a chain take caches
                that are `BRANCHING`.
        """
        rows, back = self.rows, self.rows - len(path)
        if not (back or self.branched):
            return
        is_chain = path == range(len(path))
        replayed = {id(state) for note in self.consumed for state, _ in note.states}
        for cache in self:
            again = bool(replayed) and any(id(state) in replayed for state in recurrent(cache))
            for part in parts(cache):
                if isinstance(part, ArraysCache):
                    continue
                if not is_chain:
                    compact(part, part.offset - rows, path)
                part.trim(rows if again else back)  # what is called anew appends anew
        for note in self.consumed:
            note.replay(rows, path)

    def can_return_to(self, rows: int) -> bool:
        """Tells whether keys and values were quantized at `rows` rows as they are now."""
        if self.quantization is None or rows >= self.quantization.start:
            return True
        return not any(isinstance(part, QuantizedKVCache) for part in self)


def exact(cache: Any) -> Any:
    """Returns a cache that can take rows back in place of mlx-lm's; None if there is none."""
    if type(cache) is RotatingKVCache:
        return SlidingKVCache(cache.max_size, cache.keep)
    if type(cache) is CacheList:
        inner = [exact(part) for part in cache.caches]
        return None if None in inner else CacheList(*inner)
    return cache if type(cache) in (*TRIMMED, ArraysCache) else None
