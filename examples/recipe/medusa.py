"""Medusa heads in plain PyTorch, with vLLM's tensor names (arXiv 2401.10774).

Head s is a residual block and a linear layer over the draft vocabulary. All read the target's
final normed state: that of position i tells the target's own head token i+1, and head s, from 0,
token i+2+s. The heads read no token, nothing of each other, and no other position.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from recipe.own_head import stored_tensors, write
from recipe.rows import Row
from recipe.target import Llama, LlamaConfig


class ResidualBlock(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, size)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


class Medusa(nn.Module):
    token_map: Tensor

    def __init__(self, config: LlamaConfig, draft_ids: Tensor, heads: int) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.blocks = nn.ModuleList(ResidualBlock(size) for _ in range(heads))
        self.lm_heads = nn.ModuleList(
            nn.Linear(size, len(draft_ids), bias=False) for _ in range(heads)
        )
        self.register_buffer("token_map", draft_ids)
        known = torch.zeros(config.vocab_size, dtype=torch.bool)
        known[draft_ids] = True
        self.register_buffer("known", known, persistent=False)

    def init_from_target(self, target: Llama) -> None:
        """Start as the target's own head, with blocks that add nothing."""
        with torch.no_grad():
            for block, head in zip(self.blocks, self.lm_heads, strict=True):
                for layer in block.layers:
                    layer.weight.zero_()
                    layer.bias.zero_()
                head.weight.copy_(target.model.embed_tokens.weight[self.token_map])

    def start(self, row: Row) -> Tensor:
        """What `unroll` starts from, of what the target makes of a row."""
        return row.final[None]

    def can_say(self, ids: Tensor) -> Tensor:
        """Which tokens are in the draft vocabulary."""
        return self.known[ids]

    def output(self, target: Llama) -> Tensor:
        """The rows of the target's output layer that tell the draft vocabulary, `[V, H]`."""
        return target.model.embed_tokens.weight[self.token_map]

    def predict(self, target: Llama, state: Tensor, step: int) -> Tensor:
        """Logits of head `step` over the draft vocabulary."""
        return self.lm_heads[step](state)

    def choose(self, target: Llama, state: Tensor, step: int) -> Tensor:
        """The token that each row drafts."""
        return self.token_map[self.predict(target, state, step).argmax(-1)]

    def unroll(
        self,
        final: Tensor,
        next_embedding: Callable[[int, Tensor | None], Tensor],
        steps: int,
        rows: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What each head makes of every row: as Eagle3.unroll, but that no token is read."""
        final = final if rows is None else final[:, rows]
        for block in self.blocks[:steps]:
            state = block(final)
            yield state, state

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """The layout of vLLM's Medusa models."""
        stored: dict[str, Any] = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": self.config.hidden_size,
            "vocab_size": self.config.vocab_size,
            "truncated_vocab_size": len(self.token_map),
            "num_heads": len(self.blocks),
            "num_hidden_layers": 1,
            "medusa_fc_bias": True,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        write(folder, stored, stored_tensors(self, dtype))

    @classmethod
    def load(cls, folder: Path, config: LlamaConfig) -> "Medusa":
        stored = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        drafter = cls(config, tensors["token_map"], stored["num_heads"])
        drafter.load_state_dict(tensors)
        return drafter
