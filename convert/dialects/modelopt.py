"""NVIDIA ModelOpt (NVIDIA/Model-Optimizer `hf_spec_export.py`, `unified_export_megatron.py`).

`eagle_config` is nested and full of switches; no `t2d`, no embedding. Deep heads from Megatron are
`midlayer.{i}.*`, where *every* layer's input norm is called `hidden_norm`. With
`use_aux_hidden_state: false` there is no `fc`: the head reads the target's final normed state.
Ids are outputs of layers, except in heads that end at the last layer (`gpt-oss-120b-Eagle3-v3`).
"""

from mlx_drift.convert.dialects import Config, Dialect, Names

MARKS = {"use_last_layernorm", "use_mtp_layernorm", "next_layer_regular"}


def recognises(config: Config, names: Names) -> bool:
    """Tells it by the switches of its `eagle_config`, or by numbered `midlayer`s."""
    nested = config.get("eagle_config")
    marked = isinstance(nested, dict) and bool(MARKS & nested.keys())
    return marked or any(name.startswith("midlayer.0.") for name in names)


MODELOPT = Dialect("NVIDIA ModelOpt", recognises, tap_ids="output")
