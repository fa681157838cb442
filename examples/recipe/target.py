"""The target: a Llama in plain PyTorch, with Hugging Face's tensor names.

`forward` returns the residual stream between layers beside the logits: EAGLE-3 reads three of
them. A static KV cache serves batched generation; without one the pass is causal over the whole
row. Everything is fp32: on a CPU without AMX, bfloat16 matmuls are about 100 times slower.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rope_table(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each [..., length, head_dim]; one table serves all layers."""
    half = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = config.rope_theta ** -(half / config.head_dim)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates halves (Llama, GPT-NeoX), not interleaved pairs."""
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention. An EAGLE-3 layer reads twice the width: `input_size`."""

    def __init__(self, config: LlamaConfig, input_size: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(input_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[batch, heads, length, head_dim], rotated."""
        return apply_rope(self.split(self.q_proj(x), self.heads), rope)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Each [batch, kv_heads, length, head_dim]; the keys rotated."""
        k = apply_rope(self.split(self.k_proj(x), self.kv_heads), rope)
        return k, self.split(self.v_proj(x), self.kv_heads)

    def split(self, projected: Tensor, heads: int) -> Tensor:
        return projected.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def out(self, heads: Tensor) -> Tensor:
        return self.o_proj(heads.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class Cache:
    """Keys and values of all layers, preallocated: [layers, batch, kv_heads, length, head_dim].

    `visible` marks, per row, the slots that hold a token: rows of different lengths are padded on
    the left, so that all rows of a batch write the same slot.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor
    length: int = 0

    @classmethod
    def empty(cls, config: LlamaConfig, padding: Tensor, capacity: int) -> "Cache":
        shape = (config.num_hidden_layers, len(padding), config.num_key_value_heads, capacity)
        keys = torch.zeros(*shape, config.head_dim)
        visible = torch.arange(capacity) >= padding[:, None]
        return cls(keys, torch.zeros_like(keys), visible)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        stop = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : stop] = k
        self.values[layer, :, :, self.length : stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        index: int,
        cache: Cache | None,
        mask: Tensor | None,
    ) -> Tensor:
        normed = self.input_layernorm(x)
        q = self.self_attn.queries(normed, rope)
        k, v = self.self_attn.keys_values(normed, rope)
        if cache is not None:
            k, v = cache.update(index, k, v)
        heads = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        x = x + self.self_attn.out(heads)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """All of the weights: embeddings are tied. A module of its own for the sake of its name."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)

    def init_weights(self) -> None:
        """GPT-2's 0.02 scaled to this width; layers start as the identity on the stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)

    def hidden_states(self, ids: Tensor, cache: Cache | None = None) -> list[Tensor]:
        """[embedding, out_0, ..., out_{n-1}]: entry i is the residual stream entering layer i."""
        length = ids.shape[1]
        positions, mask = torch.arange(length, device=ids.device), None
        if cache is not None:
            slots = torch.arange(cache.length, cache.length + length)
            padding = (~cache.visible).sum(1)
            positions = (slots - padding[:, None]).clamp(min=0)[:, None]
            stop = cache.length + length
            causal = torch.arange(stop) <= slots[:, None]
            mask = (causal & cache.visible[:, None, :stop])[:, None]
            # A padding row would see nothing and softmax to NaN: let it see itself.
            mask |= (torch.arange(stop) == slots[:, None])[None, None]
        rope = rope_table(self.config, positions)
        states = [self.model.embed_tokens(ids)]
        for index, layer in enumerate(self.model.layers):
            states.append(layer(states[-1], rope, index, cache, mask))
        if cache is not None:
            cache.length += length
        return states

    def head(self, normed: Tensor) -> Tensor:
        return F.linear(normed, self.model.embed_tokens.weight)

    def logits(self, state: Tensor) -> Tensor:
        return self.head(self.model.norm(state))

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        return self.logits(self.hidden_states(ids, cache)[-1])

    def save(self, folder: Path, bos_token_id: int, eos_token_id: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self.config),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(self.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> "Llama":
        stored = json.loads((folder / "config.json").read_text())
        names = LlamaConfig.__dataclass_fields__
        model = cls(LlamaConfig(**{k: v for k, v in stored.items() if k in names}))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model
