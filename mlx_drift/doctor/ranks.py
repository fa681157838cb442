"""What each of several ranks would hold of a target, told before anything is loaded.

The cut is that of a run, on shapes alone: collectives are built and never computed, so their
places are taken by what has the same shape.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.doctor.build import nbytes_of
from mlx_drift.ranks.cut import shard, spread
from mlx_drift.ranks.world import Ranks


class Pretended:
    """Stands for MLX's group: a rank among so many, none of which is there."""

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size

    def rank(self) -> int:
        """Returns its number."""
        return self._rank

    def size(self) -> int:
        """Returns how many there would be."""
        return self._size


def parts(
    build: Callable[[], nn.Module], size: int, pipeline: bool
) -> Iterator[tuple[nn.Module, int]]:
    """Yields what each rank would have of a model, and the bytes of its weights.

    Args:
        build: Builds the model anew, lazily.
        size: How many ranks there are.
        pipeline: Layers are spread over them, instead of cut.

    Raises:
        DriftError: If the model cannot be cut so.
    """
    for rank in range(size):
        model = build()
        with _collectives_by_shape(size):
            (spread if pipeline else shard)(model, Ranks(Pretended(rank, size)))
            yield model, nbytes_of(model)


@contextmanager
def _collectives_by_shape(size: int) -> Iterator[None]:
    """Puts what has the same shape into the place of each collective."""

    def same(states: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return states

    def gathered(states: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return mx.concatenate([states] * size)

    instead = {"all_sum": same, "all_gather": gathered, "send": same, "recv_like": same}
    own = {name: getattr(mx.distributed, name) for name in instead}
    try:
        for name, function in instead.items():
            setattr(mx.distributed, name, function)
        yield
    finally:
        for name, function in own.items():
            setattr(mx.distributed, name, function)
