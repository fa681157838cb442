"""What rounds cost on this machine, by how many drafts they verify: measured, not modelled.

The limits of fused attention, the tiles of a matrix kernel and the drafter's own steps are all in
it. Costs are the lower medians of the last few rounds: other work on the machine only ever adds.
"""

from collections import deque
from collections.abc import Iterable, Mapping

COLD = 2  # rounds in which a process warms up
MEMORY, ENOUGH = 9, 2  # measurements of a cost that are kept, and that make it known
SETTLED = 4  # and that make it a figure to tell
OPTIMISM = 0.7  # of the last known slope, for a length that was never tried


class Costs:
    """Seconds of a round by its draft length; under 0, of one token of plain decoding.

    Args:
        known: What was measured on this machine before. Its scale is that of now wherever both
            are known: the machine may be busier, or the context longer.
        cold: So many measurements are left out at first, where nothing was known: a process has
            yet to warm up.
    """

    def __init__(self, known: Mapping[int, float] | None = None, cold: int = 0):
        self._before = dict(sorted((known or {}).items()))
        self._now: dict[int, deque[float]] = {}
        self._known: dict[int, float] | None = None
        self._cold = 0 if known else cold

    @property
    def is_cold(self) -> bool:
        """Whether the next measurement is left out."""
        return self._cold > 0

    def add(self, k: int, seconds: float) -> None:
        """Notes one measurement, unless it is one of the first."""
        if self._cold:
            self._cold -= 1
            return
        self._known = None
        self._now.setdefault(k, deque(maxlen=MEMORY)).append(seconds)

    def is_settled(self, k: int) -> bool:
        """Tells whether one is known well enough to be told: not from a few first rounds alone."""
        return k in self._before or len(self._now.get(k, ())) >= SETTLED

    def know(self, k: int, seconds: float) -> None:
        """Notes what was measured elsewhere."""
        self._known = None
        self._before = dict(sorted((self._before | {k: seconds}).items()))

    def known(self) -> dict[int, float]:
        """Returns what rounds take by their draft length, as far as enough was measured."""
        if self._known is None:
            self._known = self._sum_up()
        return self._known

    def _sum_up(self) -> dict[int, float]:
        now = {k: _lower_median(v) for k, v in self._now.items() if len(v) >= ENOUGH}
        lines = {k: estimate(k, self._before) for k in self._now}
        scales = [_lower_median(self._now[k]) / line for k, line in lines.items() if line]
        scale = _lower_median(scales) if scales else 1.0
        before = {k: seconds * scale for k, seconds in self._before.items()}
        return dict(sorted((before | now).items()))


def estimate(k: int, known: Mapping[int, float]) -> float | None:
    """Returns what a round of k drafts takes; None if there is nothing to go by.

    Between two known lengths on the line through them; beyond the longest by part of the last slope
    a draft.

    Args:
        k: Drafts a round.
        known: What rounds of some lengths take, the shortest first.
    """
    if k in known:
        return known[k]
    shorter = [i for i in known if i < k][-2:]
    longer = next((i for i in known if i > k), None)
    if not shorter or (longer is None and len(shorter) < 2):
        return None
    i, j = (shorter[-1], longer) if longer is not None else shorter
    low, high = known[i], known[j]
    slope = max(0.0, high - low) / (j - i)
    return low + (k - i) * slope if longer is not None else high + (k - j) * slope * OPTIMISM


def _lower_median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]
