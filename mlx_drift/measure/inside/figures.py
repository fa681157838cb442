"""The figures of attention drift: means over chains, with intervals over prompts.

What they mean is said in `mlx_drift.watch.sums`. Every round counts alike, whatever prompt it is
of. Intervals are those of drawing the prompts again (`mlx_drift.measure.bootstrap`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_drift.measure.bootstrap import Interval, ratio
from mlx_drift.watch.sums import CLASSES, Array, Looks, Sums


@dataclass(frozen=True)
class Head:
    """One head's attention: means over rounds, for each step.

    Attributes:
        layer: Its layer in the drafter, from 0.
        head: Its number in the layer, from 0.
        entropy: In nats, `[K]`.
        attention: The mass on each class, `[K]`.
    """

    layer: int
    head: int
    entropy: list[float]
    attention: dict[str, list[float]]


@dataclass(frozen=True)
class Attention:
    """What steps look at: means over rounds, intervals over prompts; lists have one each a step.

    Attributes:
        chains: How many chains: rounds, or positions of the teacher-forced chain.
        entropy: Of attention, in nats; a mean over heads.
        attention: The mass on each of `CLASSES`; a mean over heads.
        heads: The same for each head.
    """

    chains: int
    entropy: list[Interval]
    attention: dict[str, list[Interval]]
    heads: list[Head]


@dataclass(frozen=True)
class Figures(Attention):
    """What steps look at and recycle.

    Attributes:
        taps: The RMS of each tap, at the last committed token.
        fused: The RMS of the fused input there.
        rms: That of the recycled state.
        growth: The RMS of the last step over that of the first.
        cosine: Of the recycled state to the one before.
        update: The size of the difference between the two, in parts of the one before.
    """

    taps: list[Interval]
    fused: Interval
    rms: list[Interval]
    growth: Interval
    cosine: list[Interval]
    update: list[Interval]


def figures_of(prompts: Sequence[Sums], layers: int) -> Figures:
    """Takes the means over all chains of all prompts.

    Args:
        prompts: The sums of each prompt that has any chain, at least one.
        layers: The drafter's layers.
    """
    chains = [sums.chains for sums in prompts]
    states = np.stack([sums.states for sums in prompts])

    def over_chains(sums: Array) -> list[Interval]:
        """Divides sums `[prompts, K]` by the chains."""
        return [ratio(column, chains) for column in sums.T]

    return Figures(
        **vars(attention_of(prompts, layers)),
        taps=over_chains(np.stack([sums.taps for sums in prompts])),
        fused=ratio([sums.fused for sums in prompts], chains),
        rms=over_chains(states[..., 0]),
        growth=ratio(states[:, -1, 0].tolist(), states[:, 0, 0].tolist()),
        cosine=over_chains(states[..., 1]),
        update=over_chains(states[..., 2]),
    )


def attention_of(prompts: Sequence[Sums | Looks], layers: int) -> Attention:
    """Takes the means of what is attended to; arguments as in `figures_of`."""
    chains = [sums.chains for sums in prompts]
    entropy = np.stack([sums.entropy for sums in prompts])
    attention = np.stack([sums.attention for sums in prompts])

    def over_chains(sums: Array) -> list[Interval]:
        """Divides sums `[prompts, K]` by the chains."""
        return [ratio(column, chains) for column in sums.T]

    total = sum(chains)
    mean_entropy, mean_attention = entropy.sum(axis=0) / total, attention.sum(axis=0) / total
    count = entropy.shape[-1]
    return Attention(
        chains=total,
        entropy=over_chains(entropy.mean(axis=-1)),
        attention={
            name: over_chains(attention[..., i].mean(axis=-1)) for i, name in enumerate(CLASSES)
        },
        heads=[
            Head(
                layer=head // (count // layers),
                head=head % (count // layers),
                entropy=mean_entropy[:, head].tolist(),
                attention={
                    name: mean_attention[:, head, i].tolist() for i, name in enumerate(CLASSES)
                },
            )
            for head in range(count)
        ],
    )
