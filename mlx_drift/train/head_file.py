"""A head to train and a trained one on disk: folders that `convert_drafter` would write."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from mlx_drift.drafters.config import read_config
from mlx_drift.drafters.load import WEIGHTS, load_network
from mlx_drift.drafters.schema import DrafterConfig
from mlx_drift.errors import DriftError
from mlx_drift.files.paths import inside
from mlx_drift.files.tensors import read_safetensors

TOOL = "mlx-drift adapt"


@dataclass(frozen=True)
class Head:
    """A head's checkpoint in floats: what was quantized is dequantized.

    Attributes:
        config: Its config, of the floats.
        network: Its weights in the dtypes of the file.
        d2t: The offsets of its vocabulary, if it has its own.
        bits: What it was quantized to; None if it was not.
    """

    config: DrafterConfig
    network: Any
    d2t: mx.array | None
    bits: int | None


def read_head(folder: Path) -> Head:
    """Reads a head's folder.

    Raises:
        DriftError: If it is missing, damaged or not converted.
    """
    for name in ("config.json", WEIGHTS):
        inside(folder, name)
    config, weights = read_config(folder), read_safetensors(folder / WEIGHTS)
    d2t = weights.pop("d2t", None)
    network = load_network(config, weights, folder / WEIGHTS)
    if config.quantization is None:
        return Head(config, network, d2t, None)
    dequantize_model(network)
    mx.eval(mx.random.state)  # the layers drew first values of their own
    return Head(replace(config, quantization=None), network, d2t, config.quantization.bits)


def write_head(folder: Path, weights: Mapping[str, mx.array], original: Path) -> None:
    """Writes a head that was trained, in the dtypes of the one it was; it is not quantized.

    Each file is put in place at once; until then the folder holds the one before.

    Args:
        folder: The folder; made if it is not there.
        weights: The weights, under their canonical names.
        original: The folder of the head as it was.

    Raises:
        DriftError: If the disk does not take it.
    """
    head = read_head(original)
    before = tree_flatten(head.network.parameters())
    after = {name: weights[name].astype(old.dtype) for name, old in before}
    if head.d2t is not None:
        after["d2t"] = head.d2t
    config = replace(head.config, source=head.config.source | {"adapted_with": TOOL})
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    files = [folder / "config.json", folder / WEIGHTS]
    partials = [file.with_name(f"partial-{file.name}") for file in files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partials[0].write_text(text, encoding="utf-8")
        mx.save_safetensors(str(partials[1]), after, {"format": "mlx"})
        for partial, file in zip(partials, files, strict=True):
            partial.replace(file)
    except (OSError, RuntimeError) as error:
        for partial in partials:
            partial.unlink(missing_ok=True)
        raise DriftError(f"{folder}: cannot be written ({error})") from None
