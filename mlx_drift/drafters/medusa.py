"""Medusa heads: each predicts one further position from the target's state (arXiv 2401.10774).

Notable:
- All heads read the one state that the target's own head reads, after the final norm: at position
  t the target's head predicts t + 1 and head i, from 0, t + 2 + i. So with the last committed token
  at t + 1, head i makes draft i + 1, and there are as many drafts as heads.
- Nothing is fed back and nothing is kept but that one state: no step reads what another made.
- No head knows what another chose: each draft is the likeliest token, with certainty. Typical
  acceptance, with which such heads were published, loses what is lossless and is not here.
- A head is a linear layer over the vocabulary. Where the target's is quantized, these are so, too.
- Equations: FasterDecoding/Medusa `medusa_model.py`; blocks of a head are modules of their own.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.head import SlotsDrafter
from mlx_drift.drafters.head_state import HeadState
from mlx_drift.drafters.heads_config import MedusaConfig
from mlx_drift.target.model import Target


class MedusaHead(nn.Module):
    """Residual blocks, and a linear layer over the vocabulary."""

    def __init__(self, config: MedusaConfig):
        super().__init__()
        size = config.hidden_size
        self.blocks: list[Any] = [
            nn.Linear(size, size, bias=config.block_bias) for _ in range(config.num_blocks)
        ]
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)

    def __call__(self, state: mx.array) -> mx.array:
        """Maps the target's state `[1, T]` to draft logits `[1, D]`."""
        for block in self.blocks:
            state = state + nn.silu(block(state))
        return self.lm_head(state)


class MedusaNetwork(nn.Module):
    """The drafter's own weights, under the names of the canonical checkpoint.

    Attributes:
        over_vocabulary: The last name of the linear layers that are like the target's head.
    """

    over_vocabulary = "lm_head"

    def __init__(self, config: MedusaConfig):
        super().__init__()
        self.size = config.hidden_size
        self.heads: list[Any] = [MedusaHead(config) for _ in range(config.num_heads)]

    def __call__(self, state: mx.array, k: int) -> mx.array:
        """Maps the target's state `[1, T]` to the logits of the first k drafts `[k, D]`."""
        return mx.concatenate([head(state) for head in self.heads[:k]])

    def try_row(self) -> None:
        """Runs a row, lazily: what a config describes badly fails."""
        self(mx.zeros((1, self.size)), len(self.heads))


class MedusaDrafter(SlotsDrafter):
    """Drafts one token a head, all from one state."""

    config: MedusaConfig
    network: MedusaNetwork

    def __init__(
        self,
        config: MedusaConfig,
        network: MedusaNetwork,
        target: Target,
        d2t: mx.array | None = None,
    ):
        super().__init__(config, network, target, d2t)
        self.max_drafts = config.num_heads

    def make_cache(self) -> HeadState:
        """Makes the empty state of one conversation; its seed is that one state, `[1, T]`."""
        return HeadState()

    def ingest(self, tokens: mx.array, taps: mx.array, cache: HeadState) -> None:
        """Keeps the last of the states one position earlier `[M, 1, T]`; tokens it reads none."""
        cache.seed = mx.contiguous(taps[-1:, 0])

    def fill(self, k: int, cache: HeadState) -> mx.array:
        """Runs the first k heads: their draft logits `[k, D]`."""
        return self.network(cache.seed, k)
