"""EAGLE-3 and EAGLE-3.1 drafters: the network, and the drafter that chains it.

Notable:
- One class serves the whole family. Pre-norm EAGLE-3 and normalized EAGLE-3.1 differ in two
  switches (`feedback`, `fc_norm`), the other trainers' heads in a few more; the equations are
  those of the paper, §2 and §4 (arXiv 2605.09992), and of SafeAILab/EAGLE `eagle/model/cnets.py`.
- Every norm is `mx.fast.rms_norm`, one fused Metal kernel on Apple GPUs.
- Row s embeds *token s* and fuses the taps of *position s − 1*; it predicts token s + 1. So the
  pass that ingests a round's committed rows already yields the next round's first draft.
- Committed rows are built from the target's true taps alone: the rows of a chain leave the cache
  when the chain is done.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.rope_utils import initialize_rope

from mlx_drift.drafters.cache import ChainCache, TrainTimeTestCache
from mlx_drift.drafters.config import Eagle3Config
from mlx_drift.drafters.protocol import Draft
from mlx_drift.target import Target

LayerCache = ChainCache | TrainTimeTestCache


class Attention(nn.Module):
    """Grouped-query attention whose input may be wider than its output (2H in layer 0)."""

    def __init__(self, config: Eagle3Config, input_size: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = config.head_dim**-0.5
        width, kv_width = self.num_heads * config.head_dim, self.num_kv_heads * config.head_dim
        bias = config.attention_bias

        self.q_proj = nn.Linear(input_size, width, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.rope = initialize_rope(
            config.head_dim,
            config.rope_theta,
            False,  # rotate-half, as every Llama-style drafter
            config.rope_scaling,
            config.max_position_embeddings,
        )

    def __call__(self, x: mx.array, cache: LayerCache) -> mx.array:
        """Maps `[1, M, input_size]` to `[1, M, H]`."""
        queries = self._split(self.q_proj(x), self.num_heads)
        keys = self._split(self.k_proj(x), self.num_kv_heads)
        values = self._split(self.v_proj(x), self.num_kv_heads)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries = self.rope(queries, offset=cache.offset)
        keys = self.rope(keys, offset=cache.offset)
        output = cache.attend(queries, keys, values, self.scale)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))

    def _split(self, x: mx.array, heads: int) -> mx.array:
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


class MLP(nn.Module):
    """Gated feed-forward, as in Llama."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """Maps `[1, M, H]` to `[1, M, H]`."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """A plain Llama layer: the layers after the first of a deep drafter."""

    def __init__(self, config: Eagle3Config, input_size: int | None = None):
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
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def __call__(  # type: ignore[override]
        self, embedding: mx.array, hidden: mx.array, cache: LayerCache
    ) -> mx.array:
        """Maps the embedding and the hidden state, both `[1, M, H]`, to `[1, M, H]`."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        both = mx.concatenate([self.input_layernorm(embedding), normed], axis=-1)
        hidden = residual + self.self_attn(both, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


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
        self.fc = nn.Linear(num_taps * tap_size, config.hidden_size, bias=config.fc_bias)
        deeper = [Layer(config) for _ in range(1, config.num_layers)]
        self.layers: list[Any] = [FirstLayer(config), *deeper]
        self.norm = nn.RMSNorm(config.hidden_size, eps=eps)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.target.vocab_size, config.hidden_size)
        if config.own_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.post_norm_feedback = config.feedback == "post"

    def fuse(self, taps: mx.array) -> mx.array:
        """Fuses taps `[M, A, T]` into the hidden state of a chain's first step, `[M, H]`."""
        if "fc_norm" in self:
            taps = mx.stack([norm(taps[:, i]) for i, norm in enumerate(self.fc_norm)], axis=1)
        taps = taps.flatten(1)
        if "input_norm" in self:
            taps = self.input_norm(taps)
        return self.fc(taps)

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


@dataclass
class Eagle3Cache:
    """All state of one conversation: the rows of committed tokens, and the next chain's seed."""

    layers: list[ChainCache]
    draft_logits: mx.array | None = None  # [1, D], of the last committed row: the first draft
    recycled: mx.array | None = None  # [1, H], what the chain's next step gets

    @property
    def state(self) -> list[Any]:
        """All arrays, for `mx.eval`."""
        return [[layer.state for layer in self.layers], self.draft_logits, self.recycled]


class Eagle3Drafter:
    """Proposes tokens from a target's taps. Holds no conversation: share it between them.

    Args:
        config: The drafter's config.
        network: Its weights.
        target: What it drafts for; lends its embedding and head where the drafter has none.
        d2t: Target token id of each draft token id, `[D]` int32; None if they are the same.
    """

    def __init__(
        self,
        config: Eagle3Config,
        network: Eagle3Network,
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

    def make_cache(self) -> Eagle3Cache:
        """Makes the empty state of one conversation."""
        window = self.config.sliding_window
        return Eagle3Cache([ChainCache(window) for _ in self.network.layers])

    def ingest(self, tokens: mx.array, taps: mx.array, cache: Eagle3Cache) -> None:
        """Appends committed rows and leaves the seed of the next draft.

        Args:
            tokens: Committed token ids `[M]`.
            taps: The target's states one position earlier, `[M, A, T]`.
            cache: The conversation's state.
        """
        normed, states = self.network(self._embed(tokens), self.network.fuse(taps), cache.layers)
        cache.draft_logits, cache.recycled = self._head(normed[-1:]), states[-1:]

    def propose(self, k: int, cache: Eagle3Cache) -> Draft:
        """Chains k greedy drafts; none before anything was ingested.

        Args:
            k: How many tokens to draft.
            cache: The conversation's state; its committed rows are left as they are.
        """
        if k == 0 or cache.draft_logits is None or cache.recycled is None:
            return Draft(mx.zeros((0,), mx.int32))
        committed = cache.layers[0].offset
        tokens = [self._choose(cache.draft_logits)]
        state = cache.recycled
        while len(tokens) < k:
            normed, state = self.network(self._embed(tokens[-1]), state, cache.layers)
            tokens.append(self._choose(self._head(normed)))
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
        window = self.config.sliding_window
        caches = [TrainTimeTestCache(window) for _ in self.network.layers]
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

    def _choose(self, logits: mx.array) -> mx.array:
        """Picks the likeliest token of draft logits `[1, D]` as a target token id `[1]`."""
        token = mx.argmax(logits, axis=-1).astype(mx.int32)
        return token if self._d2t is None else self._d2t[token]
