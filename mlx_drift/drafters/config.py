"""The one schema every drafter meets, whatever checkpoint it came from.

A config is a frozen dataclass, read strictly from the `config.json` of a converted drafter: this
format is ours, so an unknown key, kind or version is an error and nothing is guessed at load.
What a source checkpoint left open was decided by `mlx_drift.convert`, which noted in `provenance`
where each value came from.
"""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mlx_drift.errors import DriftError
from mlx_drift.target import TargetShape

FORMAT_VERSION = 1

Schema = TypeVar("Schema", "TargetShape", "Quantization", "Eagle3Config")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """mlx's parameters of a quantized linear layer, under mlx-lm's names."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True, kw_only=True)
class Eagle3Config:
    """An EAGLE-3 drafter, normalized (EAGLE-3.1) or not: H hidden, T target hidden, A taps.

    Attributes:
        taps: Ascending indices into ``[embedding, out_0 … out_{n−1}, final norm]``.
        feedback: Which state the next chain step gets: before (`pre`) or after (`post`) the final
            norm. `norm_output` in PyTorch checkpoints; `post` is one half of EAGLE-3.1.
        fc_norm: One RMSNorm per tap before `fc`, the other half of EAGLE-3.1.
        norm_before_fc: One RMSNorm over all A·T captured values.
        norm_before_residual: The residual stream starts at the normed hidden state.
        qk_norm: RMSNorm of queries and keys per head, before RoPE.
        rope_scaling: A RoPE kind of mlx-lm's `initialize_rope`, with its own keys.
        sliding_window: Key j is visible to query i while i − j < window; None for all keys.
        draft_vocab_size: Rows of the drafter's head; `d2t` maps them if fewer than the target's.
        own_embedding: The checkpoint brings `embed_tokens`; else the target's rows are used.
        own_head: The checkpoint brings `lm_head`; else the target's head is used.
        source: Where the drafter came from: `path` or `repo`, `revision`, `file`, `sha256`.
        provenance: For each convention, where its value came from.
    """

    drafter_type: Literal["eagle3"] = "eagle3"
    format_version: int = FORMAT_VERSION
    taps: tuple[int, ...]
    feedback: Literal["pre", "post"]
    fc_norm: bool
    norm_before_fc: bool
    norm_before_residual: bool
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int
    sliding_window: int | None = None
    fc_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    draft_vocab_size: int
    own_embedding: bool = False
    own_head: bool = True
    target: TargetShape
    quantization: Quantization | None = None
    source: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or self.taps[0] < 0:
            raise DriftError(
                f"taps is {list(self.taps)}; expected distinct layer indices in ascending order, "
                "since fc's columns follow them"
            )
        last = self.target.num_layers
        if last is not None and self.taps[-1] > last + 1:
            raise DriftError(
                f"taps reaches {self.taps[-1]}, but the target has {last} layers: the last tap "
                f"there can be is {last + 1}, its final norm"
            )
        sizes = "hidden_size intermediate_size num_layers num_attention_heads num_key_value_heads"
        for name in (*sizes.split(), "head_dim", "draft_vocab_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise DriftError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise DriftError(
                f"sliding_window is {self.sliding_window}; expected at least 1, or null for none"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise DriftError(
                f"num_attention_heads is {self.num_attention_heads}, which "
                f"num_key_value_heads ({self.num_key_value_heads}) does not divide"
            )
        if not self.own_head and self.draft_vocab_size != self.target.vocab_size:
            raise DriftError(
                f"draft_vocab_size is {self.draft_vocab_size} and the target's vocabulary "
                f"{self.target.vocab_size}, so the drafter needs an lm_head of its own"
            )
        if self.hidden_size != self.target.hidden_size and not (
            self.own_embedding and self.own_head
        ):
            raise DriftError(
                f"hidden_size is {self.hidden_size} and the target's {self.target.hidden_size}, "
                "so the drafter needs an embed_tokens and an lm_head of its own"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Eagle3Config":
        """Reads a config, strictly.

        Raises:
            DriftError: If a key is unknown or missing, or a value makes no sense.
        """
        if values.get("drafter_type") != "eagle3":
            raise DriftError(
                f"drafter_type is {values.get('drafter_type')!r}; this version runs 'eagle3'"
            )
        if values.get("format_version") != FORMAT_VERSION:
            raise DriftError(
                f"format_version is {values.get('format_version')!r}; this version of mlx-drift "
                f"reads {FORMAT_VERSION}: convert the drafter again, or upgrade mlx-drift"
            )
        values = dict(values)
        if isinstance(values.get("taps"), list):
            values["taps"] = tuple(values["taps"])
        values["target"] = _from_dict(TargetShape, values.get("target"), "target")
        if values.get("quantization") is not None:
            values["quantization"] = _from_dict(
                Quantization, values["quantization"], "quantization"
            )
        return _from_dict(Eagle3Config, values, "the config")

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as `from_dict` reads it."""
        return asdict(self) | {"taps": list(self.taps)}


def check_target(config: Eagle3Config, target: TargetShape, where: str) -> None:
    """Checks that a drafter was made for such a target.

    Args:
        config: The drafter's config.
        target: The target's sizes.
        where: The drafter's path, for the message.

    Raises:
        DriftError: Naming the first size that differs.
    """
    for key, what in (
        ("hidden_size", "hidden size"),
        ("vocab_size", "vocabulary size"),
        ("num_layers", "number of layers"),
    ):
        made_for, given = getattr(config.target, key), getattr(target, key)
        if None not in (made_for, given) and made_for != given:
            raise DriftError(
                f"{where}: the drafter was made for a target whose {what} is {made_for}, but this "
                f"target's is {given}. Use the target it was trained on"
            )
    if target.num_layers is not None and config.taps[-1] > target.num_layers + 1:
        raise DriftError(
            f"{where}: the drafter taps the output of layer {config.taps[-1] - 1}, but this "
            f"target has {target.num_layers} layers. Use the target it was trained on"
        )


def read_config(folder: Path) -> Eagle3Config:
    """Reads the config of a converted drafter.

    Raises:
        DriftError: If `config.json` is missing, unreadable, or not of this format.
    """
    path = folder / "config.json"
    values = read_json(path)
    if "drafter_type" not in values:
        raise DriftError(
            f"{path} is not a converted drafter (it has no drafter_type). Convert it first: "
            f"mlx-drift convert {folder} --mlx-path OUT"
        )
    try:
        return Eagle3Config.from_dict(values)
    except DriftError as error:
        raise DriftError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        DriftError: If the file is missing, unreadable, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON ({error})"
        raise DriftError(f"{path}: {reason}; expected a JSON object") from None
    if not isinstance(values, dict):
        raise DriftError(f"{path}: holds a JSON {type(values).__name__}, expected an object")
    return values


def _from_dict(cls: type[Schema], values: Any, where: str) -> Schema:
    if not isinstance(values, dict):
        raise DriftError(f"{where} is {values!r}; expected an object")
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(values.keys() - known.keys()):
        raise DriftError(f"{where} has the unknown key {unknown[0]!r}")
    required = {
        name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING
    }
    if missing := sorted(required - values.keys()):
        raise DriftError(f"{where} lacks the key {missing[0]!r}")
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            expected = getattr(hints[name], "__name__", hints[name])
            raise DriftError(f"{where} has {name} = {value!r}; expected {expected}")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Tells whether a JSON value is of the annotated type (sizes are never negative)."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin is UnionType:
        return any(_fits(value, choice) for choice in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    if hint is int:
        return type(value) is int and value >= 0
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, origin or hint)
