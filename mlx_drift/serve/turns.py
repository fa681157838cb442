"""Whose turn it is: everyone gets the same share of measured device time.

Each has a counter of the seconds it had; the least goes next. Who comes, or comes back from
waiting, starts level with the one who had least, so that the past is neither credit nor debt.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Shares out turns."""

    def __init__(self) -> None:
        self._seconds: dict[T, float] = {}
        self._waited: set[T] = set()

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self._seconds)

    def __iter__(self):  # type: ignore[no-untyped-def]
        """Iterates over those there are, in the order in which they came."""
        return iter([*self._seconds])

    def add(self, one: T) -> None:
        """Lets one take part."""
        self._seconds[one] = 0.0
        self._waited.add(one)

    def remove(self, one: T) -> None:
        """Ends its part."""
        self._seconds.pop(one, None)
        self._waited.discard(one)

    def charge(self, one: T, seconds: float) -> None:
        """Notes what a turn took."""
        if one in self._seconds:
            self._seconds[one] += seconds

    def next(self, can_go: Callable[[T], bool]) -> T | None:
        """Returns whose turn it is; None if nobody can go."""
        ready = [one for one in self._seconds if can_go(one)]
        if not ready:
            self._waited.update(self._seconds)
            return None
        going = [self._seconds[one] for one in ready if one not in self._waited]
        level = min(going, default=0.0)
        for one in ready:
            if one in self._waited:
                self._seconds[one] = level
        self._waited = self._seconds.keys() - set(ready)
        return min(ready, key=self._seconds.__getitem__)
