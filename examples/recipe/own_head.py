"""What drafters with an output layer of their own share: which tokens it says, and how."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recipe.target import Llama, LlamaConfig


class OwnHead(nn.Module):
    """A drafter whose output layer says some of the target's tokens."""

    d2t: Tensor
    t2d: Tensor

    def add_head(self, config: LlamaConfig, draft_ids: Tensor) -> None:
        """Adds the output layer and the maps of its rows, the last parts of a drafter."""
        draft_size = len(draft_ids)
        self.lm_head = nn.Linear(config.hidden_size, draft_size, bias=False)
        self.register_buffer("d2t", draft_ids - torch.arange(draft_size))  # id = row + d2t[row]
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.t2d[draft_ids] = True

    @property
    def draft_ids(self) -> Tensor:
        return self.d2t + torch.arange(len(self.d2t))

    def can_say(self, ids: Tensor) -> Tensor:
        """Which tokens are in the draft vocabulary."""
        return self.t2d[ids]

    def output(self, target: Llama) -> Tensor:
        """The rows of the target's output layer that tell the draft vocabulary, `[V, H]`."""
        return target.model.embed_tokens.weight[self.draft_ids]

    def predict(self, target: Llama, normed: Tensor, step: int) -> Tensor:
        """Logits over the draft vocabulary."""
        return self.lm_head(normed)

    def choose(self, target: Llama, normed: Tensor, step: int) -> Tensor:
        """The token that each row drafts."""
        return self.draft_ids[self.lm_head(normed).argmax(-1)]


def stored_tensors(drafter: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A drafter's tensors as a checkpoint has them: numbers in a dtype, maps as they are."""
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in drafter.state_dict().items()
    }


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes a checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
