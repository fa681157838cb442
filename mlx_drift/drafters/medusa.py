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

from mlx_drift.drafters.config import MedusaConfig
from mlx_drift.drafters.head import HeadDrafter
from mlx_drift.drafters.protocol import Choose, Draft
from mlx_drift.target.model import Target
from mlx_drift.target.rewind import Caches, Snapshot


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


class MedusaState(Caches):
    """All state of one conversation: what the target made of the last token but one.

    Attributes:
        state_read: That state, `[1, T]`; None before any was ingested.
    """

    def __init__(self) -> None:
        super().__init__([])
        self.state_read: mx.array | None = None

    @property
    def state(self) -> list[Any]:
        """All arrays, for `mx.eval`."""
        return [self.state_read]

    @property
    def seed(self) -> mx.array | None:
        """What the next drafts start from: that state."""
        return self.state_read

    @seed.setter
    def seed(self, seed: mx.array | None) -> None:
        self.state_read = seed

    @property
    def nbytes(self) -> int:
        """The bytes it holds."""
        return 0 if self.state_read is None else self.state_read.nbytes

    def rewind(self, rows: int) -> bool:
        """Goes back to when `rows` rows had been fed; the state comes with the next row."""
        self.state_read = None
        return True

    def restore(self, snapshot: Snapshot, rows: int) -> bool:
        """Goes back to a snapshot; the state comes with the next row."""
        return self.rewind(rows)

    def from_arrays(self, arrays: dict[str, mx.array], rows: int) -> None:
        """Takes what `to_arrays` gave, nothing; the state comes with the next row."""
        self.rewind(rows)


class MedusaDrafter(HeadDrafter):
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

    def make_cache(self) -> MedusaState:
        """Makes the empty state of one conversation."""
        return MedusaState()

    def ingest(self, tokens: mx.array, taps: mx.array, cache: MedusaState) -> None:
        """Keeps the last of the states one position earlier `[M, 1, T]`; tokens it reads none."""
        cache.state_read = mx.contiguous(taps[-1:, 0])

    def propose(self, k: int, cache: MedusaState, chooser: Choose | None = None) -> Draft:
        """Drafts k tokens, or as many as there are heads; none before anything was ingested."""
        k = min(k, self.config.num_heads)
        if k == 0 or cache.state_read is None:
            return self._nothing()
        return self._certain(self.network(cache.state_read, k), chooser)
