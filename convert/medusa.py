"""Understands Medusa heads: all sizes are in the tensors, and configs are known to lie about them.

FasterDecoding's v1.3 heads say that there are 2, and the file has 5.
"""

from mlx_drift.convert.conventions import BOOKKEEPING
from mlx_drift.convert.given import Given, Understood
from mlx_drift.convert.heads import read_heads
from mlx_drift.errors import DriftError, brief


def understand_medusa(given: Given) -> Understood:
    """Resolves every field of a `MedusaConfig`.

    Raises:
        DriftError: If anything is missing or contradictory, or an override says what such heads
            have not.
    """
    values = given.values
    given.overrides.refuse(
        f"{given.weights} holds Medusa heads, which look back at nothing", "rope_theta", "window"
    )
    for key, value in (("original_lm_head", False), ("logit_scale", 1.0)):
        if values.take(key, value) != value:
            raise DriftError(
                f"{values.file}: {key} is {brief(values.config[key])}; these heads are run only "
                f"with {value}"
            )
    num_layers = None if given.target is None else given.target.num_layers
    if "num_key_value_heads" in values.config:  # a whole model's config
        num_layers = values.size("num_hidden_layers", num_layers)
        values.notes.append(
            "the heads were trained with the model in the same checkpoint: they fit that model "
            "alone, not the one it was made from"
        )
        values.look(*(values.config.keys() - BOOKKEEPING))
    fields, undecided = read_heads(given, "Medusa", num_layers)
    read = fields["hidden_size"]
    if values.size("hidden_size", read) != read:
        raise DriftError(
            f"{values.file}: hidden_size is {values.config['hidden_size']}, but the heads read "
            f"{read} values"
        )
    return fields | {"block_bias": "heads.0.blocks.0.bias" in given.tensors}, undecided
