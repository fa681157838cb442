"""Understands a P-EAGLE checkpoint: an EAGLE-3 one, and what its rows after the first read."""

from typing import Any

from mlx_drift.convert.conventions import TapConvention, Undecided, Values
from mlx_drift.convert.eagle3 import understand_eagle3
from mlx_drift.convert.layers import Overrides, Tensors
from mlx_drift.convert.masks import read_mask_token, read_max_drafts
from mlx_drift.errors import DriftError
from mlx_drift.target.model import TargetShape


def understand_p_eagle(
    values: Values,
    tensors: Tensors,
    weights: str,
    tap_ids: TapConvention | None,
    target: TargetShape | None,
    overrides: Overrides,
) -> tuple[dict[str, Any], Undecided | None]:
    """Resolves every field of a `PEagleConfig`; arguments and results as `understand_eagle3`'s.

    Raises:
        DriftError: If anything is missing or contradictory, or an override says what such a head
            has not.
    """
    overrides.refuse(f"{weights} is a P-EAGLE head, which feeds no state back", "feedback")
    if "mask_hidden" not in tensors:
        raise DriftError(f"{weights} lacks the tensor mask_hidden")
    fields, undecided = understand_eagle3(values, tensors, weights, tap_ids, target, overrides)
    values.look("parallel_drafting", "norm_output")
    return fields | {
        "drafter_type": "p-eagle",
        "feedback": values.rule("feedback", "pre", "a P-EAGLE head feeds no state back"),
        "mask_token_id": read_mask_token(values, "mask_token_id", "ptd_token_id"),
        "max_drafts": read_max_drafts(values),
    }, undecided
