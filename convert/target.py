"""What the converter looks at of a target: its config, and what a drafter may share with it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_drift.convert.read.source import LocalFolder, read_folder
from mlx_drift.convert.read.stored import StoredTensor
from mlx_drift.errors import DriftError
from mlx_drift.files.hub import resolve
from mlx_drift.files.json_file import read_json
from mlx_drift.target.model import TargetShape


def target_folder(path_or_hf_repo: str) -> Path:
    """Returns a target's folder, of a Hub repository with its json files only.

    Raises:
        DriftError: If there is none.
    """
    return resolve(path_or_hf_repo, "target", None, ["config.json", "tokenizer.json"])


@dataclass(frozen=True)
class TargetConfig(TargetShape):
    """The sizes of a target, and all that its config says beside them."""

    config: dict[str, Any] = field(default_factory=dict)


def read_target_shape(path_or_hf_repo: str) -> TargetConfig:
    """Reads the sizes of a target from its config alone.

    Raises:
        DriftError: If there is none, or it does not tell.
    """
    config_path = target_folder(path_or_hf_repo) / "config.json"
    config = read_json(config_path)
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    sizes = []
    for key in ("hidden_size", "vocab_size", "num_hidden_layers"):
        size = config.get(key)
        if type(size) is not int or size < 1:
            raise DriftError(
                f"{config_path} is not the config of a target: {key} is {size!r:.80}, expected a "
                "positive whole number"
            )
        sizes.append(size)
    hidden_size, vocab_size, num_layers = sizes
    return TargetConfig(
        hidden_size=hidden_size, vocab_size=vocab_size, num_layers=num_layers, config=config
    )


def shared_with_target(
    tensors: dict[str, StoredTensor], path_or_hf_repo: str
) -> dict[str, StoredTensor]:
    """Finds the drafter's embedding and head where they are the target's own, bit for bit.

    Only a target whose weights are on this machine, unquantized, can be compared with.

    Args:
        tensors: The drafter's tensors under canonical names.
        path_or_hf_repo: The target.

    Returns:
        Those of `embed_tokens.weight` and `lm_head.weight` that are the target's.
    """
    try:
        theirs = read_folder(LocalFolder(target_folder(path_or_hf_repo))).tensors
    except DriftError:
        return {}
    by_end = {
        name.removeprefix("language_model.").removeprefix("model."): t for name, t in theirs.items()
    }
    head = by_end.get("lm_head.weight", by_end.get("embed_tokens.weight"))
    pairs = {"embed_tokens.weight": by_end.get("embed_tokens.weight"), "lm_head.weight": head}
    return {
        name: tensors[name]
        for name, other in pairs.items()
        if name in tensors and other is not None and _equal(tensors[name], other)
    }


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    return (a.shape, a.stored) == (b.shape, b.stored) and all(
        np.array_equal(x, y) for x, y in zip(a.blocks(), b.blocks(), strict=True)
    )
