"""SmolLM2-135M-Instruct, a real target small enough for any machine, and the head shipped for it.

The target is known by what it is and not by its name alone: its sizes, its RoPE, its tokens and
their merges. So a folder of any width is found, and a fine-tune of it, which is told as one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_drift.errors import DriftError
from mlx_drift.files.json_file import read_json
from mlx_drift.files.tensors import read_safetensors

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HEAD = Path(__file__).parent / "smollm2"
"""The converted head; how it was trained, and on what, is in its card."""

CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rope_theta": 100000,
}
TOKENIZER = "2527a6f77525fbe3766ab83e5b75034145330f84a44d727e7c3b8fd8e9852384"
"""SHA-256 of the id of every token and of the merges in their order, as JSON."""

LAST_NORM = "3b87f8e27335e67fc08f159cabfd2d18f205d6c5b225a6f978153552bf01d559"
"""SHA-256 of the last norm's gains in float32: quantizing leaves them, training moves them."""


def is_like(folder: Path) -> bool:
    """Tells whether a folder's model has the sizes, the RoPE and the tokenizer.

    Raises:
        DriftError: If its `config.json` cannot be read.
    """
    config = read_json(folder / "config.json")
    if any(config.get(key) != value for key, value in CONFIG.items()):
        return False
    try:
        return _tokenizer(read_json(folder / "tokenizer.json")) == TOKENIZER
    except (DriftError, AttributeError, KeyError, TypeError):  # none, or of another make
        return False


def is_original(folder: Path) -> bool | None:
    """Tells whether a folder that `is_like` it has its weights, too; None if it has none."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            weights: Any = read_safetensors(path)
        except DriftError:
            return None  # the loader will say what is wrong
        if (gains := weights.get("model.norm.weight")) is not None:
            return _digest(bytes(memoryview(gains.astype(mx.float32)))) == LAST_NORM
    return None


def _tokenizer(tokenizer: dict[str, Any]) -> str:
    """Returns the digest of a `tokenizer.json`."""
    model = tokenizer["model"]
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]} | model["vocab"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return _digest(json.dumps([sorted(ids.items()), merges]).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
