"""What all drafters share that are heads on a target's states, however they draft."""

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import mlx.core as mx

from mlx_drift.drafters.protocol import Choose, Draft, are_finite
from mlx_drift.drafters.schema import DrafterConfig, LayersConfig
from mlx_drift.drafters.tree import DEPTH, Follow, grow
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target


class HeadDrafter(ABC):
    """A network of its own, the target's embedding and head where it brings none, a vocabulary.

    Args:
        config: The drafter's config.
        network: Its weights.
        target: What it drafts for; lends its embedding and head where the drafter has none.
        d2t: Target token id of each draft token id, `[D]` int32; None if they are the same.

    Attributes:
        max_drafts: How many drafts a round it was made for; None where there is no such number.
    """

    max_drafts: int | None = None

    def __init__(
        self, config: DrafterConfig, network: Any, target: Target, d2t: mx.array | None = None
    ):
        self.config = config
        self.network = network
        self.taps = config.taps
        self.model = target.model
        own, rows = network.get("embed_tokens", None), config.target.vocab_size
        self._embed: Callable[[mx.array], mx.array] = target.embed if own is None else own
        self._head: Callable[[mx.array], mx.array] = network.get("lm_head", target.head)
        self._d2t = d2t
        self._vocab_size = target.shape.vocab_size
        self._draft_vocab_size = getattr(config, "draft_vocab_size", rows)
        if own is not None and rows < self._vocab_size:  # padding may be spoken, if it never is
            self._embed = lambda tokens: own(mx.minimum(tokens, rows - 1))

    def through(self, network: Any) -> Self:
        """Returns this drafter with another network in its place: one around its own, say.

        Args:
            network: What does what its own did; embedding and head stay what they are.
        """
        other = copy.copy(self)
        other.network = network
        return other

    @abstractmethod
    def make_cache(self) -> Any:
        """Makes the empty state of one conversation."""

    @abstractmethod
    def ingest(self, tokens: mx.array, taps: mx.array, cache: Any) -> None:
        """Appends committed tokens `[M]` with the taps `[M, A, T]` of one position earlier."""

    @abstractmethod
    def propose(self, k: int, cache: Any, chooser: Choose | None = None) -> Draft:
        """Drafts up to k tokens to follow the committed ones; the likeliest without a chooser."""

    def start(self, token: mx.array, cache: Any) -> None:  # noqa: B027
        """Does nothing: the first row is the second token's, with the taps of the first."""

    def _nothing(self) -> Draft:
        """Drafts nothing: there is nothing to go by yet."""
        return Draft(mx.zeros((0,), mx.int32))

    def choose(self, logits: mx.array) -> mx.array:
        """Picks the likeliest tokens of draft logits `[M, D]`, as target token ids `[M]` int32."""
        return self._target_ids(mx.argmax(logits, axis=-1).astype(mx.int32))

    def _target_ids(self, drafted: mx.array) -> mx.array:
        """Returns the target's ids of draft token ids `[M]`."""
        return drafted if self._d2t is None else self._d2t[drafted]

    def of_draft_vocabulary(self, logits: mx.array) -> mx.array:
        """Takes the draft vocabulary's columns of the target's logits `[M, V]`: `[M, D]`."""
        if self._d2t is not None:
            return logits[:, self._d2t]
        return logits[:, : self._draft_vocab_size]

    def drafts(self, tokens: mx.array) -> mx.array:
        """Tells of target token ids `[M]` which of them the draft vocabulary has, `[M]` bool."""
        ids = mx.arange(self._draft_vocab_size) if self._d2t is None else self._d2t
        known = mx.zeros((self._vocab_size,), mx.bool_)
        known[ids] = True
        return known[tokens]

    def _certain(self, logits: mx.array, chooser: Choose | None) -> Draft:
        """Drafts the likeliest tokens of draft logits `[k, D]`, with certainty.

        That is how drafts are made that do not know of each other. Drawn each from its own
        distribution they would be as lossless, but would not fit together: a third of them is
        accepted (z-lab/dflash #169).
        """
        if chooser is None or not chooser.processes:
            return Draft(self.choose(logits), finite=are_finite(logits))
        tokens: list[mx.array] = []
        for row in mx.split(self._spread(logits), logits.shape[0]):
            tokens.append(chooser.likeliest(row, tokens))
        return Draft(mx.concatenate(tokens), finite=are_finite(logits))

    def _in_turn(
        self,
        k: int,
        chooser: Choose | None,
        logits_after: Callable[[mx.array | None, int], mx.array],
    ) -> tuple[mx.array, mx.array | None, list[mx.array]]:
        """Drafts k tokens one after another.

        Args:
            k: How many.
            chooser: What tokens are chosen with; None for the likeliest.
            logits_after: Gives the draft logits `[1, D]` of a place, counted from 0, by the token
                drafted before it, `[1]`; None before the first.

        Returns:
            The tokens `[k]`, what they were drawn with, as in `Draft`, and their draft logits,
            `[1, D]` each.
        """
        tokens: list[mx.array] = []
        drawn_with: list[mx.array] = []
        rows: list[mx.array] = []
        token = None
        apart = chooser is not None and chooser.tells_tokens_apart
        for place in range(k):
            logits = logits_after(token, place)
            rows.append(logits)
            if chooser is None or chooser.drafts_greedily:
                token, log_probabilities = self.choose(logits), None
            elif apart:
                token, log_probabilities = chooser.draft(self._spread(logits), tokens)
            else:  # the draft vocabulary is the smaller one to draw from
                drafted, log_probabilities = chooser.draft(logits, tokens)
                token = self._target_ids(drafted)
            tokens.append(token)
            if log_probabilities is not None:
                drawn_with.append(log_probabilities)
        log_q = mx.concatenate(drawn_with) if drawn_with else None
        if log_q is not None and not apart:
            log_q = self._spread(log_q)
        return mx.concatenate(tokens), log_q, rows

    def _grown(
        self, k: int, chooser: Choose | None, first: mx.array, follow: Follow, levels: int = DEPTH
    ) -> Draft:
        """Drafts a tree of k tokens; where logits are processed, each by its own path.

        Args:
            k: How many.
            chooser: What processes logits; None for nothing.
            first: Draft logits of what follows the text, `[1, D]`.
            follow: Drafts on, as `mlx_drift.drafters.tree` has it; but by target token ids.
            levels: Levels at most.
        """

        def on(ids: mx.array, parents: mx.array) -> mx.array:
            return follow(self._target_ids(ids), parents)

        def processed(tokens: mx.array, parents: mx.array) -> mx.array:
            assert chooser is not None
            return chooser.on_paths(self._spread(follow(tokens, parents)), tokens, parents)

        if chooser is None or not chooser.processes:
            ids, parents = grow(first, on, k, levels)
            return Draft(self._target_ids(ids), parents=parents)
        tokens, parents = grow(chooser.on_paths(self._spread(first)), processed, k, levels)
        return Draft(tokens, parents=parents)

    def _spread(self, logits: mx.array) -> mx.array:
        """Lays draft logits `[M, D]` out over the target's vocabulary, `[M, V]`."""
        if self._d2t is None:
            padding = self._vocab_size - logits.shape[-1]
            if padding == 0:
                return logits
            return mx.pad(logits, [(0, 0), (0, padding)], constant_values=-mx.inf)
        spread = mx.full((logits.shape[0], self._vocab_size), -mx.inf, logits.dtype)
        return mx.put_along_axis(spread, mx.broadcast_to(self._d2t, logits.shape), logits, axis=-1)


class SlotsDrafter(HeadDrafter):
    """A head whose drafts do not know of each other: one pass fills the slots of all of them."""

    @abstractmethod
    def fill(self, k: int, cache: Any) -> mx.array:
        """Fills the first k slots: their draft logits `[k, D]`. The cache stays as it is."""

    def propose(self, k: int, cache: Any, chooser: Choose | None = None) -> Draft:
        """Drafts k tokens, or as many as there are slots; none before anything was ingested."""
        k = min(k, self.max_drafts or k)
        if k == 0 or cache.seed is None:
            return self._nothing()
        return self._certain(self.fill(k, cache), chooser)

    def propose_tree(self, k: int, cache: Any, chooser: Choose | None = None) -> Draft:
        """Drafts a tree of k tokens, one level a slot."""
        if k < 2 or cache.seed is None:
            return self.propose(k, cache, chooser)
        logits = self.fill(min(k, DEPTH, self.max_drafts or k), cache)
        levels = itertools.count(1)

        def follow(tokens: mx.array, parents: mx.array) -> mx.array:
            return mx.broadcast_to(logits[next(levels)], (tokens.size, logits.shape[1]))

        draft = self._grown(k, chooser, logits[:1], follow, levels=logits.shape[0])
        return replace(draft, finite=are_finite(logits))


class LayersDrafter(HeadDrafter):
    """A head with decoder layers, which look back at rows of committed tokens.

    Attributes:
        window: How far back a row sees at most; None as far as the config says. A drafter that
            sees further than it was trained to collapses (paper §5.3), so it starts as the length
            of the head's training, where the config tells it.
        sinks: How many of the first tokens stay visible beyond a window. The first one, unless
            the head was trained with a window of its own (paper §5.3, "SWA + BoS").
    """

    config: LayersConfig

    def __init__(
        self, config: LayersConfig, network: Any, target: Target, d2t: mx.array | None = None
    ):
        super().__init__(config, network, target, d2t)
        self.window: int | None = config.max_position_embeddings
        self.sinks = 1 if config.sliding_window is None else 0

    def windowed(self, window: int | None, sinks: int = 0) -> Self:
        """Returns this drafter, its weights shared, with another window over long contexts.

        Args:
            window: Rows a row sees at most, itself included; None for as many as the config says.
            sinks: How many of the first tokens it sees beyond it: a system prompt's, say.

        Raises:
            DriftError: If a number is out of range.
        """
        if (window is not None and window < 1) or sinks < 0:
            raise DriftError(
                f"the drafter's window is {window} with {sinks} sinks; expected at least 1 and 0"
            )
        other = copy.copy(self)
        other.window, other.sinks = window, sinks
        return other

    def _window_of(self, layer: int) -> int | None:
        """Returns the narrower of a layer's two windows; None if it sees all rows."""
        windows = self.window, self.config.window_of(layer)
        return min((window for window in windows if window is not None), default=None)
