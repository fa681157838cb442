"""Watches the chains of a drafter: what they recycle and what they attend to.

Nothing is hooked into the drafter: its network is put into one that notes what passes, the caches
into ones that, after they have attended as always, tell the weights (`ChainCache.weights`). So the
tokens are the same, bit for bit, and a drafter that nobody watches pays nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_drift.drafters.chain import Network
from mlx_drift.measure.around import Around


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
    """What was seen of one chain: a block of committed rows, and what was drafted behind it.

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
    """A cache that tells what was attended to.

    Args:
        cache: A `ChainCache` or a `TrainTimeTestCache`.
        rows: How many of the last rows to watch.

    Attributes:
        weights: Those of the last call, `[heads, M, keys]` float32.
    """

    weights: mx.array

    def __init__(self, cache: Any, rows: int):
        self._cache = cache
        self._rows = rows

    @property
    def offset(self) -> int:
        """The position of the next row."""
        return self._cache.offset

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Attends as the cache inside does; shapes as there."""
        output = self._cache.attend(queries, keys, values, scale)
        self.weights = self._cache.weights(queries[:, :, -self._rows :], scale)
        return output
