"""Hydra heads: Medusa heads that read the drafts before theirs (arXiv 2402.05109).

Notable:
- Head i reads the target's state at position t beside the embeddings of tokens t + 1 … t + 1 + i:
  the last committed one and the drafts so far. So a draft's distribution is conditional on the
  drafts before it, and rejection sampling is exact with what was really drawn from.
- The embeddings are the target's. The state is its final norm's, or, in heads trained so, an
  earlier layer's output.
- With a prefix layer (Hydra++) the state is what one Llama layer, and a norm, make of the states of
  all committed positions, itself at position t: the rows of a conversation are that layer's.
- Its third form, `eagle-attn`, is an EAGLE-1 network and runs as one (`eagle.py`).
- Equations: zankner/Hydra `hydra/model/hydra_heads/{mlp_head,prefix_mlp_head}.py`; the blocks after
  a head's first, one module repeated there, are modules of their own here.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.cache import ChainCache
from mlx_drift.drafters.eagle3 import Layer
from mlx_drift.drafters.head import HeadDrafter, LayersDrafter
from mlx_drift.drafters.head_state import HeadState
from mlx_drift.drafters.heads_config import HydraConfig, HydraPrefixConfig
from mlx_drift.drafters.protocol import Choose, Draft, are_finite
from mlx_drift.drafters.tree import DEPTH
from mlx_drift.target.model import Target


class HydraHead(nn.Module):
    """Residual blocks, the first of them narrowing, and a linear layer over the vocabulary."""

    def __init__(self, config: HydraConfig, number: int):
        super().__init__()
        size = config.hidden_size
        self.linear = nn.Linear((number + 2) * size, size)
        self.residual = nn.Linear((number + 2) * size, size)
        self.blocks: list[Any] = [nn.Linear(size, size) for _ in range(config.num_blocks - 1)]
        self.lm_head = nn.Linear(size, config.draft_vocab_size)

    def __call__(self, read: mx.array) -> mx.array:
        """Maps the state and the embeddings beside it `[1, (i + 2)·T]` to draft logits `[1, D]`."""
        state = self.residual(read) + nn.silu(self.linear(read))
        for block in self.blocks:
            state = state + nn.silu(block(state))
        return self.lm_head(state)


class HydraNetwork(nn.Module):
    """The drafter's own weights, under the names of the canonical checkpoint.

    Attributes:
        over_vocabulary: The last name of the linear layers that are like the target's head.
    """

    over_vocabulary = "lm_head"

    def __init__(self, config: HydraConfig):
        super().__init__()
        self.size = config.hidden_size
        self.heads: list[Any] = [HydraHead(config, number) for number in range(config.num_heads)]

    def read(self, taps: mx.array, caches: Sequence[ChainCache]) -> mx.array:
        """Takes the last of the target's states `[M, 1, T]`, `[1, T]`."""
        return mx.contiguous(taps[-1:, 0])

    def try_row(self) -> None:
        """Runs a row, lazily: what a config describes badly fails."""
        for number, head in enumerate(self.heads):
            head(mx.zeros((1, (number + 2) * self.size)))


class HydraPrefixNetwork(HydraNetwork):
    """Hydra heads behind a prefix layer."""

    def __init__(self, config: HydraPrefixConfig):
        super().__init__(config)
        self.layers: list[Any] = [Layer(config) for _ in range(config.num_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def read(self, taps: mx.array, caches: Sequence[ChainCache]) -> mx.array:
        """Appends rows of the target's states `[M, 1, T]`; returns what the last becomes."""
        hidden = taps[None, :, 0]
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, cache)
        return self.norm(hidden[:, -1])

    def try_row(self) -> None:
        """Runs a row, lazily: what a config describes badly fails."""
        super().try_row()
        self.read(mx.zeros((1, 1, self.size)), [ChainCache() for _ in self.layers])


class HydraDrafter(HeadDrafter):
    """Drafts one token a head, each by what was drafted before it."""

    config: HydraConfig
    network: HydraNetwork

    def __init__(
        self,
        config: HydraConfig,
        network: HydraNetwork,
        target: Target,
        d2t: mx.array | None = None,
    ):
        super().__init__(config, network, target, d2t)
        self.max_drafts = config.num_heads

    def make_cache(self) -> HeadState:
        """Makes the empty state of one conversation.

        Its seed is what the first head reads: the target's state, and the embedding of the last
        committed token, `[1, 2·T]`.
        """
        return HeadState()

    def ingest(self, tokens: mx.array, taps: mx.array, cache: HeadState) -> None:
        """Appends committed tokens `[M]` with the states one position earlier `[M, 1, T]`."""
        state = self.network.read(taps, cache.layers)
        cache.seed = mx.concatenate([state, self._embed(tokens[-1:])], axis=-1)

    def propose(self, k: int, cache: HeadState, chooser: Choose | None = None) -> Draft:
        """Drafts k tokens, or as many as there are heads; none before anything was ingested."""
        k = min(k, self.config.num_heads)
        if k == 0 or cache.seed is None:
            return self._nothing()
        read = cache.seed

        def logits_after(token: mx.array | None, number: int) -> mx.array:
            nonlocal read
            if token is not None:
                read = mx.concatenate([read, self._embed(token)], axis=-1)
            return self.network.heads[number](read)

        tokens, log_q, rows = self._in_turn(k, chooser, logits_after)
        return Draft(tokens, log_q, are_finite(mx.concatenate(rows)))

    def propose_tree(self, k: int, cache: HeadState, chooser: Choose | None = None) -> Draft:
        """Drafts a tree of k tokens, one level a head."""
        if k < 2 or cache.seed is None:
            return self.propose(k, cache, chooser)
        heads, read = self.network.heads, cache.seed
        rows = [heads[0](read)]

        def follow(tokens: mx.array, parents: mx.array) -> mx.array:
            nonlocal read
            read = mx.concatenate([read[parents], self._embed(tokens)], axis=-1)
            rows.append(heads[len(rows)](read))
            return rows[-1]

        draft = self._grown(k, chooser, rows[0], follow, levels=min(len(heads), DEPTH))
        return replace(draft, finite=are_finite(mx.concatenate(rows)))


class HydraPrefixDrafter(LayersDrafter, HydraDrafter):
    """The same, of what a layer makes of all committed positions."""

    config: HydraPrefixConfig
    network: HydraPrefixNetwork

    def make_cache(self) -> HeadState:
        """Makes the empty state of one conversation, as `HydraDrafter`; with the layers' rows."""
        layers = range(self.config.num_layers)
        return HeadState([ChainCache(self._window_of(layer), self.sinks) for layer in layers])
