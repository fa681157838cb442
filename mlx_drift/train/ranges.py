"""What the numbers of a training's settings may be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from mlx_drift.arguments import real_number, whole_number
from mlx_drift.errors import DriftError


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`.

    Attributes:
        least: The least of them.
        most: The most of them.
        above: `least` itself is not one.
    """

    least: float
    most: float = math.inf
    above: bool = False

    def __contains__(self, number: float) -> bool:
        """Tells whether a number is one of them; NaN never is."""
        return self.least <= number <= self.most and not (self.above and number == self.least)

    def __str__(self) -> str:
        """Says which they are."""
        least = f"{'more than' if self.above else 'at least'} {self.least:g}"
        return least if self.most == math.inf else f"{least} and at most {self.most:g}"


def check_numbers(settings: Any, ranges: Mapping[str, Range]) -> None:
    """Checks numbers of a frozen dataclass, and makes them Python's own: numpy's come too.

    Args:
        settings: The dataclass, whose annotations tell whole numbers from others.
        ranges: By field what it may be.

    Raises:
        DriftError: Naming the first that is no number, or outside.
    """
    hints = get_type_hints(type(settings))
    for name, allowed in ranges.items():
        convert = whole_number if hints[name] is int else real_number
        number = convert(name, getattr(settings, name))
        if number not in allowed:
            raise DriftError(f"{name} is {number}; expected {allowed}")
        object.__setattr__(settings, name, number)
