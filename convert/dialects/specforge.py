"""SafeAILab's and SpecForge's layout: one `midlayer.*`, a flat config.

The reference implementation's (SafeAILab/EAGLE, `.bin`) and SpecForge's (safetensors) checkpoints
carry the same tensors. SpecForge adds the tap ids in `eagle_config`, as outputs of layers, and the
switches of EAGLE-3.1, `fc_norm` and `norm_output`; SafeAILab writes no ids.
"""

from typing import Any

from mlx_drift.convert.dialects import Dialect

DROPPED = ("rotary_emb.inv_freq",)


def recognises(config: dict[str, Any], names: set[str]) -> bool:
    """Tells the layout by its `midlayer`, which no other dialect of a single layer uses."""
    return "midlayer.hidden_norm.weight" in names


def rename(name: str) -> str | None:
    """Renames `midlayer.X` to `layers.0.X`; the rest is canonical already."""
    if name.endswith(DROPPED):
        return None
    return name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Lifts the keys of `eagle_config` to the top level, where older files have them."""
    nested = config.get("eagle_config")
    if not isinstance(nested, dict):
        return config
    return {key: value for key, value in config.items() if key != "eagle_config"} | nested


SPECFORGE = Dialect("SafeAILab / SpecForge", recognises, rename, flatten, tap_ids="output")
