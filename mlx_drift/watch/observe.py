"""Watches the chains of a drafter: what they recycle and what they attend to.

Nothing is hooked into the drafter: its network is put into one that notes what passes, the caches
into ones that, after they have attended as always, tell the weights (`ChainCache.weights`). So the
tokens are the same, bit for bit, and a drafter that nobody watches pays nothing.

The block of an MTP head attends by itself, by the function that all of mlx-lm's model files attend
with. In a file whose block is watched, that function is put into one that tells a watched cache of
its queries and keys, and does for all others what it did.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import mlx.core as mx

from mlx_drift.drafters.cache import TrainTimeTestCache
from mlx_drift.drafters.chain import Network
from mlx_drift.watch.around import Around

ATTENTION = "scaled_dot_product_attention"


@dataclass
class Step:
    """What was seen of one step, lazy.

    Attributes:
        states: The recycled states of its last rows, `[M, H]`.
        weights: What these rows attend to: `[heads, M, keys]` float32 for each layer.
    """

    states: mx.array
    weights: list[mx.array] = field(default_factory=list)


@dataclass
class Chain:
    """One chain as observed: a block of committed rows, and the drafts behind it.

    Attributes:
        taps: Of the last committed rows, `[M, A, T]`.
        fused: What the first step got for them, `[M, H]`.
        steps: The steps. The rows of the first are the committed ones; its last is the one whose
            chain goes on.
    """

    taps: mx.array
    fused: mx.array
    steps: list[Step] = field(default_factory=list)


class Observed(Around):
    """A network that is watched.

    A pass over fused taps starts a chain, all others continue it: so `ChainDrafter` calls it in
    rounds (`ingest`, then `propose`) and in the teacher-forced chain.

    Args:
        inner: The network.
        rows: How many of the last rows of a block to watch.
    """

    def __init__(self, inner: Network, rows: int):
        super().__init__(inner)
        self.rows = rows
        self._chains: list[Chain] = []
        for layer in inner.layers:
            _listen(sys.modules[type(layer.self_attn).__module__])

    def take(self) -> list[Chain]:
        """Returns the chains that are over, the oldest first, and forgets them."""
        over = self._chains[:-1]
        self._chains = self._chains[-1:]
        return over

    def take_last(self) -> Chain:
        """Returns the chain that came last, and forgets all."""
        chain = self._chains[-1]
        self._chains = []
        return chain

    def fuse(self, taps: mx.array) -> mx.array:
        """Fuses taps `[M, A, T]` into the hidden state of a chain's first step, `[M, H]`."""
        fused = self.inner.fuse(taps)
        self._chains.append(Chain(taps[-self.rows :], fused[-self.rows :]))
        return fused

    def __call__(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Any]
    ) -> tuple[mx.array, mx.array]:
        """Runs M rows of one step: the states for the head and those to recycle, `[M, H]`."""
        watched = [WatchedCache(cache, self.rows) for cache in caches]
        normed, states = self.inner(embedding, hidden, watched)
        weights = [cache.weights for cache in watched]
        self._chains[-1].steps.append(Step(states[-self.rows :], weights))
        return normed, states


class WatchedCache:
    """A cache that reports attention weights.

    Args:
        cache: A `ChainCache` or a `TrainTimeTestCache`.
        watched: How many of the last rows to watch.

    Attributes:
        weights: Those of the last call, `[heads, M, keys]` float32.
    """

    weights: mx.array

    def __init__(self, cache: Any, watched: int):
        self._cache = cache
        self._watched = watched

    @property
    def offset(self) -> int:
        """The position of the next row."""
        return self._cache.offset

    @property
    def rows(self) -> "WatchedRows":
        """What a block that attends by itself appends to."""
        return WatchedRows(self._cache.rows, self)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Attends as the cache inside does; shapes as there."""
        output = self._cache.attend(queries, keys, values, scale)
        self.weights = self._cache.weights(queries[:, :, -self._watched :], scale)
        return output

    def tell(self, queries: mx.array, keys: mx.array, scale: float, mask: mx.array | None) -> None:
        """Notes what a block attends to.

        Args:
            queries: `[1, heads, M, width]`.
            keys: `[1, kv_heads, N, width]`, those of its rows included.
            scale: Factor of the scores.
            mask: What is added to them, or which are seen; a last pair of axes of `[M, N]`.
        """
        queries, keys = queries.astype(mx.float32), keys.astype(mx.float32)
        groups = queries.shape[1] // keys.shape[1]
        scores = scale * queries @ mx.repeat(keys, groups, axis=1).swapaxes(-1, -2)
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
        weights = mx.softmax(scores[0], axis=-1)
        if isinstance(self._cache, TrainTimeTestCache):
            weights = self._cache.rows.seen(weights)
        elif (hidden := self._cache.offset - keys.shape[2]) > 0:  # behind the window
            gap = mx.zeros((*weights.shape[:2], hidden))
            sinks = self._cache.sinks
            weights = mx.concatenate([weights[..., :sinks], gap, weights[..., sinks:]], axis=-1)
        self.weights = weights[:, -self._watched :]


class WatchedRows:
    """The rows of a watched cache, as a block of mlx-lm's sees them.

    Args:
        rows: A cache of mlx-lm's kind.
        cache: Who is told.
    """

    def __init__(self, rows: Any, cache: WatchedCache):
        self._rows = rows
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        """Does what the rows do."""
        return getattr(self._rows, name)


def _listen(module: Any) -> None:
    """Makes a model file's attention tell watched caches; others it serves as before."""
    attend = getattr(module, ATTENTION, None)
    if attend is None or hasattr(attend, "tells"):  # our own layers attend by their cache
        return

    @wraps(attend)
    def tells(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: Any,
        **others: Any,
    ) -> mx.array:
        if isinstance(cache, WatchedRows):
            cache.cache.tell(queries, keys, scale, mask)
        return attend(queries, keys, values, cache=cache, scale=scale, mask=mask, **others)

    vars(tells)["tells"] = True
    setattr(module, ATTENTION, tells)
