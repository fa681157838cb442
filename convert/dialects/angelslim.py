"""AngelSlim (Tencent/AngelSlim): SpecForge's layout under an architecture string of its own.

Its trainer builds RoPE with the default base (`llama_eagle3.py`), whatever `rope_theta` it writes;
sfllm's pull request 32 measured a Qwen3-4B head at 2.37 accepted drafts with the file's 1e6 and at
2.56 with 10000.
"""

from mlx_drift.convert.dialects import (
    Config,
    Dialect,
    Names,
    Trap,
    architecture,
    has,
    other_theta,
)


def recognises(config: Config, names: Names) -> bool:
    """Tells it by the architecture string."""
    return architecture(config) == "Eagle3LlamaForCausalLM" and has(names, "hidden_norm.weight")


THETA = (
    "rope_theta is not 10000: AngelSlim's trainer uses 10000 whatever the file says. If acceptance "
    "is low, try --rope-theta 10000"
)

ANGELSLIM = Dialect(
    "AngelSlim",
    recognises,
    tap_ids="output",
    bookkeeping=frozenset(
        "target_model_type modal_type image_token_id video_token_id vision_start_token_id "
        "vision_end_token_id".split()
    ),
    traps=(Trap("rope_theta", other_theta, THETA),),
)
