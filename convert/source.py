"""Where a checkpoint comes from: a folder, a weights file, or a Hub repository.

Only json and weights are ever looked at; nothing in a checkpoint is executed.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_drift.convert.torch_pickle import read_torch_checkpoint
from mlx_drift.drafters.config import read_json
from mlx_drift.errors import DriftError
from mlx_drift.hub import resolve
from mlx_drift.tensors import read_safetensors

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there


@dataclass(frozen=True)
class Checkpoint:
    """A PyTorch drafter checkpoint, read but not yet understood."""

    config_path: Path
    weights_path: Path
    config: dict[str, Any]
    tensors: dict[str, mx.array]
    source: dict[str, str]  # `repo` or `path`, `revision`, `file`, `sha256`


def read_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Reads the config and all tensors of a checkpoint.

    Args:
        source: A folder, a `.safetensors` or `.bin` file with `config.json` beside it, or a Hub
            repository.
        revision: Branch, tag or commit on the Hub.

    Raises:
        DriftError: If anything is missing or damaged.
    """
    path = Path(source).expanduser()
    if path.is_file():
        folder, weights = path.parent, path
    else:
        folder, weights = _find(source, revision)
    if path.exists():
        origin = {"path": folder.resolve().name}  # the rest of the path is nobody else's business
    else:
        origin = {"repo": source, "revision": folder.name}  # a snapshot is named by its commit
    config_path = folder / "config.json"
    return Checkpoint(
        config_path=config_path,
        weights_path=weights,
        config=read_json(config_path),
        tensors=_read_tensors(weights),
        source=origin | {"file": weights.name, "sha256": _sha256(weights)},
    )


def _find(source: str, revision: str | None) -> tuple[Path, Path]:
    """Returns the folder and its weights; of a Hub repository one form of them is fetched."""
    for name in WEIGHTS:
        folder = resolve(source, "drafter checkpoint", revision, ["config.json", name])
        if (folder / name).is_file():
            return folder, folder / name
    raise DriftError(f"{folder}: holds no weights; expected {' or '.join(WEIGHTS)}")


def _read_tensors(path: Path) -> dict[str, mx.array]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".bin":
        return read_torch_checkpoint(path)
    raise DriftError(f"{path}: expected a .safetensors or .bin file")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
