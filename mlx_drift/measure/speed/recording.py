"""A target that says what was recorded, and a clock that is set by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_drift.decode.clock import Clock
from mlx_drift.measure.speed.rounds import CERTAIN
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.model import Target
from mlx_drift.target.tree import Tree


@dataclass(frozen=True)
class Recorded:
    """A prompt and what was answered, token ids; what a conversation learned goes on within it."""

    prompt: list[int]
    answer: list[int]
    conversation: int = 0


class Simulated(Clock):
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """Returns the seconds spent."""
        return self.seconds

    def stop(self) -> None:
        """Does nothing: it does not run."""

    def go(self) -> None:
        """Does nothing."""


class RecordedCache(TargetCache):
    """Where the recording is."""

    def __init__(self, position: int):
        super().__init__([])
        self.position = position

    def rollback(self, back: int) -> None:
        """Goes back."""
        self.position -= back

    def keep(self, path: Sequence[int]) -> None:
        """Goes back to the end of a path: only what was recorded is on one."""
        self.rollback(self.rows - len(path))


class Recording(Target):
    """A target that says what was recorded.

    Args:
        target: What it was recorded with.
        tokens: All of it, `[N]`.
        taps: Of the rows from `first` on.
        first: The row of the last token of the prompt.
        spend: Told the rows of each pass.
    """

    def __init__(
        self,
        target: Target,
        tokens: mx.array,
        taps: mx.array,
        first: int,
        spend: Callable[[int], None],
    ):
        vars(self).update(vars(target))
        self._tokens, self._recorded, self._first, self._spend = tokens, taps, first, spend
        self._vocabulary = mx.arange(target.shape.vocab_size)

    def verify(
        self, tokens: mx.array, cache: TargetCache, tree: Tree | None = None
    ) -> tuple[mx.array, mx.array]:
        """Returns logits that make the recorded tokens certain, and the taps of their rows."""
        assert isinstance(cache, RecordedCache)
        self._spend(tokens.size)
        depths = mx.arange(tokens.size) if tree is None else tree.depths
        rows = cache.position + depths
        cache.position, cache.rows = cache.position + tokens.size, tokens.size
        said = self._tokens[rows + 1]
        logits = CERTAIN * (self._vocabulary == said[:, None]).astype(mx.float32)
        return logits, self._recorded[rows - self._first]
