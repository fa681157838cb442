"""What follows from the cost of a round: when drafting pays, and by how much."""

import statistics
from collections.abc import Sequence


def tokens_per_round(k: int, acceptance: float) -> float:
    """Returns how many tokens a round of k drafts commits, the target's own included.

    Args:
        k: Drafts a round.
        acceptance: Of every draft, if all before it were accepted.

    Returns:
        1 + a + … + aᵏ.
    """
    return sum(acceptance**i for i in range(k + 1))


def break_even(k: int, cost: float) -> float | None:
    """Returns the acceptance of every draft at which a round yields as many tokens as it costs.

    Args:
        k: Drafts a round.
        cost: A round's time, in plain steps.

    Returns:
        The a with 1 + a + … + aᵏ = cost; None if that is more than k + 1.
    """
    if cost > k + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_round(k, middle) < cost else (low, middle)
    return high


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
