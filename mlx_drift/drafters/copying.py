"""A drafter that copies beside its network: what followed before where the text repeats itself.

The network drafts everywhere else, and sees every committed row all the same, so that it can go on
wherever a copy ends.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_drift.drafters.prompt_lookup import LookupState, PromptLookupDrafter
from mlx_drift.drafters.protocol import (
    Choose,
    Draft,
    Drafter,
    DrafterCache,
    Propose,
    Source,
    first_chain,
    sources_of,
)
from mlx_drift.target.rewind import Snapshot


class CopyingState:
    """One conversation: what the drafter keeps of it, and where its tokens were seen before."""

    def __init__(self, own: DrafterCache, lookup: LookupState):
        self.token_bytes = lookup.token_bytes
        self.own = own
        self.lookup = lookup

    @property
    def state(self) -> Any:
        """The drafter's arrays, for `mx.eval`."""
        return self.own.state

    @property
    def seed(self) -> Any:
        """The drafter's."""
        return self.own.seed

    @seed.setter
    def seed(self, seed: Any) -> None:
        self.own.seed = seed

    @property
    def nbytes(self) -> int:
        """The bytes of both."""
        return self.own.nbytes + self.lookup.nbytes

    def parts(self) -> Iterator[Any]:
        """Yields the drafter's caches, where it has some."""
        yield from getattr(self.own, "parts", tuple)()

    def fork(self) -> "CopyingState":
        """Copies both."""
        return CopyingState(self.own.fork(), self.lookup.fork())

    def can_rewind(self, rows: int) -> bool:
        """Tells whether both can go back to when `rows` rows had been fed."""
        return self.own.can_rewind(rows) and self.lookup.can_rewind(rows)

    def rewind(self, rows: int) -> bool:
        """Goes back to when `rows` rows had been fed, if both can."""
        return self.can_rewind(rows) and self.own.rewind(rows) and self.lookup.rewind(rows)

    def snapshot(self) -> Snapshot:
        """Copies what `rewind` would not bring back."""
        return self.own.snapshot()

    def restore(self, snapshot: Snapshot, rows: int) -> bool:
        """Goes back to a snapshot, if the drafter can."""
        return self.own.restore(snapshot, rows) and self.lookup.rewind(rows)

    def to_arrays(self) -> dict[str, mx.array]:
        """Copies the drafter's arrays: a file has the tokens already."""
        return self.own.to_arrays()

    def check_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Checks the drafter's arrays; ValueError if they cannot be."""
        self.own.check_arrays(arrays)

    def from_arrays(self, arrays: dict[str, mx.array], rows: int) -> None:
        """Takes the drafter's arrays: the tokens have been ingested."""
        self.own.from_arrays(arrays, rows)


class CopyingDrafter:
    """Copies where the last tokens were seen before, else lets another drafter draft.

    Args:
        drafter: The other: a head, or a draft model.

    Attributes:
        drafter: The same.
    """

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.taps = drafter.taps
        self.model = drafter.model
        self.network = drafter.network
        self._lookup = PromptLookupDrafter(drafter.model)

    def make_cache(self) -> CopyingState:
        """Makes the empty state of one conversation."""
        return CopyingState(self.drafter.make_cache(), self._lookup.make_cache())

    def start(self, token: mx.array, cache: CopyingState) -> None:
        """Takes the first token of a conversation, `[1]`."""
        self._lookup.start(token, cache.lookup)
        self.drafter.start(token, cache.own)

    def ingest(self, tokens: mx.array, taps: mx.array, cache: CopyingState) -> None:
        """Appends committed tokens `[M]` with the taps `[M, A, T]` of one position earlier."""
        self._lookup.ingest(tokens, taps, cache.lookup)
        self.drafter.ingest(tokens, taps, cache.own)

    def sources(self, cache: CopyingState, missed: Sequence[int] = ()) -> dict[Source, Propose]:
        """Returns the copy, where there is something to copy, and the drafter's own drafts."""
        copies = self._lookup.sources(cache.lookup, missed)
        own = sources_of(self.drafter, cache.own, missed)
        return {
            **{source: self._copy for source in copies if not source.is_empty},
            **{source: partial(self._draft, propose) for source, propose in own.items()},
        }

    def propose(self, k: int, cache: CopyingState, chooser: Choose | None = None) -> Draft:
        """Drafts up to k tokens, from the first of its sources."""
        return first_chain(self.sources(cache))(k, cache, chooser)

    def _copy(self, k: int, cache: CopyingState, chooser: Choose | None = None) -> Draft:
        return self._lookup.propose(k, cache.lookup, chooser)

    def _draft(
        self, propose: Propose, k: int, cache: CopyingState, chooser: Choose | None = None
    ) -> Draft:
        return propose(k, cache.own, chooser)
