"""The store of conversations: whose prefix a prompt continues finds its caches here.

Notable:
- The longest prefix wins, whether it lies idle here, is in use by another conversation, or on disk.
  What is in use is forked, never shared; what a prompt merely extends is taken, what it branches
  off from is forked, so that both ways can be gone on with.
- Bounded in bytes: the least recently used leave, to the disk if there is one.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_drift.decode.prompt_cache import PromptCache
from mlx_drift.serve.model import LoadedModel

Tokens = NDArray[np.int32]


class Disk(Protocol):
    """Where caches go that do not fit (`mlx_drift.serve.disk`)."""

    def best(self, model: LoadedModel, tokens: Tokens) -> "tuple[int, object] | None":
        """Returns how many tokens of a prompt the best file would save, and which it is."""

    def load(self, model: LoadedModel, found: object) -> PromptCache | None:
        """Reads a file; None if it is damaged."""

    def save(self, model: LoadedModel, cache: PromptCache) -> None:
        """Writes a file."""


def as_tokens(tokens: Sequence[int]) -> Tokens:
    """Returns token ids as an array."""
    return np.asarray(tokens, dtype=np.int32)


def common(a: Tokens, b: Tokens) -> int:
    """Returns how many of the first tokens two have in common."""
    size = min(a.size, b.size)
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if differ.size else size


@dataclass(eq=False)
class Entry:
    """Caches that lie idle."""

    model: LoadedModel
    cache: PromptCache
    tokens: Tokens
    nbytes: int
    used_at: float = field(default_factory=time.monotonic)
    is_saved: bool = False


@dataclass(frozen=True)
class Found:
    """What a prompt finds.

    Attributes:
        cache: Caches of its own.
        reach: How many of its tokens they save.
        branch: How many it shares with what it branches off from: more, where that cannot be gone
            back to.
    """

    cache: PromptCache
    reach: int
    branch: int


class Store:
    """Keeps caches.

    Args:
        bound: Bytes of caches, those in use included.
        disk: Where caches go that do not fit.

    Attributes:
        evicted: How many caches had to leave.
    """

    def __init__(self, bound: int, disk: Disk | None = None):
        self.bound = bound
        self.disk = disk
        self.evicted = 0
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        """Returns how many caches lie idle."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """The bytes of all that lies idle."""
        return sum(entry.nbytes for entry in self._entries)

    def find(
        self, model: LoadedModel, prompt: Sequence[int], in_use: Iterable[PromptCache] = ()
    ) -> Found:
        """Finds the caches that save the most of a prompt, and makes them its own.

        Args:
            model: The model that answers.
            prompt: Token ids.
            in_use: Caches of other conversations of this model, between two of their steps.
        """
        tokens = as_tokens(prompt)
        reach, branch, best = 0, 0, None
        for entry in self._entries:
            if entry.model is model:
                shared = common(entry.tokens, tokens)
                branch = max(branch, shared)
                if (saved := entry.cache.reach(shared)) > reach:
                    reach, best = saved, entry
        other = None
        for cache in in_use:
            shared = common(as_tokens(cache.tokens), tokens)
            branch = max(branch, shared)
            if (saved := cache.reach(shared)) > reach:
                reach, other = saved, cache
        if self.disk is not None and (stored := self.disk.best(model, tokens)) is not None:
            saved, file = stored
            if saved > reach and (read := self.disk.load(model, file)) is not None:
                return Found(read, saved, max(branch, saved))
        if other is not None:
            return Found(model.fork(other), reach, branch)
        if best is None:
            return Found(model.make_cache(), 0, branch)
        best.used_at = time.monotonic()
        if reach == best.tokens.size:  # it only grows
            self._entries.remove(best)
            return Found(best.cache, reach, branch)
        return Found(model.fork(best.cache), reach, branch)

    def put(self, model: LoadedModel, cache: PromptCache) -> None:
        """Takes caches in that are no longer in use."""
        if not cache.whole or cache.is_ahead or len(cache.tokens) < 2:
            return
        entry = Entry(model, cache, as_tokens(cache.tokens), cache.nbytes)
        self._entries = [e for e in self._entries if not self._holds(entry, e)]
        self._entries.append(entry)

    def shrink(self, room: int) -> bool:
        """Lets the least recently used go until the rest takes no more than `room` bytes.

        Returns:
            Whether it does.
        """
        while self._entries and self.nbytes > room:
            self._let_go(min(self._entries, key=lambda entry: entry.used_at))
            self.evicted += 1
        return room >= 0

    def forget(self, model: LoadedModel) -> None:
        """Lets all caches of a model go."""
        for entry in [e for e in self._entries if e.model is model]:
            self._let_go(entry)

    def save_one(self) -> bool:
        """Writes the cache that was used last and is not on disk; tells whether there was one."""
        unsaved = [entry for entry in self._entries if not entry.is_saved]
        if self.disk is None or not unsaved:
            return False
        entry = max(unsaved, key=lambda entry: entry.used_at)
        entry.is_saved = True
        self.disk.save(entry.model, entry.cache)
        return True

    def _let_go(self, entry: Entry) -> None:
        self._entries.remove(entry)
        if self.disk is not None and not entry.is_saved:
            self.disk.save(entry.model, entry.cache)

    @staticmethod
    def _holds(new: Entry, old: Entry) -> bool:
        """Tells whether a new entry brings back all that an old one does."""
        if old.model is not new.model or new.model.footprint.copies:
            return False
        return common(old.tokens, new.tokens) == old.tokens.size
