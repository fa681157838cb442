"""Recurrent layers: what they were given last, and how rows are taken from their state again.

A state cannot be trimmed. Its layer is called anew on the rows that stay, from the state before
them: MLX is lazy, so of the layer only what the state needs is computed.

Nor can a mask tell such a layer which rows a row of a tree follows: it takes all that came before.
So each path of the tree is a sequence of a batch, which begins at the text's state. Rows that paths
share are computed for each of them.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache, CacheList

from mlx_drift.errors import DriftError
from mlx_drift.target.rewind import parts
from mlx_drift.target.tree import Tree, in_a_row

INSTEAD = "Use another target, or generate without a drafter (--no-draft)"
"""What to do with a target that is refused."""

REPLAYED = (mx.array, ArraysCache, CacheList, str, int, float, NoneType)
"""What a recurrent layer may be handed to be called anew on fewer rows."""


@dataclass(frozen=True)
class Consumed:
    """What one recurrent layer was given for the last rows, and its states before them."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    states: list[tuple[ArraysCache, list[mx.array | None]]]

    @classmethod
    def of(
        cls, call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> "Consumed | None":
        """Notes a call of a layer, the first argument, if it is handed a recurrent state.

        Raises:
            DriftError: If it is also handed something that cannot be cut to fewer rows.
        """
        given = [*arguments[1:], *keywords.values()]
        states = [state for argument in given for state in recurrent(argument)]
        if not states:
            return None
        if unknown := [value for value in given if not isinstance(value, REPLAYED)]:
            raise DriftError(
                f"the target hands its recurrent layers a {type(unknown[0]).__name__}, so they "
                f"cannot be called anew to take rejected drafts back. {INSTEAD}"
            )
        # Recurrent layers bind new arrays, so a reference keeps the state that was.
        return cls(call, arguments, keywords, [(state, list(state.cache)) for state in states])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Consumed":
        """Copies the note for copied caches: theirs are put back, the layer is the same."""

        def copied(value: Any) -> Any:
            is_cache = isinstance(value, ArraysCache | CacheList)
            return copy.deepcopy(value, memo) if is_cache else value

        return Consumed(
            self.call,
            tuple(map(copied, self.arguments)),
            {name: copied(value) for name, value in self.keywords.items()},
            [(copied(state), list(arrays)) for state, arrays in self.states],
        )

    def replay(self, rows: int, path: Sequence[int]) -> None:
        """Puts the state as if of `rows` rows only those of a path had been fed."""
        self._put_back()
        if path == range(len(path)):
            if path:
                self._call(partial(_first_rows, rows=rows, kept=len(path)))
        else:
            self._call(partial(_on_paths, rows=rows, paths=mx.array([list(path)])))

    def branch(self, tree: Tree) -> Any:
        """Calls the layer on the rows of a tree, and leaves the state as it was.

        Returns:
            What the layer returns, each row as on its own path. Reads the tree's shape.
        """
        for state, arrays in self.states:
            state.cache = [_for_each(array, len(tree.paths)) for array in arrays]
        longest = max(map(len, tree.paths))
        # Short ones repeat their last row, and no row is taken from there.
        paths = mx.array([path + path[-1:] * (longest - len(path)) for path in tree.paths])
        with in_a_row():
            returned = self._call(partial(_on_paths, rows=tree.depths.size, paths=paths))
        self._put_back()
        place = {
            row: which * longest + depth
            for which, path in enumerate(tree.paths)
            for depth, row in enumerate(path)
        }
        rows = mx.array([place[row] for row in range(tree.depths.size)])
        return tree_map(lambda array: array.flatten(0, 1)[rows][None], returned)

    def _put_back(self) -> None:
        for state, arrays in self.states:
            state.cache = list(arrays)

    def _call(self, cut: Callable[[Any], Any]) -> Any:
        """Calls the layer on some of its rows."""
        keywords = {name: cut(value) for name, value in self.keywords.items()}
        return self.call(*map(cut, self.arguments), **keywords)


def recurrent(value: Any) -> list[ArraysCache]:
    """Returns the recurrent states that a value is or holds."""
    if not isinstance(value, ArraysCache | CacheList):
        return []
    return [part for part in parts(value) if isinstance(part, ArraysCache)]


def _first_rows(value: Any, rows: int, kept: int) -> Any:
    """Cuts an argument of a layer to its first rows: `[1, M, …]`, or a mask `[…, M, keys]`."""
    if not isinstance(value, mx.array) or value.ndim < 2:
        return value
    if value.ndim > 2 and value.shape[1] == rows:
        return value[:, :kept]
    if value.shape[-2] == rows:
        return value[..., :kept, : value.shape[-1] - (rows - kept)]
    return value[..., :kept] if value.shape[-1] == rows else value


def _on_paths(value: Any, rows: int, paths: mx.array) -> Any:
    """Takes the rows `[P, L]` of an argument of a layer `[1, M, …]`: `[P, L, …]`."""
    is_in_rows = isinstance(value, mx.array) and value.shape[:2] == (1, rows)
    return value[0][paths] if is_in_rows else value


def _for_each(array: mx.array | None, count: int) -> mx.array | None:
    """Gives each sequence of a batch the state `[1, …]` of one."""
    return None if array is None else mx.repeat(array, count, axis=0)
