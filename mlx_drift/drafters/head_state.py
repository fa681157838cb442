"""What a head keeps of one conversation: rows that its layers read, and a seed."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_drift.target.rewind import Caches, Snapshot


class HeadState(Caches):
    """All state of one conversation.

    The seed is made of the row ingested last, so it is gone when the rows change in another way,
    and comes with the next row.

    Args:
        layers: What the attention of each layer reads.

    Attributes:
        seed: What the next drafts start from; None before any row was ingested.
    """

    seed: Any = None

    def __init__(self, layers: Sequence[Any] = ()):
        super().__init__([layer.rows for layer in layers])
        self.layers = layers

    @property
    def state(self) -> list[Any]:
        """All arrays, for `mx.eval`."""
        return [super().state, self.seed]

    @property
    def nbytes(self) -> int:
        """The bytes it holds."""
        return super().nbytes + self.seed_nbytes

    @property
    def seed_nbytes(self) -> int:
        """Those of the seed."""
        seed = (part for _, part in tree_flatten(self.seed))
        return sum(part.nbytes for part in seed if isinstance(part, mx.array))

    def rewind(self, rows: int) -> bool:
        """Goes back to when `rows` rows had been fed; the seed comes with the next row."""
        self.seed = None
        return super().rewind(rows)

    def restore(self, snapshot: Snapshot, rows: int) -> bool:
        """Goes back to a snapshot; the seed comes with the next row."""
        self.seed = None
        return super().restore(snapshot, rows)

    def from_arrays(self, arrays: dict[str, mx.array], rows: int) -> None:
        """Takes what `to_arrays` gave; the seed comes with the next row."""
        self.seed = None
        super().from_arrays(arrays, rows)
