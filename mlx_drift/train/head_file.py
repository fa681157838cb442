"""A trained head on disk: the folder that `convert_drafter` would write."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_drift.drafters.config import read_config
from mlx_drift.drafters.load import WEIGHTS
from mlx_drift.errors import DriftError
from mlx_drift.files.tensors import read_safetensors

TOOL = "mlx-drift adapt"


def write_head(folder: Path, weights: Mapping[str, mx.array], original: Path) -> None:
    """Writes a head that was trained, in the dtypes of the one it was.

    The weights are put in place at once; until then the folder holds those before.

    Args:
        folder: The folder; made if it is not there.
        weights: The weights, under their canonical names.
        original: The folder of the head as it was.

    Raises:
        DriftError: If the disk does not take it.
    """
    before = read_safetensors(original / WEIGHTS)
    after = {name: weights[name].astype(old.dtype) for name, old in before.items() if name != "d2t"}
    if "d2t" in before:
        after["d2t"] = before["d2t"]
    config = read_config(original)
    config = replace(config, source=config.source | {"adapted_with": TOOL})
    partial = folder / f"partial-{WEIGHTS}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(partial), after, {"format": "mlx"})
        partial.replace(folder / WEIGHTS)
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise DriftError(f"{folder}: cannot be written ({error})") from None
