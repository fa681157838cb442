"""The drafter that chains a network: one class for every kind that drafts step by step.

Notable:
- Row s embeds *token s* and fuses the taps of *position s − 1*; it predicts token s + 1. So the
  pass that ingests a round's committed rows already yields the next round's first draft.
- Committed rows are built from the target's true taps alone: the rows of a chain leave the cache
  when the chain is done.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx

from mlx_drift.drafters.cache import ChainCache, TrainTimeTestCache
from mlx_drift.drafters.head import LayersDrafter
from mlx_drift.drafters.head_state import HeadState
from mlx_drift.drafters.protocol import Choose, Draft
from mlx_drift.drafters.schema import LayersConfig
from mlx_drift.target.model import Target
from mlx_drift.target.tree import Tree, follow_trees, on_tree


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


class ChainState(HeadState):
    """All state of one conversation: the rows of committed tokens, and the next chain's seed.

    Attributes:
        layers: What the attention of each layer reads.
        draft_logits: Those of the last committed row, `[1, D]`: the first draft.
        recycled: What the chain's next step gets, `[1, H]`.
    """

    draft_logits: mx.array | None = None
    recycled: mx.array | None = None

    @property
    def seed(self) -> tuple[mx.array, mx.array] | None:
        """What the next chain starts from; None before anything was ingested."""
        if self.draft_logits is None or self.recycled is None:
            return None
        return self.draft_logits, self.recycled

    @seed.setter
    def seed(self, seed: tuple[mx.array, mx.array] | None) -> None:
        self.draft_logits, self.recycled = seed or (None, None)


class ChainDrafter(LayersDrafter):
    """Chains its network: each step reads what the one before recycled.

    Attributes:
        recycles: Whether it does so in drafting, too: a state that is fed back may drift.
        follows_trees: Whether its rows can be rotated by their depth in a tree.
    """

    recycles = True
    network: Network

    def __init__(
        self, config: LayersConfig, network: Any, target: Target, d2t: mx.array | None = None
    ):
        super().__init__(config, network, target, d2t)
        self.follows_trees = follow_trees(network)

    def make_cache(self) -> ChainState:
        """Makes the empty state of one conversation."""
        layers = range(self.config.num_layers)
        return ChainState([ChainCache(self._window_of(layer), self.sinks) for layer in layers])

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
            return self._nothing()
        committed = cache.layers[0].offset
        first, state = cache.draft_logits, cache.recycled

        def logits_after(token: mx.array | None, step: int) -> mx.array:
            nonlocal state
            if token is None:
                return first
            normed, state = self.network(self._embed(token), state, cache.layers)
            return self._head(normed)

        tokens, log_q, _ = self._in_turn(k, chooser, logits_after)
        for layer in cache.layers:
            layer.trim(layer.offset - committed)
        # What is not finite stays so along the chain, and makes NaN of itself less itself.
        return Draft(tokens, log_q, finite=mx.all(state - state == 0, axis=-1))

    def propose_tree(self, k: int, cache: ChainState, chooser: Choose | None = None) -> Draft:
        """Drafts a tree of k tokens (`mlx_drift.drafters.tree`); arguments as in `propose`.

        A chain where its rows cannot branch.
        """
        if k < 2 or not self.follows_trees or cache.draft_logits is None or cache.recycled is None:
            return self.propose(k, cache, chooser)
        committed = cache.layers[0].offset
        depths: list[int] = []
        states, sees = cache.recycled, mx.zeros((1, 0), mx.bool_)

        def follow(tokens: mx.array, parents: mx.array) -> mx.array:
            nonlocal states, sees
            depths.extend([depths[-1] + 1 if depths else 0] * tokens.size)
            own = mx.eye(tokens.size, dtype=mx.bool_)
            sees = mx.concatenate([sees[parents], own], axis=1)
            with on_tree(cache.parts(), Tree(mx.array(depths), sees)):
                embedding = self._embed(tokens)
                normed, states = self.network(embedding, states[parents], cache.layers)
            return self._head(normed)

        draft = self._grown(k, chooser, cache.draft_logits, follow)
        for layer in cache.layers:
            layer.trim(layer.offset - committed)
        return replace(draft, finite=mx.all(states - states == 0)[None])

    def train_time_test_states(
        self, tokens: mx.array, taps: mx.array, steps: int, *, recompute: bool = False
    ) -> Iterator[tuple[mx.array, mx.array]]:
        """Runs the teacher-forced chain of every position at once, step by step.

        Row i of step j embeds ``tokens[i+1+j]`` and predicts ``tokens[i+2+j]``; it is valid while
        i + j < L (paper §2; SafeAILab/EAGLE `traineagle3/cnets.py`).

        Args:
            tokens: Token ids `[L+1]`.
            taps: The target's states, `taps[i]` captured at `tokens[i]`, `[L, A, T]`.
            steps: How many chain steps.
            recompute: Attend once more for the gradients instead of keeping all weights.

        Yields:
            The states that the head reads and those the next step gets, `[L, H]`, a pair a step.
        """
        rows = taps.shape[0]
        caches = self._train_time_test_caches(recompute)
        tokens = mx.pad(tokens, (0, steps - 1))
        state = self.network.fuse(taps)
        for step in range(steps):
            embedding = self._embed(tokens[step + 1 : step + 1 + rows])
            normed, state = self.network(embedding, state, caches)
            yield normed, state

    def train_time_test_steps(
        self, tokens: mx.array, taps: mx.array, steps: int
    ) -> Iterator[tuple[mx.array, mx.array]]:
        """Runs `train_time_test_states`, and the head.

        Yields:
            Draft logits `[L, D]` and the states the next step gets `[L, H]`, a pair a step.
        """
        for normed, state in self.train_time_test_states(tokens, taps, steps):
            yield self._head(normed), state

    def chains(self, tokens: mx.array, taps: mx.array, steps: int) -> Iterator[mx.array]:
        """Drafts from every position at once, each chain reading its own drafts, greedily.

        Args:
            tokens: Token ids `[L+1]`.
            taps: As in `train_time_test_states`.
            steps: Drafts of a chain.

        Yields:
            Of each row i the draft of ``tokens[i+2+j]``, `[L]` int32, once a step j.
        """
        caches = self._train_time_test_caches()
        read, state = tokens[1:], self.network.fuse(taps)
        for _ in range(steps):
            normed, state = self.network(self._embed(read), state, caches)
            read = self.choose(self._head(normed))
            yield read

    def head(self, normed: mx.array) -> mx.array:
        """Maps the states that the head reads `[M, H]` to draft logits `[M, D]`."""
        return self._head(normed)

    def _train_time_test_caches(self, recompute: bool = False) -> list[TrainTimeTestCache]:
        layers = range(self.config.num_layers)
        return [TrainTimeTestCache(self.config.window_of(layer), recompute) for layer in layers]

    def train_time_test(
        self, tokens: mx.array, taps: mx.array, steps: int
    ) -> tuple[mx.array, mx.array]:
        """Runs `train_time_test_steps` whole, for small inputs.

        Returns:
            Draft logits `[steps, L, D]` and recycled states `[steps, L, H]`.
        """
        logits, states = zip(*self.train_time_test_steps(tokens, taps, steps), strict=True)
        return mx.stack(list(logits)), mx.stack(list(states))
