"""NeMo Automodel (NVIDIA-NeMo/Automodel): everything but the head and the maps under `model.*`."""

from mlx_drift.convert.dialects import Config, Dialect, Names, has, lift


def recognises(config: Config, names: Names) -> bool:
    """Tells it by the prefix."""
    return any(name.startswith("model.") and has({name}, "hidden_norm.weight") for name in names)


WINDOW = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers")


def flatten(config: Config) -> Config:
    """Leaves out the window: the config is the target's own, but the drafter is trained without."""
    flat = lift(config, "eagle_config")
    return {key: value for key, value in flat.items() if key not in WINDOW}


AUTOMODEL = Dialect(
    "NeMo Automodel",
    recognises,
    flatten=flatten,
    tap_ids="output",
    bookkeeping=frozenset({"attn_implementation", "parallel_drafting"}),
)
