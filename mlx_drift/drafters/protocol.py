"""What the decoding loop asks of a drafter, whatever its kind."""

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlx_drift.rewind import Snapshot


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for one round: target token ids `[k]` int32, lazy."""

    tokens: mx.array


class DrafterCache(Protocol):
    """All state of one conversation: one row for every token but the first.

    `mlx_drift.rewind.Caches` has it all.
    """

    @property
    def state(self) -> Any:
        """Its arrays, as a tree for `mx.eval`."""

    @property
    def nbytes(self) -> int:
        """The bytes it holds."""

    def rewind(self, rows: int) -> bool:
        """Goes back to when `rows` rows had been fed, if it can."""

    def snapshot(self) -> Snapshot:
        """Copies what `rewind` would not bring back."""

    def restore(self, snapshot: Snapshot, rows: int) -> bool:
        """Goes back to a snapshot that was taken when `rows` rows had been fed, if it can."""

    def to_arrays(self) -> dict[str, mx.array]:
        """Copies all that rows to come may see, for a file."""

    def check_arrays(self, arrays: dict[str, mx.array], rows: int) -> None:
        """Checks what a file says `to_arrays` gave at `rows` rows; ValueError if it cannot be."""

    def from_arrays(self, arrays: dict[str, mx.array], rows: int) -> None:
        """Takes what `to_arrays` gave when `rows` rows had been fed."""


class Drafter(Protocol):
    """A drafter: its weights are shared, all state of a conversation lives in its cache.

    Rows of drafted tokens never survive in the cache past the round that drafted them.
    """

    @property
    def taps(self) -> tuple[int, ...]:
        """Which hidden states the target must capture for it."""

    @property
    def model(self) -> Any:
        """The target model it was loaded for."""

    @property
    def network(self) -> Any:
        """Its own weights, a tree of arrays."""

    def make_cache(self) -> DrafterCache:
        """Makes the empty state of one conversation."""

    def ingest(self, tokens: mx.array, taps: mx.array, cache: Any) -> None:
        """Appends committed tokens `[M]` with the taps `[M, A, T]` of one position earlier."""

    def propose(self, k: int, cache: Any) -> Draft:
        """Drafts up to k tokens to follow the committed ones."""
