"""Places a conversation can go back to where its rows cannot be trimmed.

That is past the wrap of a sliding window, or in a recurrent state. Snapshots are taken at the
starts and ends of turns, the oldest of which are dropped, and at marks, where other prompts may
branch off.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_drift.drafters.protocol import DrafterCache
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.rewind import Snapshot

MOST_KEPT = 4
"""Snapshots of marks that are kept, beside those of turns."""


@dataclass(frozen=True)
class _Place:
    """The caches' state `tokens` tokens into the conversation.

    Attributes:
        seed: Of the drafter's next draft.
        keep: It is of a mark: turns to come do not displace it.
    """

    tokens: int
    target: Snapshot
    drafter: Snapshot
    seed: Any
    keep: bool


class Snapshots:
    """Those of one conversation, in its order.

    Args:
        most: How many of turns are kept; with 0 none is taken, of marks neither.
    """

    def __init__(self, most: int):
        self.most = most
        self._places: list[_Place] = []

    def __len__(self) -> int:
        """How many there are."""
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """The bytes they hold."""
        arrays = tree_flatten([[one.target, one.drafter, one.seed] for one in self._places])
        return sum(array.nbytes for _, array in arrays if array is not None)

    def fork(self) -> "Snapshots":
        """Copies the list; what the snapshots hold does not change, and is shared."""
        other = Snapshots(self.most)
        other._places = list(self._places)
        return other

    def take(self, tokens: int, target: TargetCache, drafter: DrafterCache, keep: bool) -> None:
        """Takes a snapshot, if there is what trimming would not bring back.

        Args:
            tokens: Of the conversation, that the caches have seen.
            target: The target's caches.
            drafter: The drafter's.
            keep: It is of a mark.
        """
        if not self.most or tokens < 2:
            return
        keep = keep or any(one.keep for one in self._places if one.tokens == tokens)
        place = _Place(tokens, target.snapshot(), drafter.snapshot(), drafter.seed, keep)
        if any(arrays for arrays in (*place.target, *place.drafter)):
            mx.eval(place.target, place.drafter, place.seed)
            places = [*(one for one in self._places if one.tokens != tokens), place]
            kept = [one for one in places if one.keep][-MOST_KEPT:]
            passing = [one for one in places if not one.keep][-self.most :]
            self._places = sorted([*kept, *passing], key=lambda one: one.tokens)

    def restore(self, shared: int, target: TargetCache, drafter: DrafterCache) -> int:
        """Brings caches back to the last snapshot within the first `shared` tokens.

        Returns:
            How many tokens it is of; 0 if there is none, or the caches cannot take one back.
        """
        for place in reversed(self._places):
            if (
                place.tokens <= shared
                and target.restore(place.target, place.tokens - 1)
                and drafter.restore(place.drafter, place.tokens - 1)
            ):
                drafter.seed = place.seed
                return place.tokens
        return 0

    def reach(self, shared: int) -> int:
        """How many tokens the last snapshot within the first `shared` ones is of; 0 for none."""
        return max((one.tokens for one in self._places if one.tokens <= shared), default=0)

    def forget(self, shared: int) -> None:
        """Drops those beyond the first `shared` tokens."""
        self._places = [one for one in self._places if one.tokens <= shared]
