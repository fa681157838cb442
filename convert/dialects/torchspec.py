"""TorchSpec (lightseekorg/TorchSpec): the canonical names, or `midlayer.*` in its native export.

Ids are outputs of layers; its export for vLLM turns those of Kimi heads into inputs, which the
rules of `conventions` tell by the target's number of layers.
"""

from mlx_drift.convert.dialects import Config, Dialect, Names, has


def recognises(config: Config, names: Names) -> bool:
    """Tells it by the version it leaves in the config."""
    marked = any(key.strip("_") == "torchspec_version" for key in config)
    return marked and has(names, "hidden_norm.weight")


TORCHSPEC = Dialect(
    "TorchSpec",
    recognises,
    tap_ids="output",
    bookkeeping=frozenset({"torchspec_version", "_torchspec_version"}),
)
