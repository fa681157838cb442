"""The one schema every drafter meets, whatever checkpoint it came from.

A config is a frozen dataclass, read strictly from the `config.json` of a converted drafter: this
format is ours, so an unknown key, kind or version is an error and nothing is guessed at load.
What a source checkpoint left open was decided by `mlx_drift.convert`, which noted in `provenance`
where each value came from.
"""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mlx_drift.drafters.chain_config import Eagle3Config, Eagle4Config, EagleConfig, MTPConfig
from mlx_drift.drafters.heads_config import HydraConfig, HydraPrefixConfig, MedusaConfig
from mlx_drift.drafters.schema import FORMAT_VERSION, DrafterConfig, Quantization, strictly
from mlx_drift.drafters.slots_config import DFlashConfig, DSparkConfig, PEagleConfig
from mlx_drift.errors import DriftError, brief
from mlx_drift.files.json_file import read_json
from mlx_drift.target.model import TargetShape

MOST_PADDING = 1024
"""Rows that a vocabulary is padded with, at most."""

CONFIGS: dict[str, type[DrafterConfig]] = {
    "eagle3": Eagle3Config,
    "eagle4": Eagle4Config,
    "p-eagle": PEagleConfig,
    "dflash": DFlashConfig,
    "dspark": DSparkConfig,
    "eagle": EagleConfig,
    "mtp": MTPConfig,
    "medusa": MedusaConfig,
    "hydra": HydraConfig,
    "hydra-prefix": HydraPrefixConfig,
}


def choices_of(kind: str) -> set[str]:
    """Returns the fields of a kind's config that may have more than one value."""
    hints = get_type_hints(CONFIGS[kind])
    return {
        name for name, h in hints.items() if get_origin(h) is not Literal or len(get_args(h)) > 1
    }


def config_from_dict(values: dict[str, Any]) -> DrafterConfig:
    """Reads a config, strictly.

    Raises:
        DriftError: If the kind or version is unknown, a key is unknown or missing, or a value makes
            no sense.
    """
    kind = values.get("drafter_type")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise DriftError(f"drafter_type is {brief(kind)}; this version runs {', '.join(CONFIGS)}")
    if values.get("format_version") != FORMAT_VERSION:
        raise DriftError(
            f"format_version is {brief(values.get('format_version'))}; this version of mlx-drift "
            f"reads {FORMAT_VERSION}: convert the drafter again, or upgrade mlx-drift"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    values["target"] = strictly(TargetShape, values.get("target"), "target")
    if values.get("quantization") is not None:
        values["quantization"] = strictly(Quantization, values["quantization"], "quantization")
    return strictly(CONFIGS[kind], values, "the config")


def pads(vocab_size: int, padded: int) -> bool:
    """Tells whether one vocabulary may be another, padded: all ids of the smaller are there.

    Models round their tokenizers' sizes up to a multiple of some power of two: Qwen3's 151,669 to
    151,936, DeepSeek-V3's 128,815 to 129,280. Heads are known that were made for the former.
    """
    missing = padded - vocab_size
    return 0 < missing < MOST_PADDING and 16 * missing < padded


def check_target(config: DrafterConfig, target: TargetShape, where: str) -> None:
    """Checks that a drafter was made for such a target.

    Args:
        config: The drafter's config.
        target: The target's sizes.
        where: The drafter's path, for the message.

    Raises:
        DriftError: Naming the first size that differs.
    """
    for key, what in (
        ("hidden_size", "hidden size"),
        ("vocab_size", "vocabulary size"),
        ("num_layers", "number of layers"),
    ):
        made_for, given = getattr(config.target, key), getattr(target, key)
        if key == "vocab_size" and pads(made_for, given):
            continue
        if None not in (made_for, given) and made_for != given:
            raise DriftError(
                f"{where}: the drafter was made for a target whose {what} is {made_for}, but this "
                f"target's is {given}. Use the target it was trained on"
            )
    if target.num_layers is not None and config.taps[-1] > target.num_layers + 1:
        raise DriftError(
            f"{where}: the drafter taps the output of layer {config.taps[-1] - 1}, but this "
            f"target has {target.num_layers} layers. Use the target it was trained on"
        )


def read_config(folder: Path) -> DrafterConfig:
    """Reads the config of a converted drafter.

    Raises:
        DriftError: If `config.json` is missing, unreadable, or not of this format.
    """
    path = folder / "config.json"
    values = read_json(path)
    if "drafter_type" not in values:
        raise DriftError(
            f"{path} is not a converted drafter (it has no drafter_type). Convert it first: "
            f"mlx-drift convert {folder} --mlx-path OUT"
        )
    try:
        return config_from_dict(values)
    except DriftError as error:
        raise DriftError(f"{path}: {error}") from None
