"""The drafter that chains a network: one class for every kind that drafts step by step.

Notable:
- Row s embeds *token s* and fuses the taps of *position s − 1*; it predicts token s + 1. So the
  pass that ingests a round's committed rows already yields the next round's first draft.
- Committed rows are built from the target's true taps alone: the rows of a chain leave the cache
  when the chain is done.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx

from mlx_drift.drafters.cache import ChainCache, TrainTimeTestCache
from mlx_drift.drafters.config import DrafterConfig
from mlx_drift.drafters.protocol import Choose, Draft
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.target.rewind import Caches, Snapshot


class Network(Protocol):
    """A drafter's own weights, a `mlx.nn.Module`; `embed_tokens` and `lm_head` are optional."""

    layers: list[Any]

    def get(self, name: str, default: Any) -> Any:
        """Returns a part of the module."""

    def fuse(self, taps: mx.array) -> mx.array:
        """Fuses taps `[M, A, T]` into the hidden state of a chain's first step, `[M, H]`."""

    def __call__(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Any]
    ) -> tuple[mx.array, mx.array]:
        """Runs M rows of one step: the states for the head and those to recycle, `[M, H]`."""


class ChainState(Caches):
    """All state of one conversation: the rows of committed tokens, and the next chain's seed.

    Attributes:
        layers: What the attention of each layer reads.
        draft_logits: Those of the last committed row, `[1, D]`: the first draft.
        recycled: What the chain's next step gets, `[1, H]`.
    """

    def __init__(self, layers: list[ChainCache]):
        super().__init__([layer.rows for layer in layers])
        self.layers = layers
        self.draft_logits: mx.array | None = None
        self.recycled: mx.array | None = None

    @property
    def state(self) -> list[Any]:
        """All arrays, for `mx.eval`."""
        return [super().state, self.draft_logits, self.recycled]

    def rewind(self, rows: int) -> bool:
        """Goes back to when `rows` rows had been fed; the seed comes with the next row."""
        self.draft_logits = self.recycled = None
        return super().rewind(rows)

    def restore(self, snapshot: Snapshot, rows: int) -> bool:
        """Goes back to a snapshot; the seed comes with the next row."""
        self.draft_logits = self.recycled = None
        return super().restore(snapshot, rows)

    def from_arrays(self, arrays: dict[str, mx.array], rows: int) -> None:
        """Takes what `to_arrays` gave; the seed comes with the next row."""
        self.draft_logits = self.recycled = None
        super().from_arrays(arrays, rows)


class ChainDrafter:
    """Proposes tokens from a target's taps. Holds no conversation: share it between them.

    Args:
        config: The drafter's config.
        network: Its weights.
        target: What it drafts for; lends its embedding and head where the drafter has none.
        d2t: Target token id of each draft token id, `[D]` int32; None if they are the same.

    Attributes:
        window: How far back a row sees at most; None as far as the config says. A drafter that
            sees further than it was trained to collapses (paper §5.3), so it starts as the length
            of the head's training, where the config tells it.
        sinks: How many of the first tokens stay visible beyond a window. The first one, unless
            the head was trained with a window of its own (paper §5.3, "SWA + BoS").
    """

    def __init__(
        self,
        config: DrafterConfig,
        network: Network,
        target: Target,
        d2t: mx.array | None = None,
    ):
        self.config = config
        self.network = network
        self.taps = config.taps
        self.model = target.model
        self.window: int | None = config.max_position_embeddings
        self.sinks = 1 if config.sliding_window is None else 0
        self._embed = network.get("embed_tokens", target.embed)
        self._head = network.get("lm_head", target.head)
        self._d2t = d2t
        self._vocab_size = target.shape.vocab_size
        own, rows = network.get("embed_tokens", None), config.target.vocab_size
        if own is not None and rows < self._vocab_size:  # padding may be spoken, if it never is
            self._embed = lambda tokens: own(mx.minimum(tokens, rows - 1))

    def windowed(self, window: int | None, sinks: int = 0) -> "ChainDrafter":
        """Returns this drafter, its weights shared, with another window over long contexts.

        Args:
            window: Rows a row sees at most, itself included; None for as many as the config says.
            sinks: How many of the first tokens stay visible beyond it: a system prompt's, say.

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

    def through(self, network: Network) -> "ChainDrafter":
        """Returns this drafter with another network in its place: one around its own, say.

        Args:
            network: What fuses taps and runs the steps; embedding and head stay what they are.
        """
        other = copy.copy(self)
        other.network = network
        return other

    def make_cache(self) -> ChainState:
        """Makes the empty state of one conversation."""
        caches = []
        for layer in range(self.config.num_layers):
            windows = self.window, self.config.window_of(layer)
            narrowest = min((w for w in windows if w is not None), default=None)
            caches.append(ChainCache(narrowest, self.sinks))
        return ChainState(caches)

    def start(self, token: mx.array, cache: ChainState) -> None:
        """Does nothing: the first row is the second token's, with the taps of the first."""

    def ingest(self, tokens: mx.array, taps: mx.array, cache: ChainState) -> None:
        """Appends committed rows and leaves the seed of the next draft.

        Args:
            tokens: Committed token ids `[M]`.
            taps: The target's states one position earlier, `[M, A, T]`.
            cache: The conversation's state.
        """
        normed, states = self.network(self._embed(tokens), self.network.fuse(taps), cache.layers)
        cache.draft_logits, cache.recycled = self._head(normed[-1:]), states[-1:]

    def propose(self, k: int, cache: ChainState, chooser: Choose | None = None) -> Draft:
        """Chains k drafts; none before anything was ingested.

        Args:
            k: How many tokens to draft.
            cache: The conversation's state; its committed rows are left as they are.
            chooser: What tokens are chosen with; None for the likeliest.
        """
        if k == 0 or cache.draft_logits is None or cache.recycled is None:
            return Draft(mx.zeros((0,), mx.int32))
        committed = cache.layers[0].offset
        tokens: list[mx.array] = []
        drawn_with: list[mx.array] = []
        logits, state = cache.draft_logits, cache.recycled
        while True:
            if chooser is None or chooser.drafts_greedily:
                token, log_probabilities = self.choose(logits), None
            else:
                token, log_probabilities = chooser.draft(self._spread(logits), tokens)
            tokens.append(token)
            if log_probabilities is not None:
                drawn_with.append(log_probabilities)
            if len(tokens) == k:
                break
            normed, state = self.network(self._embed(token), state, cache.layers)
            logits = self._head(normed)
        for layer in cache.layers:
            layer.trim(layer.offset - committed)
        # What is not finite stays so along the chain, and makes NaN of itself less itself.
        finite = mx.all(state - state == 0, axis=-1)
        log_q = mx.concatenate(drawn_with) if drawn_with else None
        return Draft(mx.concatenate(tokens), log_q, finite)

    def train_time_test_steps(
        self, tokens: mx.array, taps: mx.array, steps: int
    ) -> Iterator[tuple[mx.array, mx.array]]:
        """Runs the teacher-forced chain of every position at once, step by step.

        Row i of step j embeds ``tokens[i+1+j]`` and predicts ``tokens[i+2+j]``; it is valid while
        i + j < L (paper §2; SafeAILab/EAGLE `traineagle3/cnets.py`).

        Args:
            tokens: Token ids `[L+1]`.
            taps: The target's states, `taps[i]` captured at `tokens[i]`, `[L, A, T]`.
            steps: How many chain steps.

        Yields:
            Draft logits `[L, D]` and the states the next step gets `[L, H]`, a pair a step.
        """
        rows = taps.shape[0]
        layers = range(self.config.num_layers)
        caches = [TrainTimeTestCache(self.config.window_of(layer)) for layer in layers]
        tokens = mx.pad(tokens, (0, steps - 1))
        state = self.network.fuse(taps)
        for step in range(steps):
            embedding = self._embed(tokens[step + 1 : step + 1 + rows])
            normed, state = self.network(embedding, state, caches)
            yield self._head(normed), state

    def train_time_test(
        self, tokens: mx.array, taps: mx.array, steps: int
    ) -> tuple[mx.array, mx.array]:
        """Runs `train_time_test_steps` whole, for small inputs.

        Returns:
            Draft logits `[steps, L, D]` and recycled states `[steps, L, H]`.
        """
        logits, states = zip(*self.train_time_test_steps(tokens, taps, steps), strict=True)
        return mx.stack(list(logits)), mx.stack(list(states))

    def choose(self, logits: mx.array) -> mx.array:
        """Picks the likeliest tokens of draft logits `[M, D]`, as target token ids `[M]` int32."""
        token = mx.argmax(logits, axis=-1).astype(mx.int32)
        return token if self._d2t is None else self._d2t[token]

    def _spread(self, logits: mx.array) -> mx.array:
        """Lays draft logits `[M, D]` out over the target's vocabulary, `[M, V]`."""
        if self._d2t is None:
            padding = self._vocab_size - logits.shape[-1]
            if padding == 0:
                return logits
            return mx.pad(logits, [(0, 0), (0, padding)], constant_values=-mx.inf)
        spread = mx.full((logits.shape[0], self._vocab_size), -mx.inf, logits.dtype)
        spread[:, self._d2t] = logits
        return spread
