"""Understands an EAGLE-1/2 checkpoint, and Hydra's `eagle-attn`, which is one."""

from mlx_drift.convert.given import Given, Understood
from mlx_drift.convert.heads import read_last_state, take_of_base
from mlx_drift.convert.layers import read_layers, read_target


def understand_eagle(given: Given) -> Understood:
    """Resolves every field of an `EagleConfig`.

    Raises:
        DriftError: If anything is missing, or an override says what such a head has not.
    """
    values, tensors, weights = given.values, given.tensors, given.weights
    given.overrides.refuse(
        f"{weights} is an EAGLE-1/2 head, which has one tap and one state to feed back",
        *("taps", "feedback"),
    )
    is_hydra = "hydra_num_heads" in values.config  # its eagle-attn
    if is_hydra:
        take_of_base(values, given.target)
    hidden_size = values.size("hidden_size")
    made_for = read_target(values, given.target, hidden_size)
    fields = read_layers(values, tensors, given.overrides) | {
        "drafter_type": "eagle",
        "format_version": 1,
        "hidden_size": hidden_size,
        "fc_bias": is_hydra or "fc.bias" in tensors,
        "input_norm": is_hydra,
        "target": vars(made_for),
    }
    head = f"{weights}: an EAGLE-1/2 head"
    taps, undecided = read_last_state(values, made_for.num_layers, head)
    return fields | taps, undecided
