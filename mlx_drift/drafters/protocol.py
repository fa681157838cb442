"""What the decoding loop asks of a drafter, whatever its kind."""

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for one round: target token ids `[k]` int32, lazy."""

    tokens: mx.array


class DrafterCache(Protocol):
    """All state of one conversation."""

    @property
    def state(self) -> Any:
        """Its arrays, as a tree for `mx.eval`."""


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
