"""What a drafter's attention reads: the two caches behind one `attend`.

A drafter's layers project queries, keys and values and hand them to the cache, which knows the
positions (`offset`) and what may be seen. `ChainCache` is decoding; `TrainTimeTestCache` is the
teacher-forced chain of every position at once. The layers are the same code in both.
"""

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlx_drift.sliding import ALL, SlidingKVCache


class ChainCache:
    """Keys and values of committed rows and, within a round, of the chain that grows from them.

    All rows are kept, so that a conversation can go back to any of them; a window narrows what is
    read.

    Args:
        window: Key j is visible to query i while i − j < window; None for all keys.
        sinks: The first rows, which stay visible beyond the window.
    """

    def __init__(self, window: int | None = None, sinks: int = 0):
        self.rows = KVCache() if window is None else SlidingKVCache(window + sinks, sinks, ALL)

    @property
    def offset(self) -> int:
        """How many rows it holds: the position of the next one."""
        return self.rows.offset

    def trim(self, rows: int) -> None:
        """Takes back the last rows."""
        self.rows.trim(rows)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Appends the rows and attends causally.

        Args:
            queries: `[1, heads, M, head_dim]`, rotated at positions `offset …`.
            keys: `[1, kv_heads, M, head_dim]`, rotated likewise.
            values: `[1, kv_heads, M, head_dim]`.
            scale: Factor of the scores.

        Returns:
            `[1, heads, M, head_dim]`.
        """
        mask = self.rows.make_mask(queries.shape[2], return_array=False, window_size=None)
        keys, values = self.rows.update_and_fetch(keys, values)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


class TrainTimeTestCache:
    """The chain of all L positions at once, as EAGLE-3 trains it (paper §2 "TTT").

    At step j the query of row i, at position i + j, attends causally to the keys of step 0 and
    only to its own key, the diagonal, of each step 1 … j (SafeAILab/EAGLE
    `traineagle3/cnets.py` L253–305). A window is anchored at row i, as in training.
    """

    def __init__(self, window: int | None = None):
        self.window = window
        self._keys: list[mx.array] = []
        self._values: list[mx.array] = []

    @property
    def offset(self) -> int:
        """The position of row 0 in the step to come: one more each step."""
        return len(self._keys)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Appends one step and attends; shapes as in `ChainCache.attend`, M = L."""
        self._keys.append(keys)
        self._values.append(values)
        batch, heads, rows, width = queries.shape
        groups = (batch, keys.shape[1], heads // keys.shape[1], rows, width)
        queries = (queries * scale).reshape(groups)

        causal = queries @ self._keys[0][:, :, None].swapaxes(-1, -2)
        i, j = mx.arange(rows)[:, None], mx.arange(rows)[None]
        visible = (j <= i) if self.window is None else (j <= i) & (i - j < self.window)
        causal = mx.where(visible, causal, -mx.inf)
        own = [(queries * k[:, :, None]).sum(-1, keepdims=True) for k in self._keys[1:]]

        weights = mx.softmax(mx.concatenate([causal, *own], axis=-1), axis=-1, precise=True)
        output = weights[..., :rows] @ self._values[0][:, :, None]
        for step, v in enumerate(self._values[1:]):
            output = output + weights[..., rows + step, None] * v[:, :, None]
        return output.reshape(batch, heads, rows, width)
