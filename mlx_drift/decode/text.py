"""What the rounds commit, and what they need to know of it."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_drift.decode.chooser import Chooser
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.sources import possible_sources
from mlx_drift.decode.tree_shape import Levels
from mlx_drift.drafters.protocol import Drafter, DrafterCache, Kind, Propose, Source, sources_of
from mlx_drift.target.caches import TargetCache

Settle = Callable[[TargetCache, DrafterCache], None]
"""Makes the caches, or forks of them, what they are after a round that is ahead of nothing."""


@dataclass(frozen=True)
class Origin:
    """Who said a token.

    Attributes:
        by: The target; or a draft, a copy, or a grammar that left no choice, and the target then
            accepted it.
        position: Its place among the drafts of its round, from 1; 0 for the target's own.
    """

    by: Literal["target", "draft", "copy", "forced"] = "target"
    position: int = 0

    def __str__(self) -> str:
        """Returns it in words."""
        return f"{self.by} {self.position}" if self.position else self.by


@dataclass(frozen=True)
class Round:
    """What one target pass committed."""

    tokens: list[int]
    log_probabilities: list[mx.array]  # [V] for each token: the target's, it was chosen from
    accepted: int  # the first `accepted` tokens were drafted
    tested: int  # drafts that were tested (see `mlx_drift.decode.statistics`)
    seconds: float  # from the round's start to its synchronisation
    # Of the whole round, spent in Python: building graphs, reading results; and waiting for rows,
    # where a processor keeps a state.
    host_seconds: float
    source: Kind = "network"  # of the drafts
    levels: Levels = ()  # of a tree that was tested
    is_plain: bool = False  # a token of plain decoding: nothing was drafted
    is_finite: bool = True  # all that the drafter computed for it
    is_last: bool = False  # nothing is wanted after it
    settle: Settle | None = None  # what the caches need until the next round, if they are ahead

    @property
    def origins(self) -> list[Origin]:
        """Who said each of the tokens."""
        by = self.source if self.source in ("copy", "forced") else "draft"
        drafted = [Origin(by, position) for position in range(1, self.accepted + 1)]
        return drafted + [Origin()] * (len(self.tokens) - self.accepted)


class Text:
    """The committed tokens, as far as what comes after depends on them.

    Args:
        last: The last committed token `[1]`.
        max_tokens: Tokens to commit; −1 for no limit.
        stop_tokens: Token ids after which nothing is wanted.
        sampling: What tokens are drawn from.
        key: The randomness, at a temperature above 0.
        history: All committed tokens, for logits processors.

    Attributes:
        last: The last committed token `[1]`.
        fresh: Those committed last, `[M]`.
        remaining: Tokens yet to commit; negative for no limit.
        finished: Nothing is wanted after them.
    """

    def __init__(
        self,
        last: mx.array,
        max_tokens: int,
        stop_tokens: AbstractSet[int],
        sampling: Sampling,
        key: mx.array | None,
        history: Sequence[int],
    ):
        self.last = self.fresh = last
        self.remaining = max_tokens
        self.finished = False
        self._stop_tokens = stop_tokens
        self._sampling = sampling
        self._key = key
        self._has_readers = bool(sampling.logits_processors)
        self._history = mx.array(list(history) if self._has_readers else [], dtype=mx.int32)

    @property
    def state(self) -> list[mx.array | None]:
        """The arrays that what comes after depends on."""
        return [self._key, self._history]

    def sources(
        self,
        drafter: Drafter,
        cache: DrafterCache,
        missed: Sequence[int] = (),
        under_way: int = 0,
    ) -> dict[Source, Propose]:
        """Tells what the next drafts may come from, as far as logits processors let them come.

        Args:
            drafter: The drafter.
            cache: Its cache.
            missed: Committed tokens that it has yet to be fed.
            under_way: Tokens that will be committed before.
        """
        sources = sources_of(drafter, cache, missed)
        if not self._has_readers:
            return sources
        processors = self._sampling.logits_processors
        return possible_sources(processors, self._history, sources, cache, under_way)

    def chooser(self, k: int) -> Chooser:
        """Returns what chooses the next tokens: k drafts at most, and the one after them."""
        round_key = None
        if self._key is not None:
            self._key, round_key = mx.random.split(self._key)
        return Chooser(self._sampling, k, round_key, self._history, self._stop_tokens)

    def commit(self, tokens: list[int]) -> list[int]:
        """Commits tokens up to the first after which nothing is wanted, and returns those."""
        stop = next((i for i, token in enumerate(tokens) if token in self._stop_tokens), None)
        if stop is not None:
            tokens = tokens[: stop + 1]
        self.fresh, self.last = mx.array(tokens), mx.array(tokens[-1:])
        if self._has_readers:
            self._history = mx.concatenate([self._history, self.fresh])
        self.remaining -= len(tokens)
        self.finished = stop is not None or self.remaining == 0
        return tokens
