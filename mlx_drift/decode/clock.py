"""Seconds of one answer's own turns: it stands while others have theirs."""

import time


class Clock:
    """Counts seconds while it runs. It starts running."""

    def __init__(self) -> None:
        self._counted = 0.0
        self._since: float | None = time.perf_counter()

    def __call__(self) -> float:
        """Returns the seconds counted."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._counted + running

    def stop(self) -> None:
        """Stops counting."""
        self._counted, self._since = self(), None

    def go(self) -> None:
        """Counts on."""
        if self._since is None:
            self._since = time.perf_counter()
