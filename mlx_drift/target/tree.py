"""Rows that branch: a tree of drafts in one forward pass of an unmodified mlx-lm model.

A row sees the text and the rows it follows, at the position that its depth gives it. Three things
of a model's know of rows, and all are told for the length of one pass:

- The mask: mlx-lm's models ask their cache for it, so the cache *instances* answer.
- Positions: `mx.fast.rope` takes an offset for each row of a batch. RoPE modules get a subclass
  that turns rows into a batch, as taps get one (`mlx_drift.target.taps`); without a tree it looks
  up a context variable, and that is all.
- Recurrent layers are called with the tree's paths as a batch (`mlx_drift.target.recurrent`).

Whether a model asks is found out, not assumed: `mlx_drift.target.tree_check`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from mlx_drift.target.sliding import SlidingKVCache

BRANCHING = (KVCache, QuantizedKVCache, SlidingKVCache)
"""Caches whose rows may branch: keys and values, each row of which is a function of its path."""

VERIFIES_TREES = "_verifies_trees"
"""The attribute of a model whose RoPE modules follow trees, and that was found to verify them."""


@dataclass(frozen=True)
class Tree:
    """Rows of a tree, of which the last M are fed in one pass; earlier ones are in the caches.

    Attributes:
        depths: How far each of its T rows is from the text's end, `[T]` int32: 0 for the first.
        sees: Which of them each row that is fed sees, itself and those it follows: `[M, T]` bool.
    """

    depths: mx.array
    sees: mx.array

    @classmethod
    def of(cls, parents: mx.array) -> "Tree":
        """The tree of the last committed token, which is row 0, and the drafts that follow it.

        Args:
            parents: Which draft each draft follows, one before it, `[N]` int32; −1 for row 0.
        """
        rows = parents.size + 1
        sees = mx.eye(rows)
        sees[mx.arange(1, rows), parents + 1] = 1
        for _ in range((rows - 2).bit_length()):  # paths of twice the length
            sees = mx.minimum(sees @ sees, 1)
        return cls(sees.sum(axis=1).astype(mx.int32) - 1, sees > 0)

    @cached_property
    def paths(self) -> list[list[int]]:
        """Its rows from the first to each that none follows; reads its shape, once."""
        sees: Any = self.sees.tolist()
        paths = [[row for row, seen in enumerate(one) if seen] for one in sees]
        inner = {path[-2] for path in paths[1:]}
        return [path for row, path in enumerate(paths) if row not in inner]

    @property
    def before(self) -> int:
        """How many of its rows are in the caches already."""
        fed, rows = self.sees.shape
        return rows - fed

    def positions(self, offset: Any) -> mx.array:
        """Returns the positions `[M]` of the rows that are fed to caches of `offset` rows."""
        return self.depths[self.before :] + (offset - self.before)

    def mask(self, before: int, window: int | None, sinks: int = 0) -> mx.array:
        """Returns what the rows see, `[M, before + T]` bool.

        Args:
            before: How many rows before the tree there are to see.
            window: A row sees the positions less than so many before its own; None for all.
            sinks: How many of the first rows stay visible beyond a window, and count to it.
        """
        fed = self.sees.shape[0]
        seen = mx.concatenate([mx.ones((fed, before), mx.bool_), self.sees], axis=1)
        if window is None:
            return seen
        keys = mx.concatenate([mx.arange(before), before + self.depths])
        is_near = keys[-fed:, None] - keys < window - sinks
        return seen & (is_near | (keys < sinks))


@contextmanager
def on_tree(caches: Iterable[Any], tree: Tree | None) -> Iterator[None]:
    """Has the rows of one forward pass branch.

    Args:
        caches: The parts of the model's caches. Those of recurrent layers have nothing to be told.
        tree: How they do; None if they follow one another.
    """
    if tree is None:
        yield
        return
    parts: list[Any] = [part for part in caches if isinstance(part, BRANCHING)]
    token = _tree.set(tree)
    try:
        for part in parts:
            part.make_mask = partial(_mask, tree, part)
            if isinstance(part, SlidingKVCache):
                part.branched = tree.before
        yield
    finally:
        _tree.reset(token)
        for part in parts:
            vars(part).pop("make_mask", None)
            if isinstance(part, SlidingKVCache):
                part.branched = 0


def tree_of_pass() -> Tree | None:
    """Returns how the rows branch of the forward pass that is under way in this thread."""
    return _tree.get()


@contextmanager
def in_a_row() -> Iterator[None]:
    """Has rows follow one another again, for a part of a forward pass."""
    token = _tree.set(None)
    try:
        yield
    finally:
        _tree.reset(token)


def follow_trees(model: nn.Module) -> bool:
    """Has the RoPE modules of a model rotate the rows of a tree by their depth, from now on.

    Returns:
        Whether all can: the base of a dynamic one hangs on how many rows there are.
    """
    can = True
    for module in model.modules():
        cls = type(module)
        can = can and not isinstance(module, DynamicNTKScalingRoPE)
        if re.search("RoPE|Rotary", cls.__name__) and not hasattr(cls, "by_depth"):
            members = {"__call__": _by_depth(cls.__call__), "by_depth": True, "tapped_as": None}
            module.__class__ = type(cls.__name__, (cls,), members)
    return can


def compact(part: Any, start: int, path: Sequence[int]) -> None:
    """Moves the rows of a path together, in place, where keys and values were appended.

    Args:
        part: A cache of a kind in `BRANCHING`.
        start: How many rows it had before those of the tree.
        path: Which of the tree's rows to move to the front, in ascending order.
    """
    stay = next((i for i, row in enumerate(path) if i != row), len(path))
    if stay == len(path) or part.empty():
        return
    start -= getattr(part, "first", 0)
    moved = mx.array(list(path[stay:])) + start
    for arrays in (part.keys, part.values):
        for array in arrays if isinstance(arrays, tuple | list) else (arrays,):
            rows = mx.take(array, moved, axis=-2)
            array[..., start + stay : start + len(path), :] = rows


_tree: ContextVar[Tree | None] = ContextVar("tree", default=None)


def _mask(
    tree: Tree, part: Any, N: int, window_size: int | None = None, **options: Any
) -> mx.array:
    """Answers in place of a cache's `make_mask`; always with an array."""
    before = part.offset - tree.before
    if not isinstance(part, SlidingKVCache):
        return tree.mask(before, window_size)
    return tree.mask(min(before, part.window - 1), window_size or part.window, part.sinks)


def _by_depth(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a RoPE module's `__call__`, which takes `[1, …, M, head_dim]` and an offset."""

    def call(self: nn.Module, x: mx.array, offset: Any = 0, *args: Any, **kwargs: Any) -> Any:
        tree = _tree.get()
        if tree is None:
            return inner(self, x, offset, *args, **kwargs)
        rows = x.swapaxes(0, -2)
        return inner(self, rows, tree.positions(offset), *args, **kwargs).swapaxes(0, -2)

    return call
