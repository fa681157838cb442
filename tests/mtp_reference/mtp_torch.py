"""Multi-token-prediction modules in plain PyTorch, written to be trusted by reading.

An independent writing of the equations: it shares no code with the package, needs nothing but torch
and reads checkpoints as their makers wrote them (names and layout of the Hub's files). One row at a
time, each appended to the keys and values of the rows before, so that causality needs no mask.

A module is one decoder block of its family between a projection and a norm. For the row at position
p, its token t and the hidden state h of the token before:

    x      = proj(concat[norm(embed(t)), norm(h)])       MiMo: norm(h) first
    x      = x + attention(norm(x), p)
    x      = x + mlp(norm(x))
    y      = norm(x)
    logits = head(y)                                     the target's head

Two conventions of chaining it over L known rows:

engine
    As vLLM and SGLang decode. Rows 0 .. L-1 read ``tokens[i + 1]`` and the target's state
    ``hidden[i]`` at position i; rows L and L + 1 read ``tokens[i + 1]`` and y of the row before, at
    positions L and L + 1. All rows stay in the cache.
package
    As ``speculators`` trains (``MTPDraftModel.forward``). Every step runs all L rows again, at the
    same positions 0 .. L-1 and with an empty cache: row i of step j reads ``tokens[i + 1 + j]`` and
    y of row i of step j - 1.

Sources: ``transformers`` 5.23, ``models/{qwen3_next,qwen3_5,qwen3_5_moe,deepseek_v3,glm4_moe,
glm4_moe_lite,qwen2,qwen3,llama}/modeling_*.py`` for the blocks and ``MtpLayer`` in
``modeling_layers.py`` for the module; vLLM ``mimo_mtp.py`` for MiMo; DeepSeek-V3's README for the
blocks of fp8. ``mtp_transformers.py`` runs those layers and compares.

Letters: L rows, H hidden size, V vocabulary, hd head dimension, E experts, I their inner size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FP8_BLOCK = 128
MLA_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says: so it is in transformers. vLLM
and mlx-lm take rms_norm_eps for GLM-4.7-Flash, 1e-5, which moves the case here by 2e-5."""
DEFAULT_PARTIAL = {"qwen3_next": 0.25, "qwen3_5": 0.25, "glm4_moe": 0.5}
"""``partial_rotary_factor`` where a config does not say."""


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``, any shape."""
    return x * torch.sigmoid(x)


def mscale(factor: float, weight: float) -> float:
    """YaRN's temperature: ``1 + 0.1 weight ln(factor)``."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def family(config: dict[str, Any]) -> str:
    """Which block: the text model's type without its suffixes."""
    kind: str = config["model_type"].removesuffix("_text")
    return "qwen3_5" if kind == "qwen3_5_moe" else kind


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the text model."""
    inner: dict[str, Any] = (
        config.get("text_config") or config.get("transformer_layer_config") or config
    )
    return inner


def module_names(config: dict[str, Any]) -> dict[str, str]:
    """Prefix of the block and names of the projection and of the three norms around it."""
    kind = family(text_config(config))
    if "transformer_layer_config" in config or kind == "mimo":
        prefix = "model.mtp_layers.0." if kind == "mimo" else "mtp_layers.0."
        return {
            "block": prefix,
            "token": f"{prefix}token_layernorm",
            "hidden": f"{prefix}hidden_layernorm",
            "proj": f"{prefix}input_proj",
            "norm": f"{prefix}final_layernorm",
        }
    if kind.startswith("qwen"):
        return {
            "block": "mtp.layers.0.",
            "token": "mtp.pre_fc_norm_embedding",
            "hidden": "mtp.pre_fc_norm_hidden",
            "proj": "mtp.fc",
            "norm": "mtp.norm",
        }
    prefix = f"model.layers.{config['num_hidden_layers']}."
    return {
        "block": prefix,
        "token": f"{prefix}enorm",
        "hidden": f"{prefix}hnorm",
        "proj": f"{prefix}eh_proj",
        "norm": f"{prefix}shared_head.norm",
    }


def rope(config: dict[str, Any]) -> tuple[list[float], float]:
    """The angular frequencies (radians per position) and the factor of cos and sin."""
    parameters = config.get("rope_parameters") or {}
    theta: float = parameters.get("rope_theta") or config["rope_theta"]
    scaling = config.get("rope_scaling") or parameters
    if "qk_rope_head_dim" in config:
        dims = config["qk_rope_head_dim"]
    else:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        default = config.get("partial_rotary_factor", DEFAULT_PARTIAL.get(family(config), 1.0))
        dims = int(head_dim * parameters.get("partial_rotary_factor", default))
    plain = [theta ** (-2.0 * d / dims) for d in range(dims // 2)]
    if scaling.get("type", scaling.get("rope_type", "default")) == "default":
        return plain, 1.0

    # YaRN: frequencies of few turns within the original context are divided by the factor.
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def index(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index(scaling["beta_fast"])), 0)
    high = min(math.ceil(index(scaling["beta_slow"])), dims - 1)
    frequencies = []
    for d, frequency in enumerate(plain):
        divided = min(max((d - low) / (high - low), 0.0), 1.0)
        frequencies.append(frequency * (divided / factor + 1 - divided))
    both = [mscale(factor, scaling[key]) for key in ("mscale", "mscale_all_dim")]
    return frequencies, both[0] / both[1]


class MtpReference:
    """One module, from the tensors of its checkpoint."""

    def __init__(
        self,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        embed: Tensor,
        head: Tensor,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.config = text_config(config)
        self.names = module_names(config)
        self.tensors = tensors
        self.embed = embed.to(dtype)
        self.head = head.to(dtype)
        self.dtype = dtype
        self.family = family(self.config)
        self.frequencies, self.rope_factor = rope(self.config)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.margin = math.inf  # by how much the nearest expert was not chosen

    def has(self, name: str) -> bool:
        """Whether the block has such a tensor."""
        return self.names["block"] + name in self.tensors

    def weight(self, name: str) -> Tensor:
        """A tensor by its full name, dequantized if it is fp8 with a scale per 128 x 128 block."""
        tensor = self.tensors[name].to(self.dtype)
        scales = self.tensors.get(f"{name}_scale_inv")
        if scales is None:
            return tensor
        out = torch.empty_like(tensor)
        for i in range(0, tensor.shape[0], FP8_BLOCK):
            for j in range(0, tensor.shape[1], FP8_BLOCK):
                block = (slice(i, i + FP8_BLOCK), slice(j, j + FP8_BLOCK))
                out[block] = tensor[block] * scales[i // FP8_BLOCK, j // FP8_BLOCK].to(self.dtype)
        return out

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A linear layer of the block, with its bias if it has one. x [in] -> [out]."""
        name = self.names["block"] + name
        y = self.weight(f"{name}.weight") @ x
        return y + self.weight(f"{name}.bias") if f"{name}.bias" in self.tensors else y

    def norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        """RMSNorm over the last axis; the files of Qwen3-Next and Qwen3.5 hold its weight - 1."""
        weight = self.weight(f"{name}.weight")
        if self.family in ("qwen3_next", "qwen3_5"):
            weight = 1 + weight
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return weight * x / torch.sqrt(mean_square + (eps or self.config["rms_norm_eps"]))

    def block_norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        """A norm of the block."""
        return self.norm(x, self.names["block"] + name, eps)

    def rotate(self, x: Tensor, position: int, pairs: list[tuple[int, int]]) -> Tensor:
        """Rotate every pair (a, b) of the last axis by its angle; the rest stays. x [..., n]."""
        out = x.clone()
        for (a, b), frequency in zip(pairs, self.frequencies, strict=True):
            cos = math.cos(position * frequency) * self.rope_factor
            sin = math.sin(position * frequency) * self.rope_factor
            out[..., a] = x[..., a] * cos - x[..., b] * sin
            out[..., b] = x[..., b] * cos + x[..., a] * sin
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append a row and attend to all. q [heads, a], k [kv_heads, a], v [kv_heads, b]."""
        self.keys.append(k)
        self.values.append(v)
        group = q.shape[0] // k.shape[0]
        out = []
        for head, query in enumerate(q):
            keys = torch.stack([row[head // group] for row in self.keys])
            values = torch.stack([row[head // group] for row in self.values])
            out.append(torch.softmax(keys @ query * scale, dim=0) @ values)
        return torch.stack(out)

    def attention(self, x: Tensor, position: int) -> Tensor:
        """Attention with keys and values of fewer heads. x [H] -> [H]."""
        c = self.config
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        k = self.linear(x, "self_attn.k_proj").reshape(kv_heads, -1)
        v = self.linear(x, "self_attn.v_proj").reshape(kv_heads, -1)
        head_dim = k.shape[1]
        q = self.linear(x, "self_attn.q_proj").reshape(heads, -1)
        gate = None
        if self.family in ("qwen3_next", "qwen3_5"):  # each head: its query, then its gate
            q, gate = q[:, :head_dim], q[:, head_dim:]
        if self.has("self_attn.q_norm.weight"):  # per head, before RoPE
            q = self.block_norm(q, "self_attn.q_norm")
            k = self.block_norm(k, "self_attn.k_norm")
        half = len(self.frequencies)  # rotate-half, within the first 2 * half dimensions
        pairs = [(d, d + half) for d in range(half)]
        out = self.attend(
            self.rotate(q, position, pairs), self.rotate(k, position, pairs), v, head_dim**-0.5
        )
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return self.linear(out.reshape(-1), "self_attn.o_proj")

    def latent_attention(self, x: Tensor, position: int) -> Tensor:
        """DeepSeek's multi-head latent attention, expanded. x [H] -> [H]."""
        c = self.config
        heads, nope, rank = c["num_attention_heads"], c["qk_nope_head_dim"], c["kv_lora_rank"]
        rotary = c["qk_rope_head_dim"]
        pairs = [(2 * d, 2 * d + 1) for d in range(rotary // 2)]  # interleaved

        if c["q_lora_rank"] is None:
            q = self.linear(x, "self_attn.q_proj")
        else:
            latent = self.linear(x, "self_attn.q_a_proj")
            latent = self.block_norm(latent, "self_attn.q_a_layernorm", MLA_EPS)
            q = self.linear(latent, "self_attn.q_b_proj")
        q = q.reshape(heads, nope + rotary)
        q = torch.cat([q[:, :nope], self.rotate(q[:, nope:], position, pairs)], dim=1)

        compressed = self.linear(x, "self_attn.kv_a_proj_with_mqa")
        latent = self.block_norm(compressed[:rank], "self_attn.kv_a_layernorm", MLA_EPS)
        shared = self.rotate(compressed[rank:], position, pairs)  # one rotary key for all heads
        expanded = self.linear(latent, "self_attn.kv_b_proj").reshape(heads, -1)
        k = torch.cat([expanded[:, :nope], shared.expand(heads, rotary)], dim=1)
        v = expanded[:, nope:]

        scale = (nope + rotary) ** -0.5
        scaling = c.get("rope_scaling") or {}
        if scaling.get("mscale_all_dim"):
            scale *= mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
        return self.linear(self.attend(q, k, v, scale).reshape(-1), "self_attn.o_proj")

    def swiglu(self, x: Tensor, name: str) -> Tensor:
        """``down(silu(gate(x)) * up(x))``. x [H] -> [H]."""
        gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        return self.linear(silu(gate) * up, f"{name}.down_proj")

    def expert(self, x: Tensor, n: int) -> Tensor:
        """Expert n, from numbered tensors or from fused ones. x [H] -> [H]."""
        if self.has(f"mlp.experts.{n}.down_proj.weight"):
            return self.swiglu(x, f"mlp.experts.{n}")
        prefix = f"{self.names['block']}mlp.experts."
        gate, up = (self.weight(f"{prefix}gate_up_proj")[n] @ x).chunk(2)
        return self.weight(f"{prefix}down_proj")[n] @ (silu(gate) * up)

    def choose(self, scores: Tensor, count: int) -> list[int]:
        """The ``count`` highest, and how clearly they are."""
        ranked = torch.sort(scores, descending=True)
        if count < len(scores):
            self.margin = min(self.margin, float(ranked.values[count - 1] - ranked.values[count]))
        return ranked.indices[:count].tolist()

    def softmax_experts(self, x: Tensor) -> Tensor:
        """Qwen's experts: softmax, then top k; one shared expert with a gate. x [H] -> [H]."""
        c = self.config
        weights = torch.softmax(self.linear(x, "mlp.gate"), dim=0)
        chosen = self.choose(weights, c["num_experts_per_tok"])
        weights = weights[chosen]
        if c.get("norm_topk_prob", True):
            weights = weights / weights.sum()
        out = sum(w * self.expert(x, n) for w, n in zip(weights, chosen, strict=True))
        shared = torch.sigmoid(self.linear(x, "mlp.shared_expert_gate"))
        return out + shared * self.swiglu(x, "mlp.shared_expert")

    def sigmoid_experts(self, x: Tensor) -> Tensor:
        """DeepSeek's experts: sigmoid, groups, a bias that only chooses. x [H] -> [H]."""
        c = self.config
        scores = torch.sigmoid(self.linear(x, "mlp.gate"))
        biased = scores + self.weight(f"{self.names['block']}mlp.gate.e_score_correction_bias")
        groups = biased.reshape(c["n_group"], -1)
        best = torch.sort(groups, dim=1, descending=True).values[:, :2].sum(dim=1)
        allowed = torch.full_like(groups, -math.inf)
        for n in self.choose(best, c["topk_group"]):
            allowed[n] = groups[n]
        chosen = self.choose(allowed.reshape(-1), c["num_experts_per_tok"])
        weights = scores[chosen]
        if c["norm_topk_prob"]:
            weights = weights / (weights.sum() + 1e-20)
        weights = weights * c["routed_scaling_factor"]
        out = sum(w * self.expert(x, n) for w, n in zip(weights, chosen, strict=True))
        return out + self.swiglu(x, "mlp.shared_experts")

    def mlp(self, x: Tensor) -> Tensor:
        """The block's MLP or experts. x [H] -> [H]."""
        if self.has("mlp.gate.e_score_correction_bias"):
            return self.sigmoid_experts(x)
        return self.softmax_experts(x) if self.has("mlp.gate.weight") else self.swiglu(x, "mlp")

    def row(self, token: int, hidden: Tensor, position: int) -> Tensor:
        """Run one row after those before it. hidden [H] -> y [H]."""
        e = self.norm(self.embed[token], self.names["token"])
        h = self.norm(hidden, self.names["hidden"])
        both = torch.cat([h, e] if self.family == "mimo" else [e, h])
        x = self.weight(f"{self.names['proj']}.weight") @ both
        attention = self.latent_attention if "kv_lora_rank" in self.config else self.attention
        x = x + attention(self.block_norm(x, "input_layernorm"), position)
        x = x + self.mlp(self.block_norm(x, "post_attention_layernorm"))
        return self.norm(x, self.names["norm"])

    def engine(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [L + 3], hidden [L, H] -> logits [L + 2, V], y [L + 2, H]."""
        self.keys, self.values = [], []
        states: list[Tensor] = []
        for i in range(len(tokens) - 1):
            before = hidden[i].to(self.dtype) if i < len(hidden) else states[-1]
            states.append(self.row(int(tokens[i + 1]), before, i))
        y = torch.stack(states)
        return y @ self.head.T, y

    def package(self, tokens: Tensor, hidden: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """tokens [L + steps], hidden [L, H] -> logits [steps, L, V], y [steps, L, H]."""
        states = [hidden.to(self.dtype)]
        for step in range(steps):
            self.keys, self.values = [], []
            y = [self.row(int(tokens[i + 1 + step]), h, i) for i, h in enumerate(states[-1])]
            states.append(torch.stack(y))
        all_states = torch.stack(states[1:])
        return all_states @ self.head.T, all_states
