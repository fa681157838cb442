"""Understands an EAGLE-4 checkpoint: an EAGLE-3 one, and the head that chooses candidates."""

from typing import Any

from mlx_drift.convert.conventions import TapConvention, Undecided, Values
from mlx_drift.convert.eagle3 import understand_eagle3
from mlx_drift.convert.layers import Overrides, Tensors
from mlx_drift.errors import DriftError, brief
from mlx_drift.target.model import TargetShape

KEY = "efficient_lm_head_config"


def understand_eagle4(
    values: Values,
    tensors: Tensors,
    weights: str,
    tap_ids: TapConvention | None,
    target: TargetShape | None,
    overrides: Overrides,
) -> tuple[dict[str, Any], Undecided | None]:
    """Resolves every field of an `Eagle4Config`; arguments and results as `understand_eagle3`'s.

    Raises:
        DriftError: If anything is missing or contradictory.
    """
    fields, undecided = understand_eagle3(values, tensors, weights, tap_ids, target, overrides)
    down = tensors.get("candidate_down.weight")
    if down is None or down.ndim != 2:
        raise DriftError(f"{weights} lacks the matrix efficient_lm_head_down_proj.weight")
    said = values.checked(KEY, dict) or {}
    unread = sorted(said.keys() - {"type", "rank", "num_candidates"})
    values.unread += [f"{KEY}.{key}" for key in unread]
    if said.get("type", "low_rank") != "low_rank":
        raise DriftError(f"{values.file}: {KEY}.type is {brief(said['type'])}; expected low_rank")
    rank, candidates = said.get("rank", down.shape[0]), said.get("num_candidates")
    if rank != down.shape[0]:
        raise DriftError(
            f"{values.file}: {KEY}.rank is {brief(rank)}, but efficient_lm_head_down_proj.weight "
            f"has {down.shape[0]} rows"
        )
    if type(candidates) is not int or candidates < 1:
        raise DriftError(
            f"{values.file}: {KEY}.num_candidates is {brief(candidates)}; expected a positive "
            "whole number"
        )
    values.provenance["num_candidates"] = f"file: {KEY}"
    return fields | {
        "drafter_type": "eagle4",
        "candidate_rank": values.rule(
            "candidate_rank", down.shape[0], "rows of the down projection"
        ),
        "num_candidates": candidates,
    }, undecided
