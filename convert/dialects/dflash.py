"""DFlash and DSpark heads, of speculators and of z-lab's layout (SpecForge, ModelOpt, DeepSpec).

z-lab's keys stand in a nested `dflash_config` or beside the layers' own, and ids are outputs of
layers; speculators' are inputs. A DSpark head has the same layers and `markov_*` beside them, in a
module (`markov_head.`) or flat (ModelOpt). All call the norm of the context `hidden_norm`, as
EAGLE-3 calls another one.
"""

from mlx_drift.convert.dialects import Config, Dialect, Names, architecture, has, lift
from mlx_drift.convert.dialects import speculators as by_speculators

RENAMES = (
    (r"^hidden_norm\.", "context_norm."),
    (r"^(markov_head\.)?markov_w([12])\.", r"markov.w\2."),
    (r"^(markov_head\.)?(gate|joint)_proj\.", r"markov.\2."),
    (r"^confidence(_head\.|_)proj\.", "confidence."),
)


def has_markov(names: Names) -> bool:
    """Tells a DSpark head by its tensors."""
    marks = "markov_w1", "markov.w1", "confidence_", "confidence.weight"
    return any(mark in name for name in names for mark in marks)


def is_dflash(config: Config, names: Names) -> bool:
    """Tells it by the norm of the context, which stands beside the layers, and by `block_size`."""
    flat = lift(config, "dflash_config")
    return has(names, "fc.weight", "hidden_norm.weight") and (
        "block_size" in flat or "dflash" in architecture(config).lower()
    )


def of_speculators(config: Config, names: Names) -> bool:
    """Tells it by the model type."""
    return config.get("speculators_model_type") in ("dflash", "dspark")


def flatten(config: Config) -> Config:
    """Lifts `dflash_config`, and says ModelOpt's window in the others' keys."""
    flat = lift(config, "dflash_config")
    if flat.get("use_swa") is True:  # of all layers, whose slots see each other
        flat = flat | {"sliding_window": flat.get("swa_window_size"), "use_sliding_window": True}
        flat = flat | {"layer_types": None, "is_causal": False}
    return {key: value for key, value in flat.items() if key not in ("use_swa", "swa_window_size")}


def _dialects(name: str, kind: str) -> tuple[Dialect, Dialect]:
    """The two spellings of a kind."""
    spark = kind == "dspark"
    return (
        Dialect(
            f"{name} of speculators",
            lambda config, names: of_speculators(config, names) and has_markov(names) == spark,
            kind=kind,
            renames=RENAMES,
            flatten=by_speculators.flatten,
            tap_ids="input",
            bookkeeping=by_speculators.BOOKKEEPING,
        ),
        Dialect(
            name,
            lambda config, names: is_dflash(config, names) and has_markov(names) == spark,
            kind=kind,
            renames=RENAMES,
            flatten=flatten,
            tap_ids="output",
            bookkeeping=frozenset({"num_anchors", "confidence_head_alpha", "loss_decay_gamma"}),
        ),
    )


DFLASH_DIALECTS = (*_dialects("DFlash", "dflash"), *_dialects("DSpark", "dspark"))
