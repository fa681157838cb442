"""Random MTP heads for the tiny targets of `families`, in the layouts of the Hub's repositories.

A head is drawn under canonical names, as mlx-lm's block has them, and then written as its family
writes it: the converter has to find its way back.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from families import BASE, CONFIGS
from mlx_drift.drafters.block import block_keys, build_block

Tensors = dict[str, mx.array]

QWEN = {"embedding_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden"}
NEXTN = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "fc": "eh_proj",
    "norm": "shared_head.norm",
}
MIMO = {
    "embedding_norm": "token_layernorm",
    "hidden_norm": "hidden_layernorm",
    "fc": "input_proj",
    "norm": "final_layernorm",
}


@dataclass(frozen=True)
class Family:
    """How a family writes its head.

    Attributes:
        target: The model file of `families` it is for.
        block: The model file that has its block.
        prefix: What stands before every name.
        block_prefix: What stands before the block's names besides.
        names: The head's own names.
        experts: Its block has experts.
        zero_centred: Norms are stored without their 1.
    """

    target: str
    block: str
    prefix: str
    names: dict[str, str]
    block_prefix: str = ""
    experts: bool = False
    zero_centred: bool = False


FAMILIES = {
    "qwen3_next": Family(
        "qwen3_next", "qwen3_next", "mtp.", QWEN, "layers.0.", experts=True, zero_centred=True
    ),
    "qwen3_5": Family("qwen3_5", "qwen3_5", "mtp.", QWEN, "layers.0.", zero_centred=True),
    "qwen3_5_moe": Family(
        "qwen3_5_moe", "qwen3_5", "mtp.", QWEN, "layers.0.", experts=True, zero_centred=True
    ),
    "deepseek_v3": Family(
        "deepseek_v3", "deepseek_v3", "model.layers.{layers}.", NEXTN, experts=True
    ),
    "deepseek_v3 dense": Family("deepseek_v3", "deepseek_v3", "model.layers.{layers}.", NEXTN),
    "glm4_moe": Family("glm4_moe", "glm4_moe", "model.layers.{layers}.", NEXTN, experts=True),
    "glm4_moe_lite": Family(
        "glm4_moe_lite", "glm4_moe_lite", "model.layers.{layers}.", NEXTN, experts=True
    ),
    "mimo": Family("mimo", "mimo", "model.mtp_layers.0.", MIMO),
    "speculators llama": Family("llama", "llama", "mtp_layers.0.", MIMO),
    "speculators qwen3": Family("qwen3", "qwen3", "mtp_layers.0.", MIMO),
}


def target_config(family: Family, **sizes: int) -> dict[str, Any]:
    """The config of the target, as its repository has it, with some sizes of its own."""
    config = copy.deepcopy({**BASE, "model_type": family.target, **CONFIGS[family.target]})
    config.get("text_config", config).update(sizes)
    return config


def config_of(name: str, **sizes: int) -> dict[str, Any]:
    """The config of a checkpoint that holds a family's head."""
    config = target_config(FAMILIES[name], **sizes)
    if name.startswith("speculators"):
        return {"speculators_model_type": "mtp", "transformer_layer_config": config}
    return config


def head(name: str, **sizes: int) -> Tensors:
    """Draws a family's head, under canonical names; every number is a short one, exact in bfloat16.

    Norms average 1 as mlx-lm has them.
    """
    family = FAMILIES[name]
    config = target_config(family, **sizes)
    config = config.get("text_config", config)
    mx.random.seed(0)
    block = build_block(block_keys(family.block, config, family.experts))
    shapes = {f"layers.0.{key}": value.shape for key, value in tree_flatten(block.parameters())}
    size = config["hidden_size"]
    shapes |= {f"{norm}.weight": (size,) for norm in ("embedding_norm", "hidden_norm", "norm")}
    shapes["fc.weight"] = (size, 2 * size)
    return {key: _draw(key, shape) for key, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...]) -> mx.array:
    noise = mx.random.normal(shape)
    if "norm" in name and len(shape) == 1:
        drawn = 1 + mx.round(noise * 16) / 64
    else:
        drawn = mx.round(noise * (16 if len(shape) > 1 else 4)) / 128
    return drawn


def written(name: str, tensors: Tensors, **sizes: int) -> Tensors:
    """Writes a head as its family does.

    Args:
        name: The family.
        tensors: The head under canonical names.
        sizes: Those of the target.
    """
    family = FAMILIES[name]
    config = target_config(family, **sizes)
    config = config.get("text_config", config)
    fused = family.target == "qwen3_5_moe"  # experts are one tensor, as transformers 5 writes them
    prefix = family.prefix.format(layers=config["num_hidden_layers"])
    out: Tensors = {}
    block = dict(tensors)
    for ours, theirs in {"norm": "norm", "fc": "fc", **family.names}.items():
        out[f"{prefix}{theirs}.weight"] = block.pop(f"{ours}.weight")
    for key, value in _in_torch(block, config, fused).items():
        out[prefix + family.block_prefix + key.removeprefix("layers.0.")] = value
    if family.zero_centred:
        out = {key: value - 1 if value.ndim == 1 else value for key, value in out.items()}
    return out


def _in_torch(block: Tensors, config: dict[str, Any], fused: bool) -> Tensors:
    """Undoes what mlx-lm's model files do to a block's tensors."""
    out: Tensors = {}
    mlp, attention = "layers.0.mlp", "layers.0.self_attn"
    for key, value in block.items():
        if ".switch_mlp." in key:
            part = key.split(".")[-2]
            if not fused:
                for number, expert in enumerate(value):
                    out[f"{mlp}.experts.{number}.{part}.weight"] = expert
            elif part == "down_proj":
                out[f"{mlp}.experts.down_proj"] = value
            elif part == "gate_proj":
                up = block[key.replace("gate_proj", "up_proj")]
                out[f"{mlp}.experts.gate_up_proj"] = mx.concatenate([value, up], axis=1)
        elif key.endswith("embed_q.weight"):
            values = block[f"{attention}.unembed_out.weight"]
            both = mx.concatenate([value.swapaxes(1, 2), values], axis=1)
            out[f"{attention}.kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])
        elif not key.endswith("unembed_out.weight"):
            out[key] = value
    return out


def write_repository(
    folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1, others: int = 0
) -> None:
    """Writes a model's repository: its head in the last shards, weights of its layers in others.

    Args:
        folder: Where to.
        config: The config.
        tensors: The head's tensors.
        shards: Over how many files they go.
        others: How many files hold none of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards + others == 1:
        save(folder / "model.safetensors", tensors)
        return
    files: list[Tensors] = [
        {f"model.layers.{i}.mlp.up_proj.weight": mx.zeros((8, 8))} for i in range(others)
    ]
    names = sorted(tensors)
    files += [{name: tensors[name] for name in names[i::shards]} for i in range(shards)]
    weight_map = {}
    for i, content in enumerate(files, start=1):
        name = f"model-{i:05}-of-{len(files):05}.safetensors"
        save(folder / name, content)
        weight_map |= dict.fromkeys(content, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save(path: Path, tensors: Tensors, file_format: str | None = "pt") -> None:
    """Writes a safetensors file that calls itself of some format, or of none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), tensors, {} if file_format is None else {"format": file_format})
