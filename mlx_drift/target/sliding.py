"""A sliding window of keys and values that can take rows back.

mlx-lm's `RotatingKVCache` can no longer be trimmed once its window has wrapped. This one appends
instead of rotating, hands out the last window, and drops older rows when its buffer is full, never
more than taking back the last rows could need.
"""

import sys
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache

from mlx_drift.errors import DriftError

STEP = 256  # rows by which a buffer grows
ALL = sys.maxsize


class SlidingKVCache(KVCache):
    """Keys and values of the first rows, of the last ones, and of those being fed.

    It holds the sinks, at most window − 1 + slack rows, and those of the longest update, or `STEP`
    if that is more.

    Args:
        window: How many rows a row sees: the sinks, and the last ones up to itself.
        sinks: How many of the first rows stay visible (`keep` in mlx-lm).
        slack: How many rows may be taken back beyond those of the last update; `ALL` keeps all.

    Attributes:
        sinks_fade: In the updates to come, a row sees window − 1 buffered rows before it, sinks or
            not: what mlx-lm does in a block of several rows, hence in prompts.
        branched: How many rows before the updates to come are of the same tree as theirs, and no
            part of the text that their windows count back to (`mlx_drift.target.tree`).
        first: The row at the buffer's start.
    """

    def __init__(self, window: int, sinks: int = 0, slack: int = 0):
        super().__init__()
        self.keys: Any
        self.values: Any
        self.window = window
        self.sinks = sinks
        self.slack = slack
        self.sinks_fade = False
        self.branched = 0
        self.first = 0
        self._sunk: tuple[mx.array, ...] | None = None  # the sinks, once the buffer lost them

    @property
    def state(self) -> Any:
        """Its arrays, for `mx.eval`."""
        return self.keys, self.values, self._sunk

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends rows `[B, heads, n, width]`; returns them behind the rows they see."""
        rows = keys.shape[2]
        used = self.offset - self.first
        if self.keys is None or used + rows > self.keys.shape[2]:
            kept = min(used, self.window - 1 + self.slack)
            if self.sinks and self.first == 0 and kept < used:
                self._sunk = tuple(_own(array) for array in self._sinks())
            grown = max(STEP, rows)
            self.keys = self._moved(self.keys, keys, used, kept, grown)
            self.values = self._moved(self.values, values, used, kept, grown)
            self.first, used = self.offset - kept, kept
        self.keys[..., used : used + rows, :] = keys
        self.values[..., used : used + rows, :] = values
        self.offset += rows
        return self._visible(rows + self.branched)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Returns what a row that is fed next may see, and itself not yet."""
        return self._visible(0)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Makes the mask of N rows over what `update_and_fetch` returns for them.

        Raises:
            DriftError: If there are sinks and the model asks for a window of its own.
        """
        before = min(self.offset, self.window - 1)
        window = window_size or self.window
        if self.sinks and window < self.window:
            raise DriftError(
                f"the target has a sliding window of {window} rows of its own: a cache of "
                f"{self.window} rows (max_kv_size) with sinks cannot be masked as mlx-lm would. "
                "Leave max_kv_size out"
            )
        if before + N <= window and not return_array:
            return None if N == 1 else "causal"
        if self.sinks and not self.sinks_fade:
            row, key = mx.arange(before, before + N)[:, None], mx.arange(before + N)[None]
            recent = row - key < self.window - self.sinks
            return (key <= row) & (recent | (key < self.sinks))
        return create_causal_mask(N, before, window_size=window)

    def size(self) -> int:
        """Returns how many rows are visible."""
        return min(self.offset, self.window)

    @property
    def nbytes(self) -> int:
        """The bytes it holds."""
        return super().nbytes + sum(array.nbytes for array in self._sunk or ())

    def can_rewind(self, rows: int) -> bool:
        """Tells whether what row `rows` would see is still there."""
        return rows <= self.offset and (self.first == 0 or rows - self.first >= self.window - 1)

    def copy_visible(self) -> dict[str, mx.array]:
        """Copies what a row that is fed next may see."""
        used = self.offset - self.first
        start = max(0, used - (self.window - 1 + self.slack))
        arrays = {"keys": self.keys[..., start:used, :], "values": self.values[..., start:used, :]}
        if self.sinks and self.first + start > 0:
            arrays["sink_keys"], arrays["sink_values"] = self._sinks()
        return {name: _own(array) for name, array in arrays.items()}

    def put(self, arrays: dict[str, mx.array], rows: int) -> None:
        """Puts back what `copy_visible` copied when `rows` rows had been fed."""
        self.keys, self.values = arrays["keys"], arrays["values"]
        self.offset, self.first = rows, rows - self.keys.shape[2]
        has_sinks = "sink_keys" in arrays
        self._sunk = (arrays["sink_keys"], arrays["sink_values"]) if has_sinks else None

    def _visible(self, rows: int) -> tuple[mx.array, mx.array]:
        """What the last `rows` rows see; a row that is fed next, if there are none."""
        used = self.offset - self.first
        before = self.offset - rows
        if before <= self.window - 1:  # then the buffer holds every row
            return self.keys[..., :used, :], self.values[..., :used, :]
        start = used - rows - (self.window - 1 - self.sinks)
        keys, values = self.keys[..., start:used, :], self.values[..., start:used, :]
        if not self.sinks:
            return keys, values
        sink_keys, sink_values = self._sinks()
        return (
            mx.concatenate([sink_keys, keys], axis=2),
            mx.concatenate([sink_values, values], axis=2),
        )

    def _sinks(self) -> tuple[mx.array, ...]:
        if self.first > 0 and self._sunk is not None:
            return self._sunk
        return self.keys[..., : self.sinks, :], self.values[..., : self.sinks, :]

    def _moved(
        self, buffer: mx.array | None, new: mx.array, used: int, kept: int, grown: int
    ) -> mx.array:
        batch, heads, _, width = new.shape
        free = mx.zeros((batch, heads, grown, width), new.dtype)
        if buffer is None or not kept:
            return free
        return mx.concatenate([buffer[..., used - kept : used, :], free], axis=2)


def _own(array: mx.array) -> mx.array:
    """Copies a slice: a view would keep its whole buffer alive, and make the next write copy it."""
    return array + 0
