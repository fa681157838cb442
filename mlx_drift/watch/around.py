"""A network around another one: how a chain is observed, or meddled with, and stays what it is."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.chain import Network


class Around(nn.Module):
    """Does what the network inside it does; to be given to `ChainDrafter.through`.

    Unlike a network of its own it may remember the chain under way, so it serves one conversation.

    Args:
        inner: The network it is around.
    """

    def __init__(self, inner: Network):
        super().__init__()
        self.inner = inner

    @property
    def layers(self) -> list[Any]:
        """The layers of the network inside."""
        return self.inner.layers

    def fuse(self, taps: mx.array) -> mx.array:
        """Fuses taps `[M, A, T]` into the hidden state of a chain's first step, `[M, H]`."""
        return self.inner.fuse(taps)

    def __call__(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Any]
    ) -> tuple[mx.array, mx.array]:
        """Runs M rows of one step: the states for the head and those to recycle, `[M, H]`."""
        return self.inner(embedding, hidden, caches)


def root_mean_square(x: mx.array) -> mx.array:
    """Returns ‖x‖₂/√d of vectors `[…, d]`, in float32: `[…, 1]` (paper §3)."""
    return mx.sqrt(x.astype(mx.float32).square().mean(axis=-1, keepdims=True))
