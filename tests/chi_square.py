"""The chi-square test, without scipy: what samples of a known distribution must pass."""

import math

import numpy as np

LEAST_P = 1e-3
CERTAINLY_WRONG = 1e-6
LEAST_EXPECTED = 5  # of a cell, for the chi-square approximation to hold


def survival(statistic: float, freedom: int) -> float:
    """The chance that chi-square is larger: Q(a, x) with a = freedom / 2 and x = statistic / 2.

    By Q(a + 1, x) = Q(a, x) + xᵃ e⁻ˣ / Γ(a + 1), from Q(0, x) = 0 or Q(½, x) = erfc √x. No term is
    negative, so nothing cancels.
    """
    x = statistic / 2
    if x == 0:
        return 1.0
    a, chance = (0.5, math.erfc(math.sqrt(x))) if freedom % 2 else (0.0, 0.0)
    while a < freedom / 2:
        chance += math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        a += 1
    return chance


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value of counts; 0 where something was seen that cannot be.

    Rare cells are merged with their neighbours in order of probability, until each is expected
    often enough.
    """
    if counts[probabilities == 0].any():
        return 0.0
    order = np.argsort(-probabilities)
    expected = (probabilities * counts.sum())[order]
    starts, enough = [], LEAST_EXPECTED
    for cell, amount in enumerate(expected):
        if enough >= LEAST_EXPECTED:
            starts.append(cell)
            enough = 0
        enough += amount
    if enough < LEAST_EXPECTED:  # what is left joins the last
        starts.pop()
    counts, expected = (np.add.reduceat(cells, starts) for cells in (counts[order], expected))
    assert len(counts) > 1, "one cell tells nothing"
    return survival(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)
