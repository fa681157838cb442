"""What chains recycle and attend to, added up over rounds.

Definitions, where the paper (arXiv 2605.09992; reference §3) leaves them open:

- *Step* k = 1 … K of a chain is the pass that drafts its k-th token. Step 1 is the pass that
  ingests the last committed token with the target's taps; what it recycles is h₁ (the paper's h*₁).
- *RMS* is ‖h_k‖₂/√d of the state that is **recycled**: after the final norm where
  `feedback = "post"` (EAGLE-3.1, most MTP heads), before it where it is `pre` (EAGLE-3).
- *Cosine* is cos(h_k, h_{k−1}) and *update* is ‖h_k − h_{k−1}‖/‖h_{k−1}‖, where h₀ is the fused
  input of step 1.
- *Entropy* is that of the query's attention over all keys it sees, in nats.
- *Attention* is split into five disjoint classes of keys, which sum to 1. Row r of the drafter's
  cache embeds token r + 1 and carries the taps of token r, so it stands for the paper's column r:
  the sink that a Llama has at token 0, BoS, is row 0.
    - `sink`: the first `sinks` rows.
    - `prompt`: the other rows that embed tokens of the prompt.
    - `answer`: the rows that embed committed tokens of the answer.
    - `recent`: of both, the last `recent` committed rows. At step 1 the query is the last of them.
    - `drafts`: the rows behind the committed ones, up to the query's own: none at step 1, k − 1 at
      step k, the query itself included.
- Heads, of all layers, count alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_drift.watch.observe import Chain

CLASSES = "sink", "prompt", "answer", "recent", "drafts"

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """Where the classes of keys begin and end.

    Attributes:
        prompt: Rows that embed tokens of the prompt: one less than it has.
        sinks: The first rows, which count as the sink.
        recent: The last committed rows, which count as recent.
    """

    prompt: int
    sinks: int
    recent: int

    def edges(self, committed: int) -> list[int]:
        """Returns where each class begins, after `committed` rows: the prompt's is at 1, say."""
        sink = min(self.sinks, committed)
        recent = max(sink, committed - self.recent)
        return [0, sink, min(max(sink, self.prompt), recent), recent, committed]

    def masses(self, weights: Array, committed: int) -> Array:
        """Sums attention `[…, keys]` over each class, `[…, 5]`."""
        edges = [*self.edges(committed), weights.shape[-1]]
        return np.stack([weights[..., a:b].sum(axis=-1) for a, b in pairwise(edges)], axis=-1)


@dataclass(frozen=True)
class Sums:
    """Sums over the chains of one prompt, K steps and N heads (those of all layers) each.

    Attributes:
        chains: How many there are.
        taps: The RMS of each tap `[A]`.
        fused: The RMS of the fused input.
        states: RMS, cosine and update of each step, `[K, 3]`.
        entropy: `[K, N]`.
        attention: `[K, N, 5]`.
    """

    chains: int
    taps: Array
    fused: float
    states: Array
    entropy: Array
    attention: Array

    def __add__(self, other: "Sums") -> "Sums":
        """Adds the chains of another."""
        return Sums(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def add_up(chain: Chain, rows: slice, committed: Sequence[int], split: Split) -> Sums:
    """Measures some rows of a chain, each a chain of its own, and adds them up.

    Args:
        chain: What was seen.
        rows: Which rows of every step: the last one, in decoding.
        committed: How many committed rows each of them sees.
        split: The classes of keys.
    """
    weights = [mx.concatenate(step.weights)[:, rows] for step in chain.steps]
    mx.eval(weights, chain.taps, chain.fused, [step.states for step in chain.steps])
    fused = _array(chain.fused[rows])
    states = np.stack([fused, *(_array(step.states[rows]) for step in chain.steps)])  # [K+1, R, H]
    before, after = states[:-1], states[1:]
    length, length_before = _length(after), _length(before)
    figures = (
        _rms(after),
        (before * after).sum(axis=-1) / (length * length_before),
        _length(after - before) / length_before,
    )
    attention = [_array(w) for w in weights]  # of each step [N, R, keys]
    return Sums(
        len(committed),
        _rms(_array(chain.taps[rows])).sum(axis=0),
        float(_rms(fused).sum()),
        np.stack([figure.sum(axis=1) for figure in figures], axis=1),
        np.stack([_entropy(w).sum(axis=1) for w in attention]),
        np.stack(
            [sum(split.masses(w[:, i], c) for i, c in enumerate(committed)) for w in attention]
        ),
    )


@dataclass(frozen=True)
class Looks:
    """Sums over the rounds of one prompt, K rows and N heads (those of all layers) each.

    Attributes:
        chains: How many there are.
        entropy: `[K, N]`.
        attention: `[K, N, 5]`.
    """

    chains: int
    entropy: Array
    attention: Array

    def __add__(self, other: "Looks") -> "Looks":
        """Adds the rounds of another."""
        return Looks(
            self.chains + other.chains,
            self.entropy + other.entropy,
            self.attention + other.attention,
        )


def look(rows: Sequence[Array], committed: int, split: Split) -> Looks:
    """Measures what each row of a round attends to, `[N, keys]`, behind `committed` ones."""
    return Looks(
        1,
        np.stack([_entropy(row) for row in rows]),
        np.stack([split.masses(row, committed) for row in rows]),
    )


def _array(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32), np.float64)


def _length(x: Array) -> Array:
    return np.linalg.norm(x, axis=-1)


def _rms(x: Array) -> Array:
    return _length(x) / np.sqrt(x.shape[-1])


def _entropy(weights: Array) -> Array:
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=-1)
