"""EAGLE-1 and EAGLE-2 drafters: the network (Li et al. 2024; SafeAILab/EAGLE `cnets1.py`).

Notable:
- The two are the same weights; EAGLE-2 drafts a tree with them (`mlx_drift.drafters.tree`).
- A row fuses the embedding and the target's final *normed* state with one linear layer. The first
  layer has no input norm, and nothing norms the output: it is trained to be the next normed state,
  so it goes to the target's head, and into the next step, as it is.
- Hydra's `eagle-attn` is the same network, but that its first layer does norm its input
  (zankner/Hydra `hydra_heads/eagle_head.py`).
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.cache import ChainCache
from mlx_drift.drafters.chain_config import EagleConfig
from mlx_drift.drafters.eagle3 import Layer, LayerCache


class FirstLayer(Layer):
    """A Llama layer without the norm of its input."""

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        del self.input_layernorm

    def __call__(self, hidden: mx.array, cache: LayerCache) -> mx.array:
        """Maps `[1, M, H]` to `[1, M, H]`."""
        hidden = hidden + self.self_attn(hidden, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleNetwork(nn.Module):
    """The drafter's own weights, under the names of the canonical checkpoint."""

    def __init__(self, config: EagleConfig):
        super().__init__()
        size = config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.layers: list[Any] = [(Layer if config.input_norm else FirstLayer)(config)]
        self.layers += [Layer(config) for _ in range(1, config.num_layers)]
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.target.vocab_size, size)

    def fuse(self, taps: mx.array) -> mx.array:
        """Takes the one tap `[M, 1, T]` as it is, `[M, H]`."""
        return taps[:, 0]

    def __call__(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[LayerCache]
    ) -> tuple[mx.array, mx.array]:
        """Runs M rows of one step.

        Args:
            embedding: Embedding rows of the tokens `[M, H]`.
            hidden: The target's final normed states, or the outputs of the step before, `[M, H]`.
            caches: One cache a layer.

        Returns:
            The output states, for the head and to recycle: the same array `[M, H]` twice.
        """
        hidden = self.fc(mx.concatenate([embedding, hidden], axis=-1))[None]
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, cache)
        return hidden[0], hidden[0]

    def try_row(self) -> None:
        """Runs a row, lazily: what a config describes badly fails."""
        row = mx.zeros((1, self.layers[0].post_attention_layernorm.weight.size))
        self(row, row, [ChainCache() for _ in self.layers])
