"""EAGLE-4 heads (eagle-harness, `LlamaForCausalLMEagle4`): EAGLE-3.1, and a head for candidates.

The cheap head tells which rows of the exact one are read. Where that one is the target's, which
may be quantized, scaled or capped, drafts come from all of it and the cheap head is left out. What
its ids of tap layers mean is not known.
"""

from mlx_drift.convert.dialects import Config, Dialect, Names, has, lift

CHEAP = "efficient_lm_head_down_proj.weight"


def recognises(config: Config, names: Names) -> bool:
    """Tells it by the cheap head."""
    return has(names, CHEAP)


def _has_head(config: Config, names: Names) -> bool:
    """Tells whether the exact head is there, too."""
    own = {name.rpartition("model.")[2] for name in names}
    return recognises(config, names) and "lm_head.weight" in own


EAGLE4_DIALECTS = (
    Dialect(
        "EAGLE-4",
        _has_head,
        kind="eagle4",
        renames=(
            (r"^efficient_lm_head_down_proj\.", "candidate_down."),
            (r"^efficient_lm_head\.", "candidate_up."),
        ),
    ),
    Dialect(
        "EAGLE-4 that drafts with the target's whole head",
        recognises,
        renames=((r"^efficient_lm_head(_down_proj)?\..*", ""),),
        flatten=lambda config: lift(
            {k: v for k, v in config.items() if k != "efficient_lm_head_config"}, "eagle_config"
        ),
    ),
)
