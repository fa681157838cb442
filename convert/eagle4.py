"""Understands an EAGLE-4 checkpoint: an EAGLE-3 one, and the head that chooses candidates."""

from mlx_drift.convert.eagle3 import understand_eagle3
from mlx_drift.convert.given import Given, Understood
from mlx_drift.errors import DriftError, brief

KEY = "efficient_lm_head_config"


def understand_eagle4(given: Given) -> Understood:
    """Resolves every field of an `Eagle4Config`.

    Raises:
        DriftError: If anything is missing or contradictory.
    """
    values, tensors, weights = given.values, given.tensors, given.weights
    fields, undecided = understand_eagle3(given)
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
