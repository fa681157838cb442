"""Understands an EAGLE-1/2 checkpoint."""

from typing import Any

from mlx_drift.convert.conventions import TapConvention, Undecided, Values
from mlx_drift.convert.layers import Overrides, Tensors, read_layers, read_target
from mlx_drift.errors import DriftError
from mlx_drift.target.model import TargetShape


def understand_eagle(
    values: Values,
    tensors: Tensors,
    weights: str,
    tap_ids: TapConvention | None,
    target: TargetShape | None,
    overrides: Overrides,
) -> tuple[dict[str, Any], Undecided | None]:
    """Resolves every field of an `EagleConfig`; arguments as in `understand_eagle3`.

    Returns:
        The fields, and what keeps `taps` undecided, if anything does.

    Raises:
        DriftError: If anything is missing, or an override says what such a head has not.
    """
    for flag, given in (("taps", overrides.taps), ("feedback", overrides.feedback)):
        if given is not None and flag not in overrides.probed:
            raise DriftError(
                f"{weights} is an EAGLE-1/2 head, which has one tap and one state to feed back; "
                f"leave --{flag} out"
            )
    hidden_size = values.size("hidden_size")
    made_for = read_target(values, target, hidden_size)
    fields = read_layers(values, tensors, overrides) | {
        "drafter_type": "eagle",
        "format_version": 1,
        "hidden_size": hidden_size,
        "target": vars(made_for),
    }
    if made_for.num_layers is None:
        return fields, Undecided(
            f"{values.file}: an EAGLE-1/2 head reads the target's final norm; which tap that is "
            "depends on the target's number of layers. Give the target: --target MODEL"
        )
    fields["taps"] = values.rule(
        "taps", (made_for.num_layers + 1,), "EAGLE-1/2 reads the target's final normed state"
    )
    return fields, None
