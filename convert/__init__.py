"""Converts PyTorch EAGLE-3 checkpoints to mlx-drift's canonical directory.

Installed as `mlx_drift.convert`. The way of a checkpoint: `source` reads it, `dialects` know its
spelling, `eagle3` understands it, `conventions` keep account of what was decided, `write` writes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_drift.convert.conventions import TapConvention
from mlx_drift.convert.eagle3 import Overrides, Resolved, understand
from mlx_drift.convert.source import read_checkpoint
from mlx_drift.convert.write import check_free, write_drafter
from mlx_drift.drafters.config import Quantization, check_target, read_json
from mlx_drift.drafters.load import build_network, quantize_linears, target_ids
from mlx_drift.errors import DriftError
from mlx_drift.hub import resolve
from mlx_drift.target import TargetShape

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def convert_drafter(
    source: str,
    mlx_path: str | Path,
    *,
    target: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    revision: str | None = None,
    taps: TapConvention | None = None,
    feedback: Literal["pre", "post"] | None = None,
) -> Resolved:
    """Converts a drafter checkpoint to a folder that `load_drafter` reads.

    Args:
        source: A folder, a weights file with `config.json` beside it, or a Hub repository.
        mlx_path: The folder to write; it must not exist.
        target: The target's folder or Hub repository: gives the number of layers where the
            checkpoint's tap layers depend on it, and is checked against. Only its config is read.
        quantize: Quantize the linear layers.
        q_bits: Bits a weight; None for the mode's default.
        q_group_size: Weights that share a scale; None for the mode's default.
        q_mode: mlx's quantization mode: affine, mxfp4, nvfp4 or mxfp8.
        dtype: Cast the floats: float16, bfloat16 or float32; None keeps the source's.
        revision: Branch, tag or commit on the Hub.
        taps: What the checkpoint's tap layers mean, where the rules do not tell or are wrong.
        feedback: Which state the next chain step gets, where the checkpoint's flag is wrong.

    Returns:
        What the checkpoint was understood as; `unknown_keys` names config keys nobody read.

    Raises:
        DriftError: If anything is missing, damaged, left over or contradictory. Nothing is
            written then.
    """
    path = Path(mlx_path).expanduser()
    check_free(path)
    if dtype is not None and dtype not in DTYPES:
        raise DriftError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    shape = read_target_shape(target) if target is not None else None
    checkpoint = read_checkpoint(source, revision)
    resolved = understand(checkpoint, shape, Overrides(taps, feedback))
    config, tensors = resolved.config, dict(resolved.tensors)
    if shape is not None:
        check_target(config, shape, source)

    d2t = tensors.pop("d2t", None)
    target_ids(config, d2t, checkpoint.weights_path)
    network = build_network(config, tensors, checkpoint.weights_path)
    if dtype is not None:
        network.set_dtype(DTYPES[dtype])
    if quantize:
        try:
            quantize_linears(network, q_group_size, q_bits, q_mode)
        except ValueError as error:
            raise DriftError(f"the drafter cannot be quantized so: {error}") from None
        fc = network.fc
        config = replace(
            config,
            quantization=Quantization(group_size=fc.group_size, bits=fc.bits, mode=fc.mode),
        )
    tensors = dict(tree_flatten(network.parameters()))
    if d2t is not None:
        tensors["d2t"] = d2t
    write_drafter(path, config, tensors)
    return replace(resolved, config=config, tensors=tensors)


def read_target_shape(path_or_hf_repo: str) -> TargetShape:
    """Reads the sizes of a target from its config alone.

    Raises:
        DriftError: If there is none, or it does not tell.
    """
    config_path = resolve(path_or_hf_repo, "target", None, ["config.json"]) / "config.json"
    config = read_json(config_path)
    config = config.get("text_config") or config
    try:
        return TargetShape(
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
        )
    except (KeyError, TypeError) as error:
        raise DriftError(f"{config_path} is not the config of a target: {error}") from None
