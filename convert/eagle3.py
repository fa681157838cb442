"""From a checkpoint of any dialect to the canonical tensors and a fully resolved config.

Tensors tell what is there (taps, draft vocabulary, norms, biases), the config tells what cannot be
seen in them (heads, RoPE, feedback, tap ids). Nothing is ignored: a tensor without a place is an
error, a config key that nobody reads is reported.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_drift.convert.conventions import TapConvention, Values, resolve_taps
from mlx_drift.convert.dialects import Dialect
from mlx_drift.convert.dialects.specforge import SPECFORGE
from mlx_drift.convert.source import Checkpoint
from mlx_drift.drafters.config import Eagle3Config
from mlx_drift.errors import DriftError
from mlx_drift.target import TargetShape

DIALECTS = (SPECFORGE,)


@dataclass(frozen=True)
class Overrides:
    """What the user says of conventions that a checkpoint leaves open or has wrong."""

    taps: TapConvention | None = None
    feedback: Literal["pre", "post"] | None = None


@dataclass(frozen=True)
class Resolved:
    """A checkpoint understood."""

    dialect: str
    config: Eagle3Config
    tensors: dict[str, mx.array]  # canonical names
    unknown_keys: list[str]  # config keys nobody read


def understand(
    checkpoint: Checkpoint, target: TargetShape | None, overrides: Overrides
) -> Resolved:
    """Resolves a checkpoint's tensors and every convention.

    Args:
        checkpoint: What was read.
        target: The target's sizes, where the user named one.
        overrides: The user's choices.

    Raises:
        DriftError: If the dialect is unknown, or anything is missing, left over or contradictory.
    """
    dialect = _dialect(checkpoint)
    tensors = _canonical_tensors(checkpoint, dialect)
    values = Values(dialect.flatten(checkpoint.config), str(checkpoint.config_path))

    if "fc.weight" not in tensors:
        raise DriftError(f"{checkpoint.weights_path} lacks the tensor fc.weight")
    hidden_size = values.size("hidden_size")
    target_size = values.size("target_hidden_size", hidden_size)
    vocab_size = values.size("vocab_size")
    num_layers = _target_layers(values, target)
    for name, tensor in tensors.items():
        matrix = name.endswith("proj.weight") or name in ("fc.weight", "lm_head.weight")
        if matrix and tensor.ndim != 2:
            raise DriftError(
                f"{checkpoint.weights_path}: {name} has shape {tensor.shape}, expected a matrix"
            )
    rows, columns = tensors["fc.weight"].shape
    if rows != hidden_size or columns % target_size:
        raise DriftError(
            f"{checkpoint.weights_path}: fc.weight has shape {(rows, columns)}; expected "
            f"({hidden_size}, a multiple of the target's hidden size {target_size})"
        )
    own_head = "lm_head.weight" in tensors
    draft_vocab_size = tensors["lm_head.weight"].shape[0] if own_head else vocab_size
    stated = values.size("draft_vocab_size", draft_vocab_size)
    if stated != draft_vocab_size:
        raise DriftError(
            f"{values.file}: draft_vocab_size is {stated}, but lm_head.weight has "
            f"{draft_vocab_size} rows"
        )
    feedback = "post" if values.checked("norm_output", bool, name="feedback") else "pre"
    if overrides.feedback is not None:
        feedback = values.override("feedback", overrides.feedback)
    fc_norm = _seen(values, tensors, "fc_norm", "fc_norm.0.weight")
    norm_before_fc = _seen(values, tensors, "norm_before_fc", "input_norm.weight")
    rope_theta, rope_scaling = _rope(values)
    heads = values.size("num_attention_heads")
    _refuse_what_is_not_run(values)

    config = Eagle3Config.from_dict(
        {
            "drafter_type": "eagle3",
            "format_version": 1,
            "taps": resolve_taps(
                values,
                columns // target_size,
                num_layers,
                dialect.tap_ids,
                overrides.taps,
            ),
            "feedback": feedback,
            "fc_norm": fc_norm,
            "norm_before_fc": norm_before_fc,
            "norm_before_residual": bool(values.checked("norm_before_residual", bool)),
            "hidden_size": hidden_size,
            "intermediate_size": values.size("intermediate_size"),
            "num_layers": _count_layers(values, tensors),
            "num_attention_heads": heads,
            "num_key_value_heads": values.size("num_key_value_heads", heads),
            "head_dim": _head_dim(values, tensors, heads),
            "rms_norm_eps": values.take("rms_norm_eps", 1e-6),
            "rope_theta": rope_theta,
            "rope_scaling": rope_scaling,
            "max_position_embeddings": values.size("max_position_embeddings", 2048),
            "sliding_window": _window(values),
            "fc_bias": "fc.bias" in tensors,
            "attention_bias": "layers.0.self_attn.q_proj.bias" in tensors,
            "mlp_bias": "layers.0.mlp.gate_proj.bias" in tensors,
            "qk_norm": "layers.0.self_attn.q_norm.weight" in tensors,
            "draft_vocab_size": draft_vocab_size,
            "own_embedding": "embed_tokens.weight" in tensors,
            "own_head": own_head,
            "target": {
                "hidden_size": target_size,
                "vocab_size": vocab_size,
                "num_layers": num_layers,
            },
            "source": checkpoint.source,
        }
    )
    known = config.to_dict()
    provenance = {key: origin for key, origin in values.provenance.items() if key in known}
    config = replace(config, provenance=provenance)
    return Resolved(dialect.name, config, tensors, values.unknown())


def _dialect(checkpoint: Checkpoint) -> Dialect:
    names = set(checkpoint.tensors)
    for dialect in DIALECTS:
        if dialect.recognises(checkpoint.config, names):
            return dialect
    known = ", ".join(dialect.name for dialect in DIALECTS)
    what = checkpoint.config.get("speculators_model_type") or checkpoint.config.get("architectures")
    raise DriftError(
        f"{checkpoint.weights_path}: not a drafter of a layout this version reads ({known}); its "
        f"config says {what}, its tensors are {', '.join(sorted(names)[:4])}, …"
    )


def _canonical_tensors(checkpoint: Checkpoint, dialect: Dialect) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for name, tensor in checkpoint.tensors.items():
        canonical = dialect.rename(name)
        if canonical is None:
            continue
        if canonical in tensors:
            raise DriftError(
                f"{checkpoint.weights_path}: {name} and another tensor both mean {canonical}"
            )
        tensors[canonical] = tensor
    t2d = tensors.pop("t2d", None)
    if "d2t" in tensors:
        tensors["d2t"] = _offsets(tensors["d2t"], t2d, checkpoint)
    return tensors


def _offsets(d2t: mx.array, t2d: mx.array | None, checkpoint: Checkpoint) -> mx.array:
    """Checks `d2t` against `t2d` and returns it as int64 offsets, as all trainers write it.

    A file with absolute ids is put right, for `t2d` proves what they are.
    """
    size = d2t.size
    d2t = d2t.astype(mx.int64)
    ids = d2t + mx.arange(size)
    if t2d is not None:
        member = mx.array(np.flatnonzero(np.array(t2d)), dtype=mx.int64)
        if member.size == size and mx.array_equal(d2t, member).item():
            return d2t - mx.arange(size)
        if member.size != size or not mx.array_equal(ids, member).item():
            raise DriftError(
                f"{checkpoint.weights_path}: d2t and t2d disagree on the draft vocabulary "
                f"({size} and {member.size} tokens); the file is damaged, or its d2t is not one "
                "of offsets"
            )
    elif size > 1 and not mx.all(ids[1:] > ids[:-1]).item():
        raise DriftError(
            f"{checkpoint.weights_path}: d2t does not rise strictly as offsets do, and there is "
            "no t2d to tell what it holds"
        )
    return d2t


def _seen(values: Values, tensors: dict[str, mx.array], switch: str, tensor: str) -> bool:
    """Takes a switch that shows in the tensors; the config may leave it out but not deny it."""
    seen = tensor in tensors
    stated = values.checked(switch, bool)
    if stated is None:
        return values.rule(switch, seen, f"the file has {'a' if seen else 'no'} {tensor}")
    if stated != seen:
        raise DriftError(
            f"{values.file}: {switch} is {stated}, but the weights have "
            f"{'a' if seen else 'no'} {tensor}"
        )
    return seen


def _count_layers(values: Values, tensors: dict[str, mx.array]) -> int:
    """Counts the layers in the file; configs are known to give the target's number instead."""
    values.take("num_hidden_layers")
    count = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    return values.rule("num_layers", count, "the layers in the file")


def _head_dim(values: Values, tensors: dict[str, mx.array], heads: int) -> int:
    """Takes the width of a head; never hidden size over heads, which is often another number."""
    queries = tensors.get("layers.0.self_attn.q_proj.weight")
    if values.take("head_dim") is not None or queries is None:
        return values.size("head_dim")
    return values.rule("head_dim", queries.shape[0] // heads, "rows of q_proj over heads")


def _target_layers(values: Values, target: TargetShape | None) -> int | None:
    if values.take("target_num_hidden_layers") is not None:
        return values.size("target_num_hidden_layers")
    return target.num_layers if target is not None else None


ROPE_KEYS = {
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


def _rope(values: Values) -> tuple[float, dict[str, Any] | None]:
    """Reads both spellings: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`.

    An absent theta is 10000, never the target's.
    """
    scaling = dict(values.checked("rope_scaling", dict) or {})
    parameters = dict(values.checked("rope_parameters", dict, name="rope_scaling") or {})
    thetas = [values.take("rope_theta"), scaling.pop("rope_theta", None)]
    thetas = [theta for theta in (*thetas, parameters.pop("rope_theta", None)) if theta is not None]
    if len(set(thetas)) > 1:
        raise DriftError(f"{values.file} names more than one rope_theta: {thetas}")
    values.provenance["rope_theta"] = "file" if thetas else "default"
    if scaling and parameters and scaling != parameters:
        raise DriftError(f"{values.file}: rope_scaling and rope_parameters disagree")
    scaling = scaling or parameters
    values.provenance["rope_scaling"] = "file" if scaling else "default"

    kind = scaling.pop("rope_type", None) or scaling.get("type", "default")
    scaling.pop("type", None)
    partial = values.take("partial_rotary_factor", scaling.pop("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise DriftError(
            f"{values.file}: partial_rotary_factor is {partial}; drafters that rotate only part "
            "of a head are not supported"
        )
    values.provenance.pop("partial_rotary_factor")
    if kind not in ROPE_KEYS:
        raise DriftError(
            f"{values.file}: RoPE of the kind {kind!r} is not supported; expected one of "
            f"{', '.join(ROPE_KEYS)}"
        )
    values.unread += [f"rope_scaling.{key}" for key in sorted(scaling.keys() - ROPE_KEYS[kind])]
    read = {key: value for key, value in scaling.items() if key in ROPE_KEYS[kind]}
    theta = thetas[0] if thetas else 10000.0
    return theta, None if kind == "default" else {"rope_type": kind} | read


def _window(values: Values) -> int | None:
    """Reads the sliding window, which transformers keeps in a file even when it is off."""
    kinds = set(map(str, values.checked("layer_types", list, name="sliding_window") or []))
    enabled = values.checked("use_sliding_window", bool, name="sliding_window")
    values.take("max_window_layers", name="sliding_window")
    if values.take("sliding_window") is None:
        if "sliding_attention" in kinds:
            raise DriftError(
                f"{values.file}: layer_types names sliding layers, but there is no sliding_window"
            )
        return None
    if len(kinds) > 1:
        raise DriftError(
            f"{values.file}: layer_types mixes {' and '.join(sorted(kinds))}; drafters whose "
            "layers differ in attention are not supported"
        )
    window = values.size("sliding_window")
    return None if enabled is False or kinds == {"full_attention"} else window


def _refuse_what_is_not_run(values: Values) -> None:
    """Takes the keys that are allowed one value only."""
    for key, only in (
        ("hidden_act", "silu"),
        ("use_aux_hidden_state", True),
    ):
        if values.take(key, only) != only:
            raise DriftError(
                f"{values.file}: {key} is {values.config[key]!r}; only {only!r} is supported"
            )
        values.provenance.pop(key)
    in_tensors = "attention_bias mlp_bias bias tie_word_embeddings num_aux_hidden_states"
    for key in in_tensors.split():
        values.take(key)  # the tensors tell
        values.provenance.pop(key)
