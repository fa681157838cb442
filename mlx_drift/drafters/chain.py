"""The drafter that chains a network: one class for every kind that drafts step by step.

Notable:
- Row s embeds *token s* and fuses the taps of *position s − 1*; it predicts token s + 1. So the
  pass that ingests a round's committed rows already yields the next round's first draft.
- Committed rows are built from the target's true taps alone: the rows of a chain leave the cache
  when the chain is done.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlx_drift.drafters.cache import ChainCache, TrainTimeTestCache
from mlx_drift.drafters.config import DrafterConfig
from mlx_drift.drafters.protocol import Draft
from mlx_drift.target import Target


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


@dataclass
class ChainState:
    """All state of one conversation: the rows of committed tokens, and the next chain's seed."""

    layers: list[ChainCache]
    draft_logits: mx.array | None = None  # [1, D], of the last committed row: the first draft
    recycled: mx.array | None = None  # [1, H], what the chain's next step gets

    @property
    def state(self) -> list[Any]:
        """All arrays, for `mx.eval`."""
        return [[layer.state for layer in self.layers], self.draft_logits, self.recycled]


class ChainDrafter:
    """Proposes tokens from a target's taps. Holds no conversation: share it between them.

    Args:
        config: The drafter's config.
        network: Its weights.
        target: What it drafts for; lends its embedding and head where the drafter has none.
        d2t: Target token id of each draft token id, `[D]` int32; None if they are the same.
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
        self._embed = network.get("embed_tokens", target.embed)
        self._head = network.get("lm_head", target.head)
        self._d2t = d2t

    def make_cache(self) -> ChainState:
        """Makes the empty state of one conversation."""
        layers = range(self.config.num_layers)
        return ChainState([ChainCache(self.config.window_of(layer)) for layer in layers])

    def ingest(self, tokens: mx.array, taps: mx.array, cache: ChainState) -> None:
        """Appends committed rows and leaves the seed of the next draft.

        Args:
            tokens: Committed token ids `[M]`.
            taps: The target's states one position earlier, `[M, A, T]`.
            cache: The conversation's state.
        """
        normed, states = self.network(self._embed(tokens), self.network.fuse(taps), cache.layers)
        cache.draft_logits, cache.recycled = self._head(normed[-1:]), states[-1:]

    def propose(self, k: int, cache: ChainState) -> Draft:
        """Chains k greedy drafts; none before anything was ingested.

        Args:
            k: How many tokens to draft.
            cache: The conversation's state; its committed rows are left as they are.
        """
        if k == 0 or cache.draft_logits is None or cache.recycled is None:
            return Draft(mx.zeros((0,), mx.int32))
        committed = cache.layers[0].offset
        tokens = [self.choose(cache.draft_logits)]
        state = cache.recycled
        while len(tokens) < k:
            normed, state = self.network(self._embed(tokens[-1]), state, cache.layers)
            tokens.append(self.choose(self._head(normed)))
        for layer in cache.layers:
            layer.trim(layer.offset - committed)
        return Draft(mx.concatenate(tokens))

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
