"""A multi-token prediction (MTP) head in plain PyTorch, with speculators' tensor names.

The head that DeepSeek-V3 and Qwen3-Next are trained with, here trained afterwards: a linear layer
reads [embedding of the next token ; hidden state], a full decoder block of the target's own sizes
follows, and the target's own norm-and-head reads the result. Row i pairs the target's final normed
state at position i with token i+1 and predicts token i+2; from the second step on the hidden state
is the head's own. It stores neither embedding nor head: both are the target's.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipe.chains import Chains
from recipe.rows import Row
from recipe.target import MLP, Attention, Llama, LlamaConfig, RMSNorm

PREFIX = "mtp_layers.0."

Feedback = Literal["post", "pre"]
"""Which state is read by the next step: after the final norm, as the target's own, or before it."""


class MTP(nn.Module):
    def __init__(self, config: LlamaConfig, feedback: Feedback = "post") -> None:
        super().__init__()
        self.config, self.feedback = config, feedback
        size, eps = config.hidden_size, config.rms_norm_eps
        self.token_layernorm = RMSNorm(size, eps)
        self.hidden_layernorm = RMSNorm(size, eps)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = Attention(config, size)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config)
        self.final_layernorm = RMSNorm(size, eps)

    def init_as_lens(self) -> None:
        """Start as a logit lens: the hidden state goes straight to the target's head.

        The gain of the target's norm is left out: the lens shows the token before the wanted one,
        and should not be sure of it.
        """
        size = self.config.hidden_size
        with torch.no_grad():
            self.input_proj.weight.zero_()
            self.input_proj.weight[:, size:] = torch.eye(size)
            self.self_attn.o_proj.weight.zero_()
            self.mlp.down_proj.weight.zero_()

    def start(self, row: Row) -> Tensor:
        """What `unroll` starts from, of what the target makes of a row."""
        return row.final[None]

    def can_say(self, ids: Tensor) -> Tensor:
        """Which tokens it may draft: all."""
        return torch.ones_like(ids, dtype=torch.bool)

    def output(self, target: Llama) -> Tensor:
        """The target's output layer `[V, H]`."""
        return target.model.embed_tokens.weight

    def predict(self, target: Llama, normed: Tensor, step: int) -> Tensor:
        """Logits over the vocabulary."""
        return target.head(normed)

    def choose(self, target: Llama, normed: Tensor, step: int) -> Tensor:
        """The token that each row drafts."""
        return target.head(normed).argmax(-1)

    def unroll(
        self,
        hidden: Tensor,
        next_embedding: Callable[[int, Tensor | None], Tensor],
        steps: int,
        rows: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As Eagle3.unroll, from the target's normed state: (normed, fed-back) states."""
        normed = None
        chains = Chains(self.self_attn, self.config, hidden.shape[1], rows)
        for step in range(steps):
            embedding = self.token_layernorm(next_embedding(step, normed))
            state = self.input_proj(torch.cat([embedding, self.hidden_layernorm(hidden)], dim=-1))
            heads = chains.heads(self.input_layernorm(state))
            if step == 0:
                state = state[:, chains.rows]
            state = state + self.self_attn.out(heads)
            state = state + self.mlp(self.post_attention_layernorm(state))
            normed = self.final_layernorm(state)
            hidden = normed if self.feedback == "post" else state
            yield normed, hidden

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """The layout of speculators' `mtp` models."""
        target = {
            "model_type": "llama",
            **asdict(self.config),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        }
        stored: dict[str, Any] = {
            "architectures": ["MTPDraftModel"],
            "speculators_model_type": "mtp",
            "num_nextn_predict_layers": 1,
            "transformer_layer_config": target,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        if self.feedback == "pre":
            stored["mtp_feedback"] = "pre"  # a key of our own: in the layout it is always post
        tensors = {PREFIX + name: tensor.to(dtype) for name, tensor in self.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path, config: LlamaConfig) -> "MTP":
        stored = json.loads((folder / "config.json").read_text())
        head = cls(config, stored.get("mtp_feedback", "post"))
        tensors = load_file(folder / "model.safetensors")
        head.load_state_dict({name.removeprefix(PREFIX): t for name, t in tensors.items()})
        return head
