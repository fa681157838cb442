"""EAGLE-3 and EAGLE-3.1 drafters: the network.

Notable:
- One class serves the whole family. Pre-norm EAGLE-3 and normalized EAGLE-3.1 differ in two
  switches (`feedback`, `fc_norm`), the other trainers' heads in a few more; the equations are
  those of the paper, §2 and §4 (arXiv 2605.09992), and of SafeAILab/EAGLE `eagle/model/cnets.py`.
- Every norm is `mx.fast.rms_norm`, one fused Metal kernel on Apple GPUs. At load, norms are merged
  and projections packed (`mlx_drift.drafters.fold`); the layers here run both forms.
- NVIDIA's heads of a single feature have no `fc`: the one tap is the hidden state.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.rope_utils import initialize_rope

from mlx_drift.drafters.cache import ChainCache, TrainTimeTestCache
from mlx_drift.drafters.chain_config import Eagle3Config
from mlx_drift.drafters.schema import LlamaLayersConfig

LayerCache = ChainCache | TrainTimeTestCache


class Attention(nn.Module):
    """Grouped-query attention whose input may be wider than its output (2H in layer 0)."""

    def __init__(self, config: LlamaLayersConfig, input_size: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = config.head_dim**-0.5
        width, kv_width = self.num_heads * config.head_dim, self.num_kv_heads * config.head_dim
        bias = config.attention_bias
        self.gated = config.gated_attention

        self.q_proj = nn.Linear(input_size, 2 * width if self.gated else width, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.rope = initialize_rope(
            config.rotated_dims,
            config.rope_theta,
            False,  # rotate-half, as every Llama-style drafter
            config.rope_scaling,
            config.max_position_embeddings,
        )

    def __call__(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Maps `[1, M, input_size]` to `[1, M, H]`."""
        gated = self.gated
        num_queries = 2 * self.num_heads if gated else self.num_heads
        rotates_both = "qkv_proj" in self and not gated and "q_norm" not in self
        if "qkv_proj" in self:
            num_rotated = num_queries + self.num_kv_heads
            heads = self._split(self.qkv_proj(x), num_rotated + self.num_kv_heads)
            both, values = mx.split(heads, [num_rotated], axis=1)
            if rotates_both:
                both = self.rope(both, offset=cache.offset)
            queries, keys = mx.split(both, [num_queries], axis=1)
        else:
            queries = self._split(self.q_proj(x), num_queries)
            keys = self._split(self.k_proj(x), self.num_kv_heads)
            values = self._split(self.v_proj(x), self.num_kv_heads)
        if gated:  # each head's queries, then its gate
            queries, gates = queries[:, ::2], queries[:, 1::2]
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if not rotates_both:
            queries = self.rope(queries, offset=cache.offset)
            keys = self.rope(keys, offset=cache.offset)
        output = cache.attend(queries, keys, values, self.scale)
        if gated:
            output = output * mx.sigmoid(gates)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))

    def _split(self, x: mx.array, heads: int) -> mx.array:
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


class MLP(nn.Module):
    """Gated feed-forward, as in Llama."""

    def __init__(self, config: LlamaLayersConfig):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """Maps `[1, M, H]` to `[1, M, H]`."""
        if "gate_up_proj" in self:
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up))


class Layer(nn.Module):
    """A plain Llama layer: the layers after the first of a deep drafter."""

    def __init__(self, config: LlamaLayersConfig, input_size: int | None = None):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, input_size or size)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(size, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=eps)

    def __call__(self, hidden: mx.array, cache: LayerCache) -> mx.array:
        """Maps `[1, M, H]` to `[1, M, H]`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class FirstLayer(Layer):
    """The layer that reads the embedding beside the hidden state; its residual is the latter."""

    def __init__(self, config: Eagle3Config):
        super().__init__(config, 2 * config.hidden_size)
        if config.hidden_norm:
            self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def __call__(  # type: ignore[override]
        self, embedding: mx.array, hidden: mx.array, cache: LayerCache
    ) -> mx.array:
        """Maps the embedding and the hidden state, both `[1, M, H]`, to `[1, M, H]`."""
        both, residual = self._read(embedding, hidden)
        hidden = residual + self.self_attn(both, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def _read(self, embedding: mx.array, hidden: mx.array) -> tuple[mx.array, mx.array]:
        """Returns what the attention reads, `[1, M, 2H]`, and what it is added to, `[1, M, H]`."""
        if "input_layernorm" not in self:  # folded: one norm without gains for both
            both = mx.fast.rms_norm(mx.stack([embedding, hidden], axis=2), None, self.input_eps)
            residual = both[:, :, 1] * self.residual_gain if self.norm_before_residual else hidden
            return both.flatten(2), residual
        normed = self.hidden_norm(hidden) if "hidden_norm" in self else hidden
        both = mx.concatenate([self.input_layernorm(embedding), normed], axis=-1)
        return both, normed if self.norm_before_residual else hidden


class Eagle3Network(nn.Module):
    """The drafter's own weights, under the names of the canonical checkpoint."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        num_taps, tap_size = len(config.taps), config.target.hidden_size
        eps = config.rms_norm_eps
        if config.fc_norm:
            self.fc_norm = [nn.RMSNorm(tap_size, eps=eps) for _ in range(num_taps)]
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(num_taps * tap_size, eps=eps)
        if config.fc:
            self.fc = nn.Linear(num_taps * tap_size, config.hidden_size, bias=config.fc_bias)
        deeper = [Layer(config) for _ in range(1, config.num_layers)]
        self.layers: list[Any] = [FirstLayer(config), *deeper]
        self.norm = nn.RMSNorm(config.hidden_size, eps=eps)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.target.vocab_size, config.hidden_size)
        if config.own_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.post_norm_feedback = config.feedback == "post"
        self.tap_eps: float | None = None

    def fuse(self, taps: mx.array) -> mx.array:
        """Fuses taps `[M, A, T]` into the hidden state of a chain's first step, `[M, H]`."""
        if "fc_norm" in self:
            taps = mx.stack([norm(taps[:, i]) for i, norm in enumerate(self.fc_norm)], axis=1)
        elif self.tap_eps is not None:  # folded: one norm without gains for all
            taps = mx.fast.rms_norm(taps, None, self.tap_eps)
        taps = taps.flatten(1)
        if "input_norm" in self:
            taps = self.input_norm(taps)
        return self.fc(taps) if "fc" in self else taps

    def __call__(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[LayerCache]
    ) -> tuple[mx.array, mx.array]:
        """Runs M rows of one step.

        Args:
            embedding: Embedding rows of the tokens `[M, H]`.
            hidden: Fused taps, or the states recycled from the step before, `[M, H]`.
            caches: One cache a layer.

        Returns:
            The normed states that the head reads, and the states to recycle, both `[M, H]`.
        """
        first, *rest = self.layers
        hidden = first(embedding[None], hidden[None], caches[0])
        for layer, cache in zip(rest, caches[1:], strict=True):
            hidden = layer(hidden, cache)
        normed = self.norm(hidden)
        return normed[0], (normed if self.post_norm_feedback else hidden)[0]

    def try_row(self) -> None:
        """Runs a row, lazily: what a config describes badly fails."""
        row = mx.zeros((1, self.norm.weight.size))
        self(row, row, [ChainCache() for _ in self.layers])
