"""Prompt lookup: what followed these last tokens the last time (Saxena 2023).

No model at all. It pays where an answer repeats its prompt: summaries, edits, code.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.protocol import Choose, Draft
from mlx_drift.target.rewind import Snapshot

LONGEST = 3
"""How many of the last tokens are looked for, at most: longer matches are tried first."""


class LookupState:
    """One conversation: its tokens, and where each run of up to `longest` tokens was seen last.

    Attributes:
        tokens: All tokens.
        ends: For each run of tokens the position after it, where it was seen last; and the
            position before that, since the last run of all is followed by nothing.
    """

    state: tuple[()] = ()
    seed: tuple[()] = ()
    nbytes = 0

    def __init__(self, longest: int):
        self.longest = longest
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], tuple[int, int | None]] = {}

    def append(self, tokens: Sequence[int]) -> None:
        """Takes further tokens."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            for length in range(1, min(self.longest, end) + 1):
                run = tuple(self.tokens[-length:])
                self.ends[run] = end, self.ends.get(run, (None, None))[0]

    def fork(self) -> "LookupState":
        """Copies it."""
        other = LookupState(self.longest)
        other.tokens, other.ends = self.tokens.copy(), self.ends.copy()
        return other

    def can_rewind(self, rows: int) -> bool:
        """Tells whether the target has been fed `rows` rows."""
        return rows < len(self.tokens)

    def rewind(self, rows: int) -> bool:
        """Goes back to when the target had been fed `rows` rows."""
        if not self.can_rewind(rows):
            return False
        tokens, self.tokens, self.ends = self.tokens[: rows + 1], [], {}
        self.append(tokens)
        return True

    def snapshot(self) -> Snapshot:
        """Copies nothing: every earlier point can be gone back to."""
        return []

    def restore(self, snapshot: Snapshot, rows: int) -> bool:
        """Goes back as `rewind` does."""
        return self.rewind(rows)

    def to_arrays(self) -> dict[str, mx.array]:
        """Copies nothing: a file has the tokens already."""
        return {}

    def check_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Checks that there are none; ValueError if there are."""
        if arrays:
            raise ValueError(f"{min(arrays)} is unknown")

    def from_arrays(self, arrays: dict[str, mx.array], rows: int) -> None:
        """Takes nothing: the tokens have been ingested."""


class PromptLookupDrafter:
    """Drafts what followed the last tokens where they were seen before.

    Args:
        model: The target.
        longest: How many of the last tokens to look for, at most.
    """

    taps = ()

    def __init__(self, model: nn.Module, longest: int = LONGEST):
        self.model = model
        self.network = nn.Module()
        self.longest = longest

    def make_cache(self) -> LookupState:
        """Makes the empty state of one conversation."""
        return LookupState(self.longest)

    def start(self, token: mx.array, cache: LookupState) -> None:
        """Takes the first token of a conversation, `[1]`."""
        cache.append(token.tolist())  # type: ignore[arg-type]

    def ingest(self, tokens: mx.array, taps: mx.array, cache: LookupState) -> None:
        """Appends committed tokens `[M]`; there are no taps."""
        cache.append(tokens.tolist())  # type: ignore[arg-type]

    def propose(self, k: int, cache: LookupState, chooser: Choose | None = None) -> Draft:
        """Drafts up to k tokens, with certainty; none where nothing is found."""
        drafted: list[int] = []
        for length in range(min(self.longest, len(cache.tokens)), 0, -1):
            _, end = cache.ends[tuple(cache.tokens[-length:])]
            if end is not None:
                drafted = cache.tokens[end : end + k]
                break
        return Draft(mx.array(drafted, dtype=mx.int32))
