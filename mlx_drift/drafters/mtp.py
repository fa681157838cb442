"""Multi-token-prediction heads: the network (DeepSeek-V3, arXiv 2412.19437 §2.2).

Notable:
- A row norms the embedding and the hidden state, each by itself, projects the two to one state,
  and runs one decoder block of the target's family, which is mlx-lm's own class
  (`mlx_drift.drafters.block`). The final norm's output goes to the target's head.
- A checkpoint's one module is applied again and again. Which of the target's states the first step
  gets is the config's tap, which of its own the later ones get its `feedback`: engines disagree on
  both, so neither is left unsaid (vllm-project/vllm #45895, ml-explore/mlx-lm #990).
- At load the gains of the two norms go into the projection (`mlx_drift.drafters.fold`), and the two
  are one kernel; the block stays as mlx-lm made it.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.block import ROUTERS, build_block
from mlx_drift.drafters.cache import ChainCache, TrainTimeTestCache
from mlx_drift.drafters.chain_config import MTPConfig


class MTPNetwork(nn.Module):
    """The head's own weights, under the names of the canonical checkpoint.

    Attributes:
        unquantized: The last names of linear layers that stay as they are when it is quantized.
    """

    unquantized = ("fc", *ROUTERS)

    def __init__(self, config: MTPConfig):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = nn.RMSNorm(size, eps=eps)
        self.hidden_norm = nn.RMSNorm(size, eps=eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers: list[Any] = [build_block(config.block)]
        self.norm = nn.RMSNorm(size, eps=eps)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.target.vocab_size, size)
        if config.own_head:
            self.lm_head = nn.Linear(size, config.target.vocab_size, bias=False)
        self.hidden_first = config.hidden_first
        self.post_norm_feedback = config.feedback == "post"

    def fuse(self, taps: mx.array) -> mx.array:
        """Takes the one tap `[M, 1, T]` as it is, `[M, H]`."""
        return taps[:, 0]

    def __call__(
        self,
        embedding: mx.array,
        hidden: mx.array,
        caches: Sequence[ChainCache | TrainTimeTestCache],
    ) -> tuple[mx.array, mx.array]:
        """Runs M rows of one step.

        Args:
            embedding: Embedding rows of the tokens `[M, H]`.
            hidden: The target's states, or those recycled from the step before, `[M, H]`.
            caches: One cache.

        Returns:
            The normed states that the head reads, and the states to recycle, both `[M, H]`.
        """
        state = self.fc(self._read(embedding, hidden))[None]
        for layer, cache in zip(self.layers, caches, strict=True):
            # Latent attention takes its mask as an array; the others take either.
            mask = cache.rows.make_mask(state.shape[1], return_array=True, window_size=None)
            state = layer(state, mask, cache.rows)
        normed = self.norm(state)
        return normed[0], (normed if self.post_norm_feedback else state)[0]

    def _read(self, embedding: mx.array, hidden: mx.array) -> mx.array:
        """Returns what the projection reads, `[M, 2H]`."""
        both = [hidden, embedding] if self.hidden_first else [embedding, hidden]
        if "hidden_norm" not in self:  # folded: one norm without gains for both
            return mx.fast.rms_norm(mx.stack(both, axis=1), None, self.input_eps).flatten(1)
        norms = [self.embedding_norm, self.hidden_norm]
        if self.hidden_first:
            norms.reverse()
        return mx.concatenate([norm(x) for norm, x in zip(norms, both, strict=True)], axis=-1)

    def try_row(self) -> None:
        """Runs a row, lazily: what a config describes badly fails."""
        row = mx.zeros((1, self.norm.weight.size))
        self(row, row, [ChainCache() for _ in self.layers])
