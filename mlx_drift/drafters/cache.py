"""What a drafter's attention reads: the two caches behind one `attend`.

A drafter's layers project queries, keys and values and hand them to the cache, which knows the
positions (`offset`) and what may be seen. `ChainCache` is decoding; `TrainTimeTestCache` is the
teacher-forced chain of every position at once. The layers are the same code in both.

What they attend with is a fused kernel that keeps no weights. `weights` tells them afterwards, by
plain operations in float32: for measuring (`mlx_drift.watch.observe`), decoding does not
ask.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlx_drift.target.sliding import ALL, SlidingKVCache


class ChainCache:
    """Keys and values of committed rows and, within a round, of the chain that grows from them.

    All rows are kept, so that a conversation can go back to any of them; a window narrows what is
    read.

    Args:
        window: Key j is visible to query i while i − j < window; None for all keys.
        sinks: The first rows, which stay visible beyond the window.
    """

    def __init__(self, window: int | None = None, sinks: int = 0):
        self.window = window
        self.sinks = sinks
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

    def weights(self, queries: mx.array, scale: float) -> mx.array:
        """Returns what the rows appended last attend to.

        Args:
            queries: Theirs, as `attend` was given them, or those of the last M of them.
            scale: Factor of the scores.

        Returns:
            `[heads, M, offset]` float32: a column for every row in the cache, 0 if it is not seen.
        """
        key, row = mx.arange(self.offset), mx.arange(self.offset - queries.shape[2], self.offset)
        distance = row[:, None] - key
        visible = distance >= 0
        if self.window is not None:
            visible = visible & ((distance < self.window) | (key < self.sinks))
        return weigh(queries, self.rows.keys[..., : self.offset, :], visible, scale)


class TrainTimeTestCache:
    """The chain of all L positions at once, as EAGLE-3 trains it (paper §2 "TTT").

    At step j the query of row i, at position i + j, attends causally to the keys of step 0 and
    only to its own key, the diagonal, of each step 1 … j (SafeAILab/EAGLE
    `traineagle3/cnets.py` L253–305). A window is anchored at row i, as in training.

    Args:
        window: Key j is visible to query i while i − j < window; None for all keys.
        recompute: Attend once more for the gradients instead of keeping all weights.
    """

    def __init__(self, window: int | None = None, recompute: bool = False):
        self.window = window
        self.recompute = recompute
        self.rows = TrainTimeTestRows(window)
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
        attend = recomputed(self._attend) if self.recompute else self._attend
        return attend(queries * scale, *self._keys, *self._values)

    def _attend(self, queries: mx.array, *keys_and_values: mx.array) -> mx.array:
        """Attends with scaled queries: a function of its arguments alone.

        The softmax is taken apart: nothing of L × L is cut up or put together, for the gradients of
        which there would be as many copies as steps.
        """
        steps = len(keys_and_values) // 2
        keys, values = keys_and_values[:steps], keys_and_values[steps:]
        causal, own = self._scores(queries, keys)
        scores = [causal, *own]
        tops = [mx.stop_gradient(score.max(-1, keepdims=True)) for score in scores]
        top = functools.reduce(mx.maximum, tops)
        weights = [mx.exp((score - top).astype(mx.float32)) for score in scores]
        total = functools.reduce(mx.add, [weight.sum(-1, keepdims=True) for weight in weights])
        output = weights[0].astype(queries.dtype) @ values[0][:, :, None]
        for weight, v in zip(weights[1:], values[1:], strict=True):
            output = output + weight * v[:, :, None]
        return (output / total).astype(queries.dtype).reshape(queries.shape)

    def weights(self, queries: mx.array, scale: float) -> mx.array:
        """Returns what the rows of the last step attend to.

        Args:
            queries: Theirs, as `attend` was given them.
            scale: Factor of the scores.

        Returns:
            `[heads, L, L + j]` float32: the rows of step 0, then the row's own keys of the steps
            1 … j.
        """
        return self._weigh(queries.astype(mx.float32) * scale, self._keys).flatten(0, 2)

    def _weigh(self, queries: mx.array, keys: Sequence[mx.array]) -> mx.array:
        """Weighs all keys for scaled queries of one step: `[1, kv_heads, groups, L, L + j]`."""
        causal, own = self._scores(queries, keys)
        return mx.softmax(mx.concatenate([causal, *own], axis=-1), axis=-1, precise=True)

    def _scores(
        self, queries: mx.array, keys: Sequence[mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        """Returns the scores of step 0's keys `[1, kv_heads, groups, L, L]` and of a row's own."""
        rows = queries.shape[2]
        grouped = _grouped(queries, keys[0])
        causal = grouped @ keys[0][:, :, None].swapaxes(-1, -2)
        i, j = mx.arange(rows)[:, None], mx.arange(rows)[None]
        visible = (j <= i) if self.window is None else (j <= i) & (i - j < self.window)
        own = [(grouped * k[:, :, None]).sum(-1, keepdims=True) for k in keys[1:]]
        return mx.where(visible, causal, -mx.inf), own


class TrainTimeTestRows:
    """The same chain for a block of mlx-lm's, which attends by itself: a cache and a mask for it.

    All steps' rows stand one after another, so a step of L rows sees j·L others by way of a mask:
    more work than the diagonals are, but it suits any attention.
    """

    def __init__(self, window: int | None = None):
        self.window = window
        self.offset = 0
        self._keys: list[mx.array] = []
        self._values: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends one step's keys and values `[1, heads, L, width]` and returns those of all."""
        self.offset += 1
        self._keys.append(keys)
        self._values.append(values)
        return mx.concatenate(self._keys, axis=2), mx.concatenate(self._values, axis=2)

    def make_mask(self, rows: int, **options: object) -> mx.array:
        """Returns what the rows of the step to come see, `[L, (j + 1)·L]`."""
        i, j = mx.arange(rows)[:, None], mx.arange(rows)[None]
        causal = (j <= i) if self.window is None else (j <= i) & (i - j < self.window)
        return mx.concatenate([causal, *[i == j] * self.offset], axis=-1)

    def seen(self, weights: mx.array) -> mx.array:
        """Leaves out of weights `[heads, L, (j + 1)·L]` what no row sees: `[heads, L, L + j]`."""
        by_step = mx.unflatten(weights, -1, (-1, weights.shape[1]))  # [heads, L, j + 1, L]
        own = mx.diagonal(by_step[:, :, 1:], axis1=1, axis2=3)
        return mx.concatenate([by_step[:, :, 0], own.swapaxes(1, 2)], axis=-1)


def weigh(queries: mx.array, keys: mx.array, visible: mx.array, scale: float) -> mx.array:
    """Weighs keys for queries, by plain operations: `[heads, M, keys]` float32.

    Args:
        queries: `[1, heads, M, head_dim]`.
        keys: `[1, kv_heads, N, head_dim]`.
        visible: Which are seen, `[M, N]` bool.
        scale: Factor of the scores.
    """
    grouped = _grouped(queries.astype(mx.float32) * scale, keys)
    scores = mx.where(visible, grouped @ keys[:, :, None].swapaxes(-1, -2), -mx.inf)
    return mx.softmax(scores, axis=-1).flatten(0, 2)


def recomputed(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Lets a function of arrays keep nothing for its gradients but its arguments.

    As `mx.checkpoint`, but all gradients are computed at once: one that is wanted only at the end
    would keep what it is made of until then.
    """
    checkpointed: Any = mx.custom_function(function)

    @checkpointed.vjp  # type: ignore[untyped-decorator]
    def gradients(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> Any:
        again = mx.depends(list(primals), [cotangent])
        _, found = mx.vjp(function, again, [cotangent])
        return tuple(mx.depends(found, found))

    return checkpointed


def _grouped(queries: mx.array, keys: mx.array) -> mx.array:
    """Puts the heads that share keys side by side: `[1, kv_heads, groups, M, head_dim]`."""
    batch, heads, rows, width = queries.shape
    return queries.reshape(batch, keys.shape[1], heads // keys.shape[1], rows, width)
