"""Reads a checkpoint's RoPE in both spellings, as mlx-lm's `initialize_rope` wants it.

transformers 4 writes `rope_theta` beside `rope_scaling`, transformers 5 both in `rope_parameters`,
some trainers write both spellings at once. A scaling that says nothing of the length it starts from
starts from `max_position_embeddings`, as in transformers; mlx-lm would assume 4096 or 8192.
"""

import math
from typing import Any, NamedTuple

from mlx_drift.convert.conventions import Values
from mlx_drift.drafters.schema import MAX_FLOAT
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
    "mrope": {"mrope_section"},
}
"""What mlx-lm's `initialize_rope` reads of each kind."""

LAYER_KINDS = {"full_attention", "sliding_attention"}

LENGTH = "original_max_position_embeddings"
"""What Phi-3's configs have beside the scaling, where it wins over one inside (transformers)."""


class Rope(NamedTuple):
    """A drafter's RoPE, in the words of `LlamaLayersConfig`."""

    theta: float
    scaling: dict[str, Any] | None
    partial_rotary_factor: float


def read_rope(values: Values, max_position_embeddings: int, theta: float | None) -> Rope:
    """Reads a config's RoPE. An absent theta is 10000, never the target's.

    Where `rope_parameters` contradicts a `rope_theta` or `partial_rotary_factor` beside it, it
    wins, as in transformers 5, whose trainers run it and leave the older keys behind.

    Args:
        values: The config.
        max_position_embeddings: The training length, from which a scaling starts if it says
            nothing.
        theta: The user's choice of theta, if any.

    Raises:
        DriftError: If the spellings disagree on a scaling, or the kind is not one that MLX runs.
    """
    spelled = {
        "rope_parameters": _said(_of_one_kind(values, values.checked("rope_parameters", dict))),
        "rope_scaling": _said(values.checked("rope_scaling", dict)),
    }
    found = _newest(values, spelled, "rope_theta", 10000.0, told=theta is None)
    partial = _newest(values, spelled, "partial_rotary_factor", 1.0)
    scaling = _merged(values, spelled)
    origin = values.provenance["rope_parameters" if spelled["rope_parameters"] else "rope_scaling"]
    values.provenance["rope_scaling"] = origin if scaling else "default"

    kind = scaling.pop("rope_type", "default")
    if kind == "default" and "mrope_section" in scaling:
        kind = "mrope"
    if kind == "mrope":
        scaling.pop("mrope_interleaved", None)  # of three positions, which in text are one
        values.notes.append("mrope is plain RoPE for text; prompts with pictures are not supported")
    if not isinstance(kind, str) or kind not in KINDS:
        raise DriftError(
            f"{values.file}: RoPE of the kind {brief(kind)} is not supported; expected one of "
            f"{', '.join(KINDS)}"
        )
    if partial != 1.0 and kind in ("default", "mrope"):
        values.notes.append(
            f"partial_rotary_factor is {brief(partial)}: so much of each head is rotated, as by "
            "vLLM. transformers' Llama and Qwen3 layers, and trainers made of them, rotate all of "
            "it in plain RoPE: if little is accepted, try the config without the key"
        )
    if LENGTH in KINDS[kind]:
        scaling[LENGTH] = values.take(LENGTH, scaling.get(LENGTH, max_position_embeddings))
    if kind == "yarn":
        _as_mlx_yarn(scaling)
    values.unread += [f"rope_scaling.{key}" for key in sorted(scaling.keys() - KINDS[kind])]
    read = {key: scaling[key] for key in scaling if key in KINDS[kind]}
    chosen = found if theta is None else values.override("rope_theta", theta)
    return Rope(chosen, None if kind == "default" else {"rope_type": kind} | read, partial)


def _newest(
    values: Values, spelled: dict[str, dict[str, Any]], key: str, default: float, told: bool = True
) -> Any:
    """Takes a key out of the newest spelling that has it; notes what says otherwise."""
    said = {f"{name}.{key}": scaling.pop(key, None) for name, scaling in spelled.items()}
    said[key] = values.take(key)
    said = {name: value for name, value in said.items() if value is not None}
    if not said:
        return default
    (winner, found), *others = said.items()
    against = [f"{name} is {brief(other)}" for name, other in others if other != found]
    if winner != key:
        values.provenance[key] = values.provenance[winner.partition(".")[0]]
    if against:
        values.provenance[key] = f"file: {winner}"
        if told:
            flag = "; if little is accepted, try --rope-theta" if key == "rope_theta" else ""
            values.notes.append(
                f"{winner} is {brief(found)} and {', '.join(against)}: the former is taken, as "
                f"transformers 5 does{flag}"
            )
    return found


def _merged(values: Values, spelled: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Puts together what the spellings say of a scaling.

    Raises:
        DriftError: If they contradict each other.
    """
    newer, older = spelled.values()
    kinds = [said["rope_type"] for said in (newer, older) if "rope_type" in said]
    if "default" in kinds and len(kinds) == 2 and kinds[0] != kinds[1]:
        plain, scaled = (newer, older) if kinds[0] == "default" else (older, newer)
        values.notes.append(
            f"rope_parameters names the RoPE {brief(kinds[0])} and rope_scaling {brief(kinds[1])}: "
            f"{brief(scaled['rope_type'])} is taken"
        )
        return plain | scaled
    for key in newer.keys() & older.keys():
        if newer[key] != older[key]:
            raise DriftError(
                f"{values.file}: rope_scaling and rope_parameters disagree on {key}: "
                f"{brief(older[key])} and {brief(newer[key])}; leave the one that the drafter was "
                "trained with"
            )
    return older | newer


def _said(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """What a spelling says, without nulls and with its kind under one name."""
    said = {key: value for key, value in (scaling or {}).items() if value is not None}
    older = said.pop("type", None)
    return said if older is None else {"rope_type": older} | said


def _of_one_kind(values: Values, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Takes the one set of `rope_parameters` where transformers 5 nests them by kind of layer."""
    if not parameters or not parameters.keys() <= LAYER_KINDS:
        return dict(parameters or {})
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


def attention_factor(mscale: float, factor: float) -> float:
    """Returns what mlx-lm's YaRN scales queries and keys by, where `mscale` stands alone."""
    return 0.1 * mscale * math.log(factor) + 1


def _as_mlx_yarn(scaling: dict[str, Any]) -> None:
    """Says in mlx-lm's keys what transformers says in another.

    transformers (`modeling_rope_utils._compute_yarn_parameters`) scales by `attention_factor`
    outright where mlx-lm computes 0.1 · mscale · ln(factor) + 1.
    """
    attention: Any = scaling.get("attention_factor")
    factor: Any = scaling.get("factor")
    numbers = all(type(n) in (int, float) and abs(n) < MAX_FLOAT for n in (attention, factor))
    if attention is None:
        scaling.pop("attention_factor", None)
    elif numbers and factor > 1 and scaling.get("mscale_all_dim") in (None, 0):
        said = scaling.get("mscale")  # by our export, beside what transformers reads of it
        if type(said) is not float or attention_factor(said, factor) != attention:
            scaling["mscale"] = (attention - 1) / (0.1 * math.log(factor))
        del scaling["attention_factor"]
    if scaling.get("truncate") is True:
        del scaling["truncate"]  # mlx-lm rounds the range of frequencies outward too
