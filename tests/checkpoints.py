"""Writes small PyTorch-style drafter checkpoints, for the targets of `tiny`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlx_drift.convert.read.torch_pickle import read_torch_checkpoint
from tiny import HIDDEN, VOCAB

DRAFT_VOCAB = 40
EMBEDDED = Path(__file__).parent / "data" / "eagle3.1-bin"
"""The embedded drafter as its trainer wrote it, in PyTorch's format."""


def specforge_config(**changes: Any) -> dict[str, Any]:
    """A config as SpecForge writes it; a key given as None is left out."""
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT_VOCAB,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        "fc_norm": True,
        "norm_output": True,
    } | changes
    return {key: value for key, value in config.items() if value is not None}


def specforge_tensors(dtype: Any = np.float16) -> dict[str, np.ndarray]:
    """The tensors that go with it, EAGLE-3.1, random."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        "midlayer.self_attn.q_proj.weight": (32, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": (16, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": (16, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": (HIDDEN, 32),
        "midlayer.mlp.gate_proj.weight": (64, HIDDEN),
        "midlayer.mlp.up_proj.weight": (64, HIDDEN),
        "midlayer.mlp.down_proj.weight": (HIDDEN, 64),
        "lm_head.weight": (DRAFT_VOCAB, HIDDEN),
    }
    for norm in (
        "midlayer.input_layernorm",
        "midlayer.hidden_norm",
        "midlayer.post_attention_layernorm",
        "norm",
        "fc_norm.0",
        "fc_norm.1",
        "fc_norm.2",
    ):
        shapes[f"{norm}.weight"] = (HIDDEN,)
    tensors = {name: rng.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes.items()}
    used = np.sort(rng.choice(VOCAB, DRAFT_VOCAB, replace=False))
    tensors["d2t"] = (used - np.arange(DRAFT_VOCAB)).astype(np.int64)
    tensors["t2d"] = np.isin(np.arange(VOCAB), used)
    return tensors


def write_checkpoint(
    folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None
) -> Path:
    """Writes `model.safetensors` and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or specforge_config()))
    return folder


def embedded_checkpoint(folder: Path, shards: int = 1) -> Path:
    """Writes `EMBEDDED` in safetensors; with an index if there is more than one shard."""
    stored = read_torch_checkpoint(EMBEDDED / "pytorch_model.bin")
    tensors = {name: np.array(tensor.whole()) for name, tensor in stored.items()}
    folder.mkdir(parents=True)
    shutil.copy(EMBEDDED / "config.json", folder)
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    if shards == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
    for i, name in enumerate(names):
        save_file(dict(list(tensors.items())[i::shards]), folder / name)
    return folder
