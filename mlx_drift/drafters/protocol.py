"""What the decoding loop asks of a drafter, whatever its kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, Self, runtime_checkable

import mlx.core as mx

from mlx_drift.target.rewind import Snapshot
from mlx_drift.target.tree import Tree

MAX_DRAFT_TOKENS = 64
"""More drafts a round than any drafter was ever trained for; a larger number is a mistake."""


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for one round, lazy.

    Attributes:
        tokens: Target token ids `[k]` int32.
        log_probabilities: What they were drawn with, over the target's vocabulary, `[k, V]`; None
            if there was no chance in it, and in a tree.
        parents: Which draft each one follows, one before it, `[k]` int32; −1 for the last committed
            token. None where each follows the one before: a chain.
        finite: Whether the drafter's states, or logits, were finite to the end, `[1]` bool; None
            if it has none.
    """

    tokens: mx.array
    log_probabilities: mx.array | None = None
    finite: mx.array | None = None
    parents: mx.array | None = None

    @cached_property
    def tree(self) -> Tree | None:
        """How the rows branch that verify it: the last committed token's, and one for each draft.

        None if they do not: one draft does not either.
        """
        if self.parents is None or self.parents.size < 2:
            return None
        return Tree.of(self.parents)


def are_finite(logits: mx.array) -> mx.array:
    """Tells of draft logits `[M, V]` whether they mean something, `[1]` bool.

    Some are minus infinity where tokens are ruled out; the largest of a row is a number.
    """
    return mx.all(mx.isfinite(mx.max(logits, axis=-1)), keepdims=True)


class Choose(Protocol):
    """What a round chooses drafts with (`mlx_drift.decode.chooser.Chooser`)."""

    @property
    def drafts_greedily(self) -> bool:
        """Whether a draft is simply the likeliest token."""

    @property
    def processes(self) -> bool:
        """Whether logits are processed before tokens are chosen."""

    @property
    def tells_tokens_apart(self) -> bool:
        """Whether it matters which tokens logits are of: to processors, and to XTC's exceptions."""

    def likeliest(self, logits: mx.array, drafted: Sequence[mx.array]) -> mx.array:
        """Chooses the likeliest token `[1]`, for certain; arguments as in `draft`."""

    def draft(
        self, logits: mx.array, drafted: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """Chooses a token `[1]` by logits `[1, V]`.

        Args:
            logits: Over the target's vocabulary; over a part of it where tokens are not told apart.
            drafted: The drafts before it, `[1]` each.

        Returns:
            Its column, and the log-probabilities it was drawn with, `[1, V]`; None for certainty.
        """

    def on_paths(
        self, logits: mx.array, tokens: mx.array | None = None, parents: mx.array | None = None
    ) -> mx.array:
        """Processes the logits of one level of a tree, each row by the drafts before it.

        Args:
            logits: Over the target's vocabulary, `[B, V]`.
            tokens: The drafts that they come after, `[B]`; None for the last committed token.
            parents: Which of those of the level before each of them follows, `[B]`.
        """


Propose = Callable[[int, Any, Choose | None], Draft]
"""`Drafter.propose`, or what drafts in its place."""


Kind = Literal["network", "tree", "copy", "forced"]
"""Where drafts come from: a network drafts a chain of them, or a tree; what followed the last
tokens before is copied; a grammar leaves no choice."""


@dataclass(frozen=True)
class Source:
    """What the drafts of a round come from.

    Attributes:
        kind: Where from.
        match: Of a copy, how many of the last tokens agree, rounded down to one of a few lengths;
            0 where there is nothing to copy. Of what is forced, how many tokens are.
    """

    kind: Kind = "network"
    match: int = 0

    @property
    def is_tree(self) -> bool:
        """Whether they branch."""
        return self.kind == "tree"

    @property
    def is_free(self) -> bool:
        """Whether they cost next to nothing: no network is asked."""
        return self.kind in ("copy", "forced")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draft."""
        return self.is_free and not self.match


NETWORK, TREE = Source(), Source("tree")


class DrafterCache(Protocol):
    """All state of one conversation: one row for every token but the first.

    `mlx_drift.target.rewind.Caches` has it all.
    """

    seed: Any
    """What the next draft starts from, beside the rows; None if there is nothing yet."""

    @property
    def state(self) -> Any:
        """Its arrays, as a tree for `mx.eval`."""

    @property
    def nbytes(self) -> int:
        """The bytes it holds."""

    def fork(self) -> Self:
        """Copies it: neither sees what the other is fed from then on."""

    def can_rewind(self, rows: int) -> bool:
        """Tells whether `rewind` can go back to when `rows` rows had been fed."""

    def rewind(self, rows: int) -> bool:
        """Goes back to when `rows` rows had been fed, if it can."""

    def snapshot(self) -> Snapshot:
        """Copies what `rewind` would not bring back."""

    def restore(self, snapshot: Snapshot, rows: int) -> bool:
        """Goes back to a snapshot that was taken when `rows` rows had been fed, if it can."""

    def to_arrays(self) -> dict[str, mx.array]:
        """Copies all that rows to come may see, for a file."""

    def check_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Checks what a file says `to_arrays` gave at as many rows; ValueError if it cannot be."""

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

    def start(self, token: mx.array, cache: Any) -> None:
        """Takes the first token of a conversation, `[1]`, which no tap comes before."""

    def ingest(self, tokens: mx.array, taps: mx.array, cache: Any) -> None:
        """Appends committed tokens `[M]` with the taps `[M, A, T]` of one position earlier."""

    def propose(self, k: int, cache: Any, chooser: Choose | None = None) -> Draft:
        """Drafts up to k tokens to follow the committed ones; the likeliest without a chooser."""


@runtime_checkable
class Copies(Protocol):
    """A drafter that does not, or not only, draft with a network."""

    def sources(self, cache: Any, missed: Sequence[int]) -> dict[Source, Propose]:
        """Tells what the next drafts may come from, copies first, and what drafts from it.

        Args:
            cache: The conversation's state.
            missed: Committed tokens that have yet to be ingested.
        """


@runtime_checkable
class Branches(Protocol):
    """A drafter that may draft trees."""

    def propose_tree(self, k: int, cache: Any, chooser: Choose | None = None) -> Draft:
        """Drafts a tree of up to k tokens, in which no two that follow the same are the same."""


def sources_of(drafter: Drafter, cache: Any, missed: Sequence[int] = ()) -> dict[Source, Propose]:
    """Tells what a drafter's next drafts may come from (`Copies.sources`), a chain last."""
    offers: Any = drafter
    if _follows(type(drafter), Copies):
        found: dict[Source, Propose] = offers.sources(cache, missed)
        return found
    if _follows(type(drafter), Branches):
        return {TREE: offers.propose_tree, NETWORK: drafter.propose}
    return {NETWORK: drafter.propose}


@lru_cache
def _follows(cls: type, protocol: type) -> bool:
    """Tells whether a class follows a protocol: Python looks for all its members every time."""
    return issubclass(cls, protocol)


def first_chain(sources: dict[Source, Propose]) -> Propose:
    """Returns what drafts from the first of some sources that is no tree."""
    return next(propose for source, propose in sources.items() if not source.is_tree)
