"""Target caches that can take rows back exactly.

Notable:
- `SlidingKVCache` stands in for mlx-lm's `RotatingKVCache`, which can no longer be trimmed once its
  window has wrapped. It appends instead of rotating, hands out the last window, and drops older
  rows when its buffer is full, never more than a rollback of the last rows could need.
- A recurrent layer's state cannot be trimmed. Its layer is called anew on the accepted rows, from
  the state before them: MLX is lazy, so of the layer only what the state needs is computed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlx_drift.errors import DriftError

TRIMMED = (KVCache, QuantizedKVCache, ConcatenateKVCache, ChunkedKVCache)
"""Caches of which `trim` takes rows back exactly."""

NOT_EXACT = {
    "plamo3": "in a block a row sees one key more than alone",
}
"""Model types whose own rows differ between a block and single rows beyond rounding, and why."""

STEP = 256  # rows by which a buffer grows


class SlidingKVCache(KVCache):
    """Keys and values of the last `window` rows, and of the rows being fed.

    It holds at most window − 1 rows and those of the longest update, or `STEP` if that is more.

    Args:
        window: Key j is visible to query i while i − j < window.
    """

    def __init__(self, window: int):
        super().__init__()
        self.keys: Any
        self.values: Any
        self.window = window
        self._first = 0  # the row at the buffer's start

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends rows `[B, heads, n, width]`; returns them behind the window − 1 rows before."""
        rows = keys.shape[2]
        used = self.offset - self._first
        if self.keys is None or used + rows > self.keys.shape[2]:
            kept = min(used, self.window - 1)
            grown = max(STEP, rows)
            self.keys = self._moved(self.keys, keys, used, kept, grown)
            self.values = self._moved(self.values, values, used, kept, grown)
            self._first, used = self.offset - kept, kept
        self.keys[..., used : used + rows, :] = keys
        self.values[..., used : used + rows, :] = values
        self.offset += rows
        return self._last(used + rows, rows)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Returns what a row that is fed next may see, and itself not yet."""
        return self._last(self.offset - self._first, 1)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Makes the mask of N rows over what `update_and_fetch` returns for them."""
        window = window_size or self.window
        before = min(self.offset, self.window - 1)
        if before + N > window or return_array:
            return create_causal_mask(N, before, window_size=window)
        return None if N == 1 else "causal"

    def size(self) -> int:
        """Returns how many rows are visible."""
        return min(self.offset, self.window)

    def _last(self, used: int, rows: int) -> tuple[mx.array, mx.array]:
        start = max(0, used - (self.window - 1 + rows))
        return self.keys[..., start:used, :], self.values[..., start:used, :]

    def _moved(
        self, buffer: mx.array | None, new: mx.array, used: int, kept: int, grown: int
    ) -> mx.array:
        batch, heads, _, width = new.shape
        free = mx.zeros((batch, heads, grown, width), new.dtype)
        if buffer is None or not kept:
            return free
        return mx.concatenate([buffer[..., used - kept : used, :], free], axis=2)


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
                "cannot be called anew to take rejected drafts back. Use another target, or "
                "generate without a drafter (--no-draft)"
            )
        # Recurrent layers bind new arrays, so a reference keeps the state that was.
        return cls(call, arguments, keywords, [(state, list(state.cache)) for state in states])

    def replay(self, rows: int, kept: int) -> None:
        """Puts the state as if only the first `kept` of `rows` rows had been fed."""
        for state, arrays in self.states:
            state.cache = list(arrays)
        if kept:
            self.call(
                *(_first_rows(value, rows, kept) for value in self.arguments),
                **{name: _first_rows(value, rows, kept) for name, value in self.keywords.items()},
            )


class TargetCache(list[Any]):
    """One mlx-lm cache a layer, and what it takes to undo the last rows.

    Attributes:
        rows: How many rows were fed last.
        consumed: What each recurrent layer was given for them.
    """

    def __init__(self, caches: list[Any]):
        super().__init__(caches)
        self.rows = 0
        self.consumed: list[Consumed] = []

    @property
    def recurrent_states(self) -> list[mx.array]:
        """The states of recurrent layers, which a rollback leaves lazy."""
        states = [state for cache in self for state in recurrent(cache)]
        return [array for state in states for array in state.cache if array is not None]

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


def exact(cache: Any) -> Any:
    """Returns a cache that can take rows back in place of mlx-lm's; None if there is none."""
    if type(cache) is RotatingKVCache:
        return SlidingKVCache(cache.max_size) if cache.keep == 0 else None
    if type(cache) is CacheList:
        inner = [exact(part) for part in cache.caches]
        return None if None in inner else CacheList(*inner)
    return cache if type(cache) in (*TRIMMED, ArraysCache) else None


def parts(cache: Any) -> Iterator[Any]:
    """Yields a cache, or what a list of caches holds."""
    if isinstance(cache, CacheList):
        for inner in cache.caches:
            yield from parts(inner)
    else:
        yield cache


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
