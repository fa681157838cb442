"""EAGLE-1 and EAGLE-2 heads (SafeAILab/EAGLE `cnets1.py`), and vLLM's `model.*` form of them.

`fc` over the embedding and the target's final normed state, Llama layers of which the first has no
input norm, nothing after them: no final norm, no head.
"""

from mlx_drift.convert.dialects import Config, Dialect, Names, has


def recognises(config: Config, names: Names) -> bool:
    """Tells it by what is missing."""
    return has(names, "fc.weight", "layers.0.self_attn.q_proj.weight") and not any(
        name.endswith(("hidden_norm.weight", "layers.0.input_layernorm.weight"))
        or name.removeprefix("model.") in ("norm.weight", "lm_head.weight")
        for name in names
    )


EAGLE = Dialect("EAGLE-1/2", recognises, kind="eagle")
