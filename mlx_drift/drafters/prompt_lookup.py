"""Prompt lookup: what followed these last tokens the last time (Saxena 2023).

No model at all. It pays where an answer repeats its prompt: summaries, edits, code.

Notable:
- Every run of `RUN` tokens is chained to where it stood before, as Deflate's encoders do (RFC 1951
  §4). Of the places a chain leads to the one that agrees furthest back is copied from, the latest
  of those that agree alike.
- A match that went on is the longest one still: had another been longer, so it would have been a
  token ago. So the chain is gone through only where a match ends.
- A place may lie so near that the copy runs into what it copies: "5 5 5" is followed by fives.
"""

import sys
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.protocol import Choose, Draft, Propose, Source
from mlx_drift.target.rewind import Snapshot

RUN = 3
"""Tokens that must agree at least."""

PLACES, FURTHEST = 64, 64
"""Places that are compared, the latest ones, and how far back each is."""

BELIEVED = 8
"""Tokens that count as agreeing where a text is said to come."""

WINDOW = 1 << 17
"""Tokens back that are found again. An index of so many takes about 20 MB."""

TOKEN_BYTES = 192
"""What an index takes a token at most."""

MATCHES = 32, 24, 16, 12, 8, 6, 5, 4, RUN
"""Lengths of a match that are told apart: one counts as the longest of them that it reaches."""


class LookupState:
    """One conversation: its tokens, and where each run of them was seen before.

    Args:
        window: Tokens back that are found again.

    Attributes:
        tokens: All tokens.
        ahead: How many of them have yet to be ingested.
    """

    token_bytes = TOKEN_BYTES
    state: tuple[()] = ()
    seed: tuple[()] = ()

    def __init__(self, window: int = WINDOW):
        self.window = window
        self.tokens: list[int] = []
        self.ahead = 0
        self._latest: dict[tuple[int, ...], int] = {}  # each run's end, where it was seen last
        self._before: list[int] = []  # for each end its run's end before it; 0 for none
        self._match: tuple[int, int] | None = 0, 0  # None until it is asked for

    @property
    def nbytes(self) -> int:
        """The bytes it holds, about."""
        run = sys.getsizeof((0,) * RUN) + sys.getsizeof(1 << 20)
        lists = sys.getsizeof(self.tokens) + sys.getsizeof(self._before)
        return lists + sys.getsizeof(self._latest) + len(self._latest) * run

    def append(self, tokens: Sequence[int]) -> None:
        """Takes further tokens."""
        for token in tokens:
            self._follow(token)
            self.tokens.append(token)
            end = len(self.tokens)
            run = self._run(end)
            self._before.append(self._latest.get(run, 0))
            self._latest[run] = end
            if self._latest.get(gone := self._run(end - self.window)) == end - self.window:
                del self._latest[gone]

    def ingest(self, tokens: Sequence[int]) -> None:
        """Takes further tokens, unless `look_ahead` has."""
        known = min(self.ahead, len(tokens))
        self.ahead -= known
        self.append(tokens[known:])

    def look_ahead(self, tokens: Sequence[int]) -> None:
        """Takes tokens that have yet to be ingested: all of those, again and again."""
        self.append(tokens[self.ahead :])
        self.ahead = len(tokens)

    def match(self) -> tuple[int, int]:
        """Finds the longest match of the last tokens: its end, and its length; 0, 0 for none."""
        if self._match is None:
            self._match = self._search()
        return self._match

    def copy(self, k: int) -> list[int]:
        """Returns k tokens that follow the match; none if there is none."""
        end, length = self.match()
        if not length:
            return []
        copied = self.tokens[end : end + k]
        while len(copied) < k:  # it runs into itself
            copied.append(copied[end - len(self.tokens) + len(copied)])
        return copied

    def fork(self) -> "LookupState":
        """Copies it."""
        other = LookupState(self.window)
        other.tokens, other.ahead, other._match = self.tokens.copy(), self.ahead, self._match
        other._latest, other._before = self._latest.copy(), self._before.copy()
        return other

    def can_rewind(self, rows: int) -> bool:
        """Tells whether the target has been fed `rows` rows."""
        return rows < len(self.tokens)

    def rewind(self, rows: int) -> bool:
        """Goes back to when the target had been fed `rows` rows."""
        if not self.can_rewind(rows):
            return False
        while len(self.tokens) > rows + 1:  # what `append` did, backwards
            end = len(self.tokens)
            if end > self.window:
                self._latest.setdefault(self._run(end - self.window), end - self.window)
            run = self._run(end)
            if before := self._before.pop():
                self._latest[run] = before
            else:
                del self._latest[run]
            self.tokens.pop()
        self.ahead, self._match = 0, None
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

    def _run(self, end: int) -> tuple[int, ...]:
        """Returns the run that ends there; fewer tokens at the beginning."""
        return tuple(self.tokens[max(0, end - RUN) : max(0, end)])

    def _follow(self, token: int) -> None:
        """Says what the match is once this token is there, if it can be told at once."""
        end, length = self._match or (0, 0)
        goes_on = length and self.tokens[end] == token
        self._match = (end + 1, length + 1) if goes_on else None

    def _search(self) -> tuple[int, int]:
        """Goes through the places where the last run was seen before."""
        tokens, last = self.tokens, len(self.tokens)
        best, found, place = 0, 0, self._before[-1] if last > RUN else 0
        for _ in range(PLACES):
            if not place or last - place >= self.window:
                break
            length = RUN
            most = min(place, FURTHEST)
            while length < most and tokens[place - length - 1] == tokens[last - length - 1]:
                length += 1
            if length > found:
                best, found = place, length
            place = self._before[place - 1]
        return best, found


class PromptLookupDrafter:
    """Drafts what followed the last tokens where they were seen before.

    Args:
        model: The target.
        shortest: How many of the last tokens must agree, at least `RUN`.
    """

    taps = ()

    def __init__(self, model: nn.Module, shortest: int = RUN):
        self.model = model
        self.network = nn.Module()
        self.shortest = max(RUN, shortest)

    def make_cache(self) -> LookupState:
        """Makes the empty state of one conversation."""
        return LookupState()

    def start(self, token: mx.array, cache: LookupState) -> None:
        """Takes the first token of a conversation, `[1]`."""
        cache.append(token.tolist())  # type: ignore[arg-type]

    def ingest(self, tokens: mx.array, taps: mx.array, cache: LookupState) -> None:
        """Appends committed tokens `[M]`; there are no taps."""
        cache.ingest(tokens.tolist())  # type: ignore[arg-type]

    def sources(self, cache: LookupState, missed: Sequence[int] = ()) -> dict[Source, Propose]:
        """Returns the copy that `propose` would make, by the length of its match."""
        cache.look_ahead(missed)
        _, length = cache.match()
        match = _counted(length) if length >= self.shortest else 0
        return {Source("copy", match): self.propose}

    def propose(self, k: int, cache: LookupState, chooser: Choose | None = None) -> Draft:
        """Drafts k tokens, with certainty; none where nothing is found."""
        _, length = cache.match()
        return Draft(mx.array(cache.copy(k) if length >= self.shortest else [], dtype=mx.int32))


def _counted(length: int) -> int:
    """Returns what a match counts as."""
    return next((match for match in MATCHES if match <= length), 0)
