"""A drafter that expects a text: OpenAI's predicted outputs, an edited file say.

What is expected is copied as long as the answer follows it, from its beginning, and again from
wherever the answer comes back to it. It serves one answer; of it nothing stays in the caches.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_drift.drafters.prompt_lookup import BELIEVED, LookupState, PromptLookupDrafter
from mlx_drift.drafters.protocol import (
    Choose,
    Draft,
    Drafter,
    Propose,
    Source,
    first_chain,
    sources_of,
)


class Expected(LookupState):
    """What is expected, and the answer after it.

    Args:
        tokens: What is expected, token ids.

    Attributes:
        size: How many they are.
        followed: Tokens of the answer that were expected where they came.
    """

    def __init__(self, tokens: Sequence[int]):
        super().__init__()
        super().append(tokens)
        self.size = len(tokens)
        self.followed = 0
        self._match = 0, BELIEVED  # its own beginning comes next

    def append(self, tokens: Sequence[int]) -> None:
        """Takes further tokens of the answer."""
        for token in tokens:
            end, length = self.match()
            self.followed += bool(length) and end < self.size and self.tokens[end] == token
            super().append([token])


class ExpectingDrafter:
    """Copies what is expected, else lets another drafter draft.

    Args:
        drafter: The other.
        expected: Token ids that the answer may have.
        cache: The conversation's state. What is fed to another, a copy of it, is not the answer's.
    """

    def __init__(self, drafter: Drafter, expected: Sequence[int], cache: Any):
        self.drafter = drafter
        self.taps = drafter.taps
        self.model = drafter.model
        self.network = drafter.network
        self.make_cache, self.start = drafter.make_cache, drafter.start
        self._cache = cache
        self._lookup = PromptLookupDrafter(drafter.model)
        self._expected = Expected(expected)

    @property
    def counts(self) -> tuple[int, int]:
        """How many expected tokens came, and how many did not."""
        followed = self._expected.followed
        return followed, max(0, self._expected.size - followed)

    def ingest(self, tokens: mx.array, taps: mx.array, cache: Any) -> None:
        """Appends committed tokens `[M]` with the taps `[M, A, T]` of one position earlier."""
        if cache is self._cache:
            self._lookup.ingest(tokens, taps, self._expected)
        self.drafter.ingest(tokens, taps, cache)

    def sources(self, cache: Any, missed: Sequence[int] = ()) -> dict[Source, Propose]:
        """Returns the copy of what is expected, unless another copy has the longer match."""
        offered = sources_of(self.drafter, cache, missed)
        (copy,) = self._lookup.sources(self._expected, missed)
        if copy.is_empty or any(one.match > copy.match for one in offered):
            return offered
        return {copy: self._copy} | {s: own for s, own in offered.items() if s.kind != "copy"}

    def propose(self, k: int, cache: Any, chooser: Choose | None = None) -> Draft:
        """Drafts up to k tokens, from the first of its sources."""
        return first_chain(self.sources(cache))(k, cache, chooser)

    def _copy(self, k: int, cache: Any, chooser: Choose | None = None) -> Draft:
        return self._lookup.propose(k, self._expected, chooser)
