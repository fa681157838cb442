"""Understands a P-EAGLE checkpoint: an EAGLE-3 one, and what its rows after the first read."""

from mlx_drift.convert.eagle3 import understand_eagle3
from mlx_drift.convert.given import Given, Understood
from mlx_drift.convert.masks import read_mask_token, read_max_drafts
from mlx_drift.errors import DriftError


def understand_p_eagle(given: Given) -> Understood:
    """Resolves every field of a `PEagleConfig`.

    Raises:
        DriftError: If anything is missing or contradictory, or an override says what such a head
            has not.
    """
    values, tensors, weights = given.values, given.tensors, given.weights
    given.overrides.refuse(f"{weights} is a P-EAGLE head, which feeds no state back", "feedback")
    if "mask_hidden" not in tensors:
        raise DriftError(f"{weights} lacks the tensor mask_hidden")
    fields, undecided = understand_eagle3(given)
    values.look("parallel_drafting", "norm_output")
    return fields | {
        "drafter_type": "p-eagle",
        "feedback": values.rule("feedback", "pre", "a P-EAGLE head feeds no state back"),
        "mask_token_id": read_mask_token(values, "mask_token_id", "ptd_token_id"),
        "max_drafts": read_max_drafts(values),
    }, undecided
