"""Reads a checkpoint's RoPE in both spellings, as mlx-lm's `initialize_rope` wants it.

transformers 4 writes `rope_theta` beside `rope_scaling`, transformers 5 both in `rope_parameters`,
some trainers write both spellings at once.
"""

import math
from typing import Any

from mlx_drift.convert.conventions import Values
from mlx_drift.drafters.config import MAX_FLOAT
from mlx_drift.errors import DriftError, brief

KINDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    },
    "longrope": {"original_max_position_embeddings", "short_factor", "long_factor"},
    "mrope": {"mrope_section", "mrope_interleaved"},
}
"""What mlx-lm's `initialize_rope` reads of each kind."""

LAYER_KINDS = {"full_attention", "sliding_attention"}


def read_rope(
    values: Values, max_position_embeddings: int, theta: float | None
) -> tuple[float, dict[str, Any] | None]:
    """Returns theta and the scaling, None for none. An absent theta is 10000, never the target's.

    Args:
        values: The config.
        max_position_embeddings: The training length, from which yarn starts if it says nothing.
        theta: The user's choice, if any.

    Raises:
        DriftError: If the spellings disagree, or the kind is not one that MLX runs.
    """
    older, newer = values.checked("rope_scaling", dict), values.checked("rope_parameters", dict)
    spellings = [_said(older or {}), _said(_of_one_kind(values, newer or {}))]
    thetas = [values.take("rope_theta"), *(said.pop("rope_theta", None) for said in spellings)]
    thetas = [found for found in thetas if found is not None]
    if theta is None and any(found != thetas[0] for found in thetas):
        raise DriftError(
            f"{values.file} names more than one rope_theta: {brief(thetas)}. Say which it is: "
            "--rope-theta"
        )
    values.provenance["rope_theta"] = "file" if thetas else "default"
    scalings = [said for said in spellings if said.get("rope_type", "default") != "default"]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise DriftError(f"{values.file}: rope_scaling and rope_parameters disagree")
    scaling = scalings[0] if scalings else spellings[1] or spellings[0]
    values.provenance["rope_scaling"] = "file" if scaling else "default"

    kind = scaling.pop("rope_type", "default")
    if kind == "default" and "mrope_section" in scaling:
        kind = "mrope"
    if kind == "mrope":
        values.notes.append("mrope is plain RoPE for text; prompts with pictures are not supported")
    partial = values.take("partial_rotary_factor", scaling.pop("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise DriftError(
            f"{values.file}: partial_rotary_factor is {brief(partial)}; drafters that rotate only "
            "part of a head are not supported"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise DriftError(
            f"{values.file}: RoPE of the kind {brief(kind)} is not supported; expected one of "
            f"{', '.join(KINDS)}"
        )
    if kind == "yarn":
        _as_mlx_yarn(scaling, max_position_embeddings)
    values.unread += [f"rope_scaling.{key}" for key in sorted(scaling.keys() - KINDS[kind])]
    read = {key: scaling[key] for key in scaling if key in KINDS[kind]}
    found = values.override("rope_theta", theta) if theta is not None else (*thetas, 10000.0)[0]
    return found, None if kind == "default" else {"rope_type": kind} | read


def _said(scaling: dict[str, Any]) -> dict[str, Any]:
    """What a spelling says, without nulls and with its kind under one name."""
    said = {key: value for key, value in scaling.items() if value is not None}
    older = said.pop("type", None)
    return said if older is None else {"rope_type": older} | said


def _of_one_kind(values: Values, parameters: dict[str, Any]) -> dict[str, Any]:
    """Takes the one set of `rope_parameters` where transformers 5 nests them by kind of layer."""
    if not parameters or not parameters.keys() <= LAYER_KINDS:
        return dict(parameters)
    sets = {repr(one): one for one in parameters.values()}
    if len(sets) > 1 and (kinds := values.checked("layer_types", list)):
        sets = {kind: parameters[kind] for kind in map(str, kinds) if kind in parameters}
    one = next(iter(sets.values()), None)
    if len(sets) > 1 or not isinstance(one, dict):
        raise DriftError(
            f"{values.file}: rope_parameters differ between kinds of layers; drafters whose layers "
            "differ are not supported"
        )
    return dict(one)


def _as_mlx_yarn(scaling: dict[str, Any], max_position_embeddings: int) -> None:
    """Says in mlx-lm's keys what transformers leaves to a default or says in another key.

    transformers (`modeling_rope_utils._compute_yarn_parameters`) starts from
    `max_position_embeddings` where mlx-lm assumes 4096, and scales by `attention_factor` outright
    where mlx-lm computes 0.1 · mscale · ln(factor) + 1.
    """
    scaling.setdefault("original_max_position_embeddings", max_position_embeddings)
    attention: Any = scaling.get("attention_factor")
    factor: Any = scaling.get("factor")
    numbers = all(type(n) in (int, float) and abs(n) < MAX_FLOAT for n in (attention, factor))
    if attention is None:
        scaling.pop("attention_factor", None)
    elif numbers and factor > 1 and scaling.get("mscale_all_dim") in (None, 0):
        scaling["mscale"] = (attention - 1) / (0.1 * math.log(factor))
        del scaling["attention_factor"]
    if scaling.get("truncate") is True:
        del scaling["truncate"]  # mlx-lm rounds the range of frequencies outward too
