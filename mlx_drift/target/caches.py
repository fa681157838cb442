"""Target caches that can take rows back exactly.

Notable:
- The last rows: keys and values are trimmed (`mlx_drift.target.sliding` where a window slides). A
  recurrent layer's state cannot be. Its layer is called anew on the accepted rows, from the state
  before them: MLX is lazy, so of the layer only what the state needs is computed.
- Further back, to a turn of a conversation: `mlx_drift.target.rewind`.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import mlx.core as mx
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlx_drift.errors import DriftError
from mlx_drift.target.rewind import Caches, parts
from mlx_drift.target.sliding import SlidingKVCache
from mlx_drift.target.tree import compact

TRIMMED = (KVCache, QuantizedKVCache, ChunkedKVCache)
"""Caches of which `trim` takes the last rows back exactly."""

INSTEAD = "Use another target, or generate without a drafter (--no-draft)"
"""What to do with a target that is refused."""

NOT_EXACT = {
    "plamo3": "in a block a row sees one key more than alone",
}
"""Model types whose own rows differ between a block and single rows beyond rounding, and why."""

REPLAYED = (mx.array, ArraysCache, CacheList, str, int, float, NoneType)
"""What a recurrent layer may be handed to be called anew on fewer rows."""


@dataclass(frozen=True)
class Consumed:
    """What one recurrent layer was given for the last rows, and its states before them."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    states: list[tuple[ArraysCache, list[mx.array | None]]]

    @classmethod
    def of(
        cls, call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> "Consumed | None":
        """Notes a call of a layer, the first argument, if it is handed a recurrent state.

        Raises:
            DriftError: If it is also handed something that cannot be cut to fewer rows.
        """
        given = [*arguments[1:], *keywords.values()]
        states = [state for argument in given for state in recurrent(argument)]
        if not states:
            return None
        if unknown := [value for value in given if not isinstance(value, REPLAYED)]:
            raise DriftError(
                f"the target hands its recurrent layers a {type(unknown[0]).__name__}, so they "
                f"cannot be called anew to take rejected drafts back. {INSTEAD}"
            )
        # Recurrent layers bind new arrays, so a reference keeps the state that was.
        return cls(call, arguments, keywords, [(state, list(state.cache)) for state in states])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Consumed":
        """Copies the note for copied caches: theirs are put back, the layer is the same."""

        def copied(value: Any) -> Any:
            is_cache = isinstance(value, ArraysCache | CacheList)
            return copy.deepcopy(value, memo) if is_cache else value

        return Consumed(
            self.call,
            tuple(map(copied, self.arguments)),
            {name: copied(value) for name, value in self.keywords.items()},
            [(copied(state), list(arrays)) for state, arrays in self.states],
        )

    def replay(self, rows: int, kept: int) -> None:
        """Puts the state as if only the first `kept` of `rows` rows had been fed."""
        for state, arrays in self.states:
            state.cache = list(arrays)
        if kept:
            self.call(
                *(_first_rows(value, rows, kept) for value in self.arguments),
                **{name: _first_rows(value, rows, kept) for name, value in self.keywords.items()},
            )


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
        consumed: What each recurrent layer was given for them.
    """

    def __init__(self, caches: list[Any], quantization: KVQuantization | None = None):
        super().__init__(caches)
        self.quantization = quantization
        self.rows = 0
        self.consumed: list[Consumed] = []

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
        for part in self.parts():
            if isinstance(part, SlidingKVCache):
                part.sinks_fade = fade

    def rollback(self, back: int) -> None:
        """Takes back the last `back` of the rows that were fed last, once."""
        if not back:
            return
        rows = self.rows
        replayed = {id(state) for note in self.consumed for state, _ in note.states}
        for cache in self:
            again = any(id(state) in replayed for state in recurrent(cache))
            for part in parts(cache):
                if not isinstance(part, ArraysCache):
                    part.trim(rows if again else back)  # what is called anew appends anew
        for note in self.consumed:
            note.replay(rows, rows - back)

    def keep(self, path: Sequence[int]) -> None:
        """Keeps of the rows that were fed last those of a path, as if only they had been fed.

        Args:
            path: Which of them, in ascending order; all but the first ones of a chain take caches
                that are `BRANCHING`.
        """
        if path != range(len(path)):
            for part in self.parts():
                compact(part, part.offset - self.rows, path)
        self.rollback(self.rows - len(path))

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


def recurrent(value: Any) -> list[ArraysCache]:
    """Returns the recurrent states that a value is or holds."""
    if not isinstance(value, ArraysCache | CacheList):
        return []
    return [part for part in parts(value) if isinstance(part, ArraysCache)]


def _first_rows(value: Any, rows: int, kept: int) -> Any:
    """Cuts an argument of a layer to its first rows: `[1, M, …]`, or a mask `[…, M, keys]`."""
    if not isinstance(value, mx.array) or value.ndim < 2:
        return value
    if value.ndim > 2 and value.shape[1] == rows:
        return value[:, :kept]
    if value.shape[-2] == rows:
        return value[..., :kept, : value.shape[-1] - (rows - kept)]
    return value[..., :kept] if value.shape[-1] == rows else value
