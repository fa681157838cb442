"""EAGLE-3 drafters in plain PyTorch, with SpecForge's tensor names.

One decoder layer whose q/k/v read [embedding of the next token ; target feature]. Row i pairs the
target's residual streams at position i with token i+1 and predicts token i+2; from the second
step on, the drafter's own state replaces the target feature. `normalized` is the one difference
between the two drafters of the pair (EAGLE-3.1):

* `fc_norm`: an RMSNorm for each tapped stream, so that the deepest and largest does not drown
  the others;
* `norm_output`: the state that is fed back is the final-norm output, so its size is bounded.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from target import MLP, Attention, Llama, LlamaConfig, RMSNorm, rope_table


def tap_layers(layers: int) -> list[int]:
    """EAGLE-3's low, middle and high tap, as indices into [embedding, out_0, out_1, ...]."""
    return [2, layers // 2, layers - 3]


class DrafterLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, 2 * config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)


class Eagle3(nn.Module):
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: LlamaConfig, draft_ids: Tensor, normalized: bool) -> None:
        super().__init__()
        self.config, self.normalized = config, normalized
        self.taps = tap_layers(config.num_hidden_layers)
        size, draft_size = config.hidden_size, len(draft_ids)
        if normalized:
            self.fc_norm = nn.ModuleList(RMSNorm(size, config.rms_norm_eps) for _ in self.taps)
        self.fc = nn.Linear(len(self.taps) * size, size, bias=False)
        self.midlayer = DrafterLayer(config)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, draft_size, bias=False)
        self.register_buffer("d2t", draft_ids - torch.arange(draft_size))  # id = row + d2t[row]
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.t2d[draft_ids] = True

    @property
    def draft_ids(self) -> Tensor:
        return self.d2t + torch.arange(len(self.d2t))

    def init_from_target(self, target: Llama) -> None:
        """Start as a logit lens: the deepest tap goes straight to the target's norm and head."""
        size, layer = self.config.hidden_size, self.midlayer
        with torch.no_grad():
            self.fc.weight[:, -size:] = torch.eye(size)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            self.norm.weight.copy_(target.model.norm.weight)
            self.lm_head.weight.copy_(target.model.embed_tokens.weight[self.draft_ids])

    def feature(self, taps: list[Tensor]) -> Tensor:
        if self.normalized:
            taps = [norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)]
        return self.fc(torch.cat(taps, dim=-1))

    def unroll(
        self,
        taps: list[Tensor],
        next_embedding: Callable[[int, Tensor | None], Tensor],
        steps: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A draft chain from every row at once (train-time test): (normed, fed-back) states.

        `next_embedding(step, normed)` embeds the token that each row reads at `step`: the true
        next token in training, its own draft (from the previous step's `normed`) when measured.
        At step s, row i attends to the step-0 keys of rows <= i, and of steps 1..s to its own
        keys only: exactly what a cached chain that left the prompt at row i would see.
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        groups = attention.heads // attention.kv_heads
        state, normed = self.feature(taps), None
        length = state.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        chain: list[tuple[Tensor, Tensor]] = []  # keys and values of steps 0..s
        for step in range(steps):
            embedding = layer.input_layernorm(next_embedding(step, normed))
            u = torch.cat([embedding, layer.hidden_norm(state)], dim=-1)
            q, k, v = attention.qkv(u, rope_table(self.config, torch.arange(length) + step))
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
            q = q * self.config.head_dim**-0.5
            chain.append((k, v))
            (first_k, first_v), own = chain[0], chain[1:]
            scores = (q @ first_k.mT).masked_fill(~causal, -torch.inf)
            diagonal = [(q * own_k).sum(-1, keepdim=True) for own_k, _ in own]
            weights = torch.cat([scores, *diagonal], dim=-1).softmax(-1)
            heads = weights[..., :length] @ first_v
            for index, (_, own_v) in enumerate(own):
                heads = heads + weights[..., length + index, None] * own_v
            state = state + attention.out(heads)
            state = state + layer.mlp(layer.post_attention_layernorm(state))
            normed = self.norm(state)
            state = normed if self.normalized else state
            yield normed, state

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """SpecForge's layout, as safetensors in `folder` and as a torch file in `folder`-bin."""
        config = self.config
        # SpecForge numbers taps by the layer that writes them: one less than our indices.
        eagle: dict[str, Any] = {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in self.taps]}
        eagle["use_aux_hidden_state"] = True
        if self.normalized:
            eagle |= {"fc_norm": True, "norm_output": True}
        stored = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "num_hidden_layers": 1,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "max_position_embeddings": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "draft_vocab_size": len(self.d2t),
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "eagle_config": eagle,
        }
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.state_dict().items()
        }
        for path in (folder, folder.with_name(folder.name + "-bin")):
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        torch.save(tensors, folder.with_name(folder.name + "-bin") / "pytorch_model.bin")

    @classmethod
    def load(cls, folder: Path, config: LlamaConfig) -> "Eagle3":
        tensors = load_file(folder / "model.safetensors")
        draft_ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        drafter = cls(config, draft_ids, normalized="fc_norm.0.weight" in tensors)
        drafter.load_state_dict(tensors)
        return drafter
