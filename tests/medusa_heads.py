"""Medusa heads in every spelling there is, for the targets of `tiny`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dialects import DRAFT_VOCAB, Head, head, random, write
from tiny import HIDDEN, VOCAB
from torch_files import write_bin

HEADS = 3


def medusa(blocks: int = 1, *, bias: bool = True, reduced: bool = False) -> Head:
    """The heads, under canonical names."""
    rows = DRAFT_VOCAB if reduced else VOCAB
    tensors = {}
    for i in range(HEADS):
        for j in range(blocks):
            tensors[f"heads.{i}.blocks.{j}.weight"] = random(f"{i}.{j}", HIDDEN, HIDDEN)
            if bias:
                tensors[f"heads.{i}.blocks.{j}.bias"] = random(f"{i}.{j}.bias", HIDDEN)
        tensors[f"heads.{i}.lm_head.weight"] = random(f"{i}.head", rows, HIDDEN)
    if reduced:
        tensors["d2t"] = head().tensors["d2t"]
    return Head(tensors, (13,))


def spelt(made: Head, spelling: str) -> dict[str, np.ndarray]:
    """The tensors as one tool calls them."""
    blocks = sum(name.startswith("heads.0.blocks") for name in made.tensors) // 2
    tensors = {}
    for name, tensor in made.tensors.items():
        if name == "d2t":
            tensors["token_map"] = tensor + np.arange(len(tensor))
            continue
        _, i, *rest = name.split(".")
        if rest[0] == "blocks":
            j, what = rest[1:]
            tensors[
                {
                    "vllm": f"blocks.{i}.layers.{j}.{what}",
                    "tensorrt": f"medusa_heads.{i}.medusa_layers.{j}.linear.{what}",
                    "modelopt": f"medusa_heads.{i}.{j}.linear.{what}",
                    "model": f"medusa_head.{i}.{j}.linear.{what}",
                }.get(spelling, f"{i}.{j}.linear.{what}")
            ] = tensor
        else:
            tensors[
                {
                    "vllm": f"lm_heads.{i}.weight",
                    "tensorrt": f"medusa_heads.{i}.lm_head.weight",
                    "modelopt": f"medusa_heads.{i}.{blocks}.weight",
                    "model": f"medusa_head.{i}.{blocks}.weight",
                }.get(spelling, f"{i}.{blocks}.weight")
            ] = tensor
    return tensors


CONFIGS: dict[str, dict[str, Any]] = {
    "fasterdecoding": {"medusa_num_heads": 2, "medusa_num_layers": 1},  # as theirs, it lies
    "fasterdecoding pt": {"medusa_num_heads": 3, "base_model_name_or_path": "lmsys/vicuna"},
    "vllm": {"architectures": ["MedusaModel"], "num_heads": 3, "vocab_size": VOCAB},
    "modelopt": {"medusa": {"num_medusa_heads": 3, "num_medusa_layers": 1}},
    "tensorrt": {"medusa_num_heads": 3},
    "model": {
        "architectures": ["MedusaLlamaModel"],
        "medusa_num_heads": 3,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 12,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
    },
}


def write_medusa(made: Head, folder: Path, spelling: str) -> None:
    """Writes the heads as one tool does; of a model, with something of the model beside them."""
    tensors, config = spelt(made, spelling), CONFIGS[spelling]
    if spelling == "model":
        for name in ("embed_tokens", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"):
            tensors[f"model.{name}.weight"] = random(name, VOCAB, HIDDEN)
        tensors["lm_head.weight"] = random("base head", VOCAB, HIDDEN)
    if spelling != "fasterdecoding pt":
        write(folder, config, tensors)
        return
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_bin(folder / "medusa_lm_head.pt", tensors)
