"""DFlash drafters: a block of mask tokens is filled in one pass (arXiv 2602.06036).

Notable:
- The network never reads its own outputs: nothing is fed back, so nothing drifts from step to step.
  The target's states of committed positions enter every layer as further keys and values, the
  context; of a context row nothing else is computed, so prompts are cheap.
- A block is the last committed token and masks after it. Slot j stands at the position of the j-th
  draft and predicts the token there (`unshifted`), or the one after it (`shifted`, DSpark).
- Where slots see those after them, the block must be as wide as in training, however few drafts are
  wanted. Where they do not, it may be cut.
- No slot knows what another became: each draft is the likeliest token, with certainty.
- Equations: z-lab `dflash` 0.1.0 `model.py`; vllm-project/speculators `models/dflash`.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.block_cache import BlockCache
from mlx_drift.drafters.eagle3 import Attention, Layer
from mlx_drift.drafters.head import LayersDrafter, SlotsDrafter
from mlx_drift.drafters.head_state import HeadState
from mlx_drift.drafters.slots_config import DFlashConfig
from mlx_drift.target.model import Target


class BlockAttention(Attention):
    """Attention to a context that is only looked at, and to a block."""

    def read(self, context: mx.array, cache: BlockCache) -> None:
        """Appends keys and values of context rows `[1, M, H]`."""
        keys = self._split(self.k_proj(context), self.num_kv_heads)
        values = self._split(self.v_proj(context), self.num_kv_heads)
        if "k_norm" in self:
            keys = self.k_norm(keys)
        cache.append(self.rope(keys, offset=cache.offset), values)


class BlockLayer(Layer):
    """A Llama layer over a block."""

    def __init__(self, config: DFlashConfig):
        super().__init__(config)
        self.self_attn = BlockAttention(config, config.hidden_size)


class DFlashNetwork(nn.Module):
    """The drafter's own weights, under the names of the canonical checkpoint."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.taps_shape = 1, len(config.taps), config.target.hidden_size
        self.fc = nn.Linear(len(config.taps) * config.target.hidden_size, size, bias=config.fc_bias)
        self.context_norm = nn.RMSNorm(size, eps=eps)
        self.layers: list[Any] = [BlockLayer(config) for _ in range(config.num_layers)]
        self.norm = nn.RMSNorm(size, eps=eps)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.target.vocab_size, size)
        if config.own_head:
            self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)

    def read(self, taps: mx.array, caches: Sequence[BlockCache]) -> None:
        """Appends the context rows of taps `[M, A, T]`."""
        context = self.context_norm(self.fc(taps.flatten(1)))[None]
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.self_attn.read(context, cache)

    def __call__(self, embedding: mx.array, caches: Sequence[BlockCache]) -> mx.array:
        """Maps the embeddings of a block `[B, H]` to the normed states of its slots `[B, H]`."""
        hidden = embedding[None]
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, cache)
        return self.norm(hidden)[0]

    def try_row(self) -> None:
        """Runs a row of context and one of a block, lazily: a bad description fails."""
        caches = [BlockCache(None, 0, by_slot=False, causal=False) for _ in self.layers]
        self.read(mx.zeros(self.taps_shape), caches)
        self(mx.zeros((1, self.norm.weight.size)), caches)


class DFlashDrafter(SlotsDrafter, LayersDrafter):
    """Drafts a block in one pass."""

    config: DFlashConfig
    network: DFlashNetwork

    def __init__(
        self,
        config: DFlashConfig,
        network: DFlashNetwork,
        target: Target,
        d2t: mx.array | None = None,
    ):
        super().__init__(config, network, target, d2t)
        self.max_drafts = config.block_size - (config.slots == "unshifted")

    def make_cache(self) -> HeadState:
        """Makes the empty state of one conversation; its seed is the last token, `[1]`."""
        config = self.config
        return HeadState(
            [
                BlockCache(
                    self._window_of(layer),
                    self.sinks,
                    by_slot=config.window_rule == "slot" and config.window_of(layer) is not None,
                    causal=layer in config.causal_layers,
                )
                for layer in range(config.num_layers)
            ]
        )

    def ingest(self, tokens: mx.array, taps: mx.array, cache: HeadState) -> None:
        """Appends context rows; the last token is the next block's first.

        Args:
            tokens: Committed token ids `[M]`.
            taps: The target's states one position earlier, `[M, A, T]`.
            cache: The conversation's state.
        """
        self.network.read(taps, cache.layers)
        cache.seed = tokens[-1:]

    def fill(self, k: int, cache: HeadState) -> mx.array:
        """Runs a block: the draft logits of its first k drafts `[k, D]`."""
        return self._head(self._fill(k, cache))

    def _fill(self, k: int, cache: HeadState) -> mx.array:
        """Runs a block; returns the states of the slots that predict the first k drafts, `[k, H]`.

        The context stays as it is.
        """
        config = self.config
        first = int(config.slots == "unshifted")
        causal = len(set(config.causal_layers)) == config.num_layers
        width = first + k if causal else config.block_size
        masks = mx.full((width - 1,), config.mask_token_id, dtype=cache.seed.dtype)
        block = self._embed(mx.concatenate([cache.seed, masks]))
        return self.network(block, cache.layers)[first : first + k]
