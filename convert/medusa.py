"""Understands Medusa heads: all sizes are in the tensors, and configs are known to lie about them.

FasterDecoding's v1.3 heads say that there are 2, and the file has 5.
"""

from typing import Any

from mlx_drift.convert.conventions import BOOKKEEPING, TapConvention, Undecided, Values
from mlx_drift.convert.heads import count_heads, read_last_state
from mlx_drift.convert.layers import Overrides, Tensors
from mlx_drift.errors import DriftError, brief
from mlx_drift.target.model import TargetShape


def understand_medusa(
    values: Values,
    tensors: Tensors,
    weights: str,
    tap_ids: TapConvention | None,
    target: TargetShape | None,
    overrides: Overrides,
) -> tuple[dict[str, Any], Undecided | None]:
    """Resolves every field of a `MedusaConfig`; arguments and results as `understand_eagle3`'s.

    Raises:
        DriftError: If anything is missing or contradictory, or an override says what such heads
            have not.
    """
    overrides.refuse(
        f"{weights} holds Medusa heads, which read the target's final norm and feed nothing back",
        *("taps", "feedback", "rope_theta", "window", "slots"),
    )
    heads, blocks = count_heads(tensors, weights, "Medusa")
    first = tensors["heads.0.lm_head.weight"]
    rows, hidden_size = first.shape
    for key, value in (("original_lm_head", False), ("logit_scale", 1.0)):
        if values.take(key, value) != value:
            raise DriftError(
                f"{values.file}: {key} is {brief(values.config[key])}; these heads are run only "
                f"with {value}"
            )
    said = values.config.get("medusa_num_heads")
    if said not in (None, heads):
        values.notes.append(f"medusa_num_heads is {brief(said)}, the file has {heads} heads")
    vocab = values.size("vocab_size", rows if target is None else target.vocab_size)
    if values.size("hidden_size", hidden_size) != hidden_size:
        raise DriftError(
            f"{values.file}: hidden_size is {values.config['hidden_size']}, but the heads read "
            f"{hidden_size} values"
        )
    num_layers = None if target is None else target.num_layers
    if "num_key_value_heads" in values.config:  # a whole model's config
        num_layers = values.size("num_hidden_layers", num_layers)
        values.notes.append(
            "the heads were trained with the model in the same checkpoint: they fit that model "
            "alone, not the one it was made from"
        )
        values.look(*(values.config.keys() - BOOKKEEPING))
    fields = {
        "drafter_type": "medusa",
        "format_version": 1,
        "hidden_size": hidden_size,
        "num_heads": values.rule("num_heads", heads, "the heads in the file"),
        "num_blocks": values.rule("num_blocks", blocks, "the blocks in the file"),
        "block_bias": "heads.0.blocks.0.bias" in tensors,
        "draft_vocab_size": values.rule("draft_vocab_size", rows, "rows of the heads"),
        "target": {"hidden_size": hidden_size, "vocab_size": vocab, "num_layers": num_layers},
    }
    taps, undecided = read_last_state(values, num_layers, f"{weights}: a Medusa head")
    return fields | taps, undecided
