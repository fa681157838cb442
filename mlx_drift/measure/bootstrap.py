"""Intervals: how much a figure would move if other prompts of the same kind had been asked.

Rounds of one answer resemble each other, so it is prompts that are drawn again, not rounds. Of a
single prompt nothing can be told: both bounds are the figure itself.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

DRAWS, LEVEL = 2000, 0.95


class Interval(NamedTuple):
    """A figure, and the bounds that hold `LEVEL` of what resampled prompts give."""

    value: float
    low: float
    high: float

    def shown(self, prompts: int) -> str:
        """Shows it with its bounds; of a single prompt there are none."""
        value = f"{self.value:.2f}"
        return value if prompts < 2 else f"{value} ({self.low:.2f}–{self.high:.2f})"


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """Returns a ratio of sums over prompts with its percentile bootstrap interval.

    Draws in which the denominators come to 0 tell nothing and are left out.

    Args:
        numerators: One a prompt: accepted drafts, say.
        denominators: One a prompt: rounds, say; not all 0.
        seed: Makes the draws reproducible.
    """
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    a, b = (_resampled(values, seed) for values in (above, below))
    low, high = _bounds(a[b > 0] / b[b > 0])
    return Interval(float(above.sum() / below.sum()), low, high)


def ratio_of_ratios(
    above: tuple[Sequence[float], Sequence[float]],
    below: tuple[Sequence[float], Sequence[float]],
    seed: int = 0,
) -> Interval | None:
    """Returns one ratio of sums over another, on the same prompts drawn together.

    Draws in which something to divide by comes to 0 are left out.

    Args:
        above: Numerators and denominators of the figure above, one a prompt each.
        below: Those of the figure below, in the same order of prompts.
        seed: Makes the draws reproducible.

    Returns:
        The ratio; None if the figure below is 0, so that there is none.
    """
    sums = [np.asarray(values, float) for values in (*above, *below)]
    if not all(values.sum() for values in sums[1:]):
        return None
    a, b, c, d = (_resampled(values, seed) for values in sums)
    there = (b > 0) & (c > 0) & (d > 0)
    low, high = _bounds((a[there] / b[there]) / (c[there] / d[there]))
    a, b, c, d = (values.sum() for values in sums)
    return Interval(float((a / b) / (c / d)), low, high)


def _resampled(values: npt.NDArray[Any], seed: int) -> npt.NDArray[Any]:
    """Returns the sums of values `[prompts]` over prompts drawn with replacement, `[DRAWS]`."""
    count = len(values)
    return values[np.random.default_rng(seed).integers(count, size=(DRAWS, count))].sum(axis=1)


def _bounds(draws: npt.NDArray[Any]) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
