"""Interventions in a trained drafter's chain: what would it do if its states were others?

Each is a network around the drafter's own, so weights and code of the drafter stay as they are. The
target verifies as always: what is generated does not change, only how much of it was drafted.

Definitions, where the paper (arXiv 2605.09992) leaves them open:
- `pin` (paper Table 4, reference §4.5) rescales what a step recycles, row by row, to the RMS of the
  fused input that the chain started from. The head reads the step's state unscaled.
- `normalize` divides what a step recycles by its RMS, without gains. For a drafter that recycles
  normed states (`feedback = "post"`) it takes the gains' effect on the size away, no more.
- `noise-hidden:α` and `noise-embedding:α` (paper Table 3, reference §4.4) add Gaussian noise of the
  standard deviation α·RMS(x), element by element, to what the network reads: the hidden state
  (fused or recycled) or the embedding, in every row of every pass, the prompt's included. What is
  measured is what the network hands out, before noise is added to it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_drift.drafters.chain import ChainDrafter, Network
from mlx_drift.errors import DriftError
from mlx_drift.watch.around import Around, root_mean_square

NOISE = "noise-hidden", "noise-embedding"
EXPECTED = "pin, normalize, noise-hidden:ALPHA or noise-embedding:ALPHA"

Intervention = Callable[[ChainDrafter, int], ChainDrafter]
"""Puts a drafter's network into one that meddles; the number is a seed."""


class Pinned(Around):
    """Recycles states of the RMS that the fused input had."""

    def fuse(self, taps: mx.array) -> mx.array:
        """Fuses taps `[M, A, T]`, and remembers the RMS of each row."""
        fused = self.inner.fuse(taps)
        self._rms = root_mean_square(fused)
        return fused

    def __call__(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Any]
    ) -> tuple[mx.array, mx.array]:
        """Runs M rows of one step; a chain's one row goes on from the last of a block."""
        normed, states = self.inner(embedding, hidden, caches)
        factor = self._rms[-states.shape[0] :] / root_mean_square(states)
        return normed, states * factor.astype(states.dtype)


class Normalized(Around):
    """Recycles states of RMS 1.

    Args:
        inner: The network.
        eps: Keeps the norm from dividing by 0, as the drafter's own norms do.
    """

    def __init__(self, inner: Network, eps: float):
        super().__init__(inner)
        self.eps = eps

    def __call__(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Any]
    ) -> tuple[mx.array, mx.array]:
        """Runs M rows of one step."""
        normed, states = self.inner(embedding, hidden, caches)
        return normed, mx.fast.rms_norm(states, None, self.eps)


class Noisy(Around):
    """Reads its hidden states or embeddings through noise.

    Args:
        inner: The network.
        alpha: The noise's standard deviation, in parts of the RMS of what it is added to.
        on_embedding: Add it to the embeddings, not to the hidden states.
        seed: Makes it reproducible.
    """

    def __init__(self, inner: Network, alpha: float, on_embedding: bool, seed: int):
        super().__init__(inner)
        self.alpha = alpha
        self.on_embedding = on_embedding
        self._key = mx.random.key(seed)

    def __call__(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Any]
    ) -> tuple[mx.array, mx.array]:
        """Runs M rows of one step."""
        if self.on_embedding:
            embedding = self._disturbed(embedding)
        else:
            hidden = self._disturbed(hidden)
        return self.inner(embedding, hidden, caches)

    def _disturbed(self, x: mx.array) -> mx.array:
        self._key, key = mx.random.split(self._key)
        noise = self.alpha * root_mean_square(x) * mx.random.normal(x.shape, key=key)
        return x + noise.astype(x.dtype)


def intervention(text: str) -> Intervention:
    """Reads what `--intervene` says.

    Raises:
        DriftError: If it is no intervention.
    """
    name, colon, number = text.partition(":")
    if text == "pin":
        return lambda drafter, seed: drafter.through(Pinned(drafter.network))
    if text == "normalize":
        return lambda drafter, seed: drafter.through(
            Normalized(drafter.network, drafter.config.rms_norm_eps)
        )
    try:
        alpha = float(number) if name in NOISE and colon else math.nan
    except ValueError:
        alpha = math.nan
    if not 0 <= alpha < math.inf:
        raise DriftError(f"--intervene {text}: expected {EXPECTED}, with ALPHA at least 0")
    return lambda drafter, seed: drafter.through(
        Noisy(drafter.network, alpha, name == "noise-embedding", seed)
    )
