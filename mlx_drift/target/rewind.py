"""Going back in caches: to any row that is still there, or to a copy taken at that point.

Keys and values are trimmed to any earlier row, as far as what that row sees is still there. Where a
window has moved on, or a recurrent state has, only a copy brings it back. Copies are small, a
window or a state; of keys and values that can always be trimmed none is taken.

Going two ways from one point: `Caches.fork`.
"""

import copy
from collections.abc import Iterator
from typing import Any, Self

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
)

from mlx_drift.target.sliding import ALL, SlidingKVCache

Snapshot = list[dict[str, mx.array] | None]
"""For each cache what trimming would not bring back; None where it brings back everything."""


class Caches(list[Any]):
    """The caches of the layers of one model, in one conversation."""

    @property
    def state(self) -> list[Any]:
        """All arrays, for `mx.eval`."""
        return [cache.state for cache in self]

    @property
    def nbytes(self) -> int:
        """The bytes they hold."""
        return sum(part.nbytes for part in self.parts() if not part.empty())

    def parts(self) -> Iterator[Any]:
        """Yields the caches, of a list of caches those that it holds."""
        for cache in self:
            yield from parts(cache)

    def fork(self) -> Self:
        """Copies the caches: neither sees what the other is fed from then on.

        A copied array is another name for the same buffer. MLX writes into a buffer in place only
        if nothing else holds it, so the one that is fed first pays for a copy, and the other never.
        """
        return copy.deepcopy(self)

    def can_return_to(self, rows: int) -> bool:
        """Tells whether what is held is still of the kind that it was at `rows` rows."""
        return True

    def can_rewind(self, rows: int) -> bool:
        """Tells whether every cache still has what going back to `rows` rows takes."""
        return self.can_return_to(rows) and all(_can_trim(part, rows) for part in self.parts())

    def rewind(self, rows: int) -> bool:
        """Goes back to when `rows` rows had been fed, if every cache still has what that takes."""
        if not Caches.can_rewind(self, rows):
            return False
        for part in self.parts():
            part.trim(part.offset - rows)
        return True

    def snapshot(self) -> Snapshot:
        """Copies what trimming would not bring back."""
        return [None if _always_trims(part) else _copy(part) for part in self.parts()]

    def restore(self, snapshot: Snapshot, rows: int) -> bool:
        """Goes back to a snapshot that was taken when `rows` rows had been fed, if it can."""
        pairs = [*zip(self.parts(), snapshot, strict=True)]
        there = all(arrays is not None or _can_trim(part, rows) for part, arrays in pairs)
        if not self.can_return_to(rows) or not there:
            return False
        for part, arrays in pairs:
            if arrays is None:
                part.trim(part.offset - rows)
            else:
                # Under names of its own: rows are written in place, and others may share this one.
                _put(part, {name: mx.array(array) for name, array in arrays.items()}, rows)
        return True

    def check_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Checks what `to_arrays` may have given at as many rows as these caches hold.

        Raises:
            ValueError: Naming the first array that is missing, unknown or of another shape.
        """
        expected, parts = self.to_arrays(), list(self.parts())
        if expected.keys() != arrays.keys():
            raise ValueError(f"{min(expected.keys() ^ arrays.keys())} is missing or unknown")
        for name, array in arrays.items():
            part, shape = parts[int(name.partition(".")[0])], list(expected[name].shape)
            if isinstance(part, ChunkedKVCache) and array.ndim == len(shape):
                # How many older rows are still there depends on the blocks that came.
                least = part.offset % part.chunk_size
                shape[-2] = min(max(array.shape[-2], least), part.offset)
            if list(array.shape) != shape or array.dtype != expected[name].dtype:
                raise ValueError(
                    f"{name} is {array.dtype} {list(array.shape)}, expected "
                    f"{expected[name].dtype} {shape}"
                )

    def to_arrays(self) -> dict[str, mx.array]:
        """Copies all that rows to come may see, under names that `from_arrays` knows."""
        return {
            f"{i}.{name}": array
            for i, part in enumerate(self.parts())
            for name, array in _copy(part).items()
        }

    def from_arrays(self, arrays: dict[str, mx.array], rows: int) -> None:
        """Takes what `to_arrays` gave when `rows` rows had been fed; the names must be its own."""
        tree: dict[str, dict[str, mx.array]] = {}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            tree.setdefault(part, {})[rest] = array
        for i, part in enumerate(self.parts()):
            _put(part, tree.get(str(i), {}), rows)


def parts(cache: Any) -> Iterator[Any]:
    """Yields a cache, or what a list of caches holds."""
    if isinstance(cache, CacheList):
        for inner in cache.caches:
            yield from parts(inner)
    else:
        yield cache


def _can_trim(part: Any, rows: int) -> bool:
    """Tells whether trimming brings a cache back to when `rows` rows had been fed."""
    if isinstance(part, SlidingKVCache):
        return part.can_rewind(rows)
    if isinstance(part, ChunkedKVCache):  # a row sees its own chunk
        return part.start_position <= rows - rows % part.chunk_size and rows <= part.offset
    return _always_trims(part) and rows <= part.offset


def _copy(part: Any) -> dict[str, mx.array]:
    """Copies what a row that is fed next may see; a recurrent state is bound anew, so as it is."""
    if isinstance(part, ArraysCache):
        return {str(i): array for i, array in enumerate(part.cache) if array is not None}
    if part.empty():
        return {}
    if isinstance(part, SlidingKVCache):
        return part.copy_visible()
    keys, values = part.keys_and_values()
    arrays = dict(tree_flatten({"keys": keys, "values": values}))
    return {name: mx.contiguous(array) for name, array in arrays.items()}


def _put(part: Any, arrays: dict[str, mx.array], rows: int) -> None:
    """Puts back what `_copy` copied when `rows` rows had been fed."""
    if isinstance(part, ArraysCache):
        part.cache = [arrays.get(str(i)) for i in range(len(part.cache))]
    elif isinstance(part, SlidingKVCache):
        part.put(arrays, rows)
    else:
        tree = tree_unflatten(list(arrays.items()))
        part.keys, part.values, part.offset = tree["keys"], tree["values"], rows
        if isinstance(part, ChunkedKVCache):
            part.start_position = rows - part.keys.shape[2]


def _always_trims(part: Any) -> bool:
    """Tells whether trimming brings a cache back to any earlier point."""
    if isinstance(part, SlidingKVCache):
        return part.slack == ALL
    return type(part) in (KVCache, QuantizedKVCache)
