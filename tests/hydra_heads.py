"""Hydra heads as their trainer saves them, for the targets of `tiny`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dialects import HEADS, KV_HEADS, LAYERS, layer, random, write
from tiny import HIDDEN, VOCAB
from torch_files import write_bin

DRAFTS = 3
ARCHITECTURES = ("mlp", "prefix-mlp", "eagle-attn")
BASE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
}
"""Of the target's config what the checkpoint leaves out."""


def hydra(architecture: str, blocks: int = 2) -> dict[str, np.ndarray]:
    """The tensors of one kind, the target's own embedding beside them."""
    shapes: dict[str, tuple[int, ...]] = {"input_embed_fn.weight": (VOCAB, HIDDEN)}
    if architecture == "eagle-attn":
        shapes |= {"fc.weight": (HIDDEN, 2 * HIDDEN), "fc.bias": (HIDDEN,)}
        made = layer(0, HIDDEN).items()
        own = {name.replace("layers.0.", "attn."): tensor for name, tensor in made}
        return own | {name: random(name, *shape) for name, shape in shapes.items()}
    prefix = architecture == "prefix-mlp"
    for head in range(DRAFTS):
        for block in range(blocks):
            at = f"hydra_mlp.{head}.{2 * block + 1 if prefix else block}"
            wide = (head + 2) * HIDDEN if block == 0 else HIDDEN
            for part in ("linear", "res_connection") if block == 0 else ("linear",):
                shapes |= {f"{at}.{part}.weight": (HIDDEN, wide), f"{at}.{part}.bias": (HIDDEN,)}
        at = f"hydra_lm_head.{head}.1" if prefix else f"hydra_lm_head.{head}"
        shapes |= {f"{at}.weight": (VOCAB, HIDDEN), f"{at}.bias": (VOCAB,)}
    own = {}
    if prefix:
        named = (layer(0, HIDDEN) | {"norm.weight": random("norm", HIDDEN)}).items()
        own = {f"prefix_embeding_layer.{name}": tensor for name, tensor in named}
        shapes |= {"prefix_embeding_layer.embed_tokens.weight": (VOCAB, HIDDEN)}
    return own | {name: random(name, *shape) for name, shape in shapes.items()}


def write_hydra(architecture: str, folder: Path, form: str = "safetensors", **config: Any) -> None:
    """Writes the heads: as the trainer does (`pt`), or as users save them again."""
    config = {
        "hydra_num_heads": 1 if architecture == "eagle-attn" else DRAFTS,
        "hydra_head_arch": architecture,
        "hidden_state_offset": 0,
    } | config
    if form == "safetensors":
        write(folder, config, hydra(architecture))
        return
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_bin(folder / "hydra_lm_head.pt", hydra(architecture))
