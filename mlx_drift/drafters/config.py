"""The one schema every drafter meets, whatever checkpoint it came from.

A config is a frozen dataclass, read strictly from the `config.json` of a converted drafter: this
format is ours, so an unknown key, kind or version is an error and nothing is guessed at load.
What a source checkpoint left open was decided by `mlx_drift.convert`, which noted in `provenance`
where each value came from.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mlx_drift.errors import DriftError, brief
from mlx_drift.files.json_file import read_json
from mlx_drift.target.model import TargetShape

Schema = TypeVar("Schema")

FORMAT_VERSION = 1

MAX_SIZE, MAX_LAYERS, MAX_TAP, MAX_FLOAT = 2**24, 256, 10_000, 1e18
"""No drafter comes near these; a larger number in a file is an error or an attack."""

MOST_PADDING = 1024
"""Rows that a vocabulary is padded with, at most."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """mlx's parameters of a quantized linear layer, under mlx-lm's names."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """What the configs of all drafters that chain their own states have in common.

    H is the drafter's hidden size, T the target's, A the number of taps.

    Attributes:
        taps: Ascending indices into ``[embedding, out_0 … out_{n−1}, final norm]``.
        max_position_embeddings: The training length, not a limit.
        sliding_window: Key j is visible to query i while i − j < window; None for all keys.
        full_attention_layers: Layers that see all keys though there is a window.
        own_embedding: The checkpoint brings `embed_tokens`; else the target's rows are used.
        source: Where the drafter came from: `path`, or `repo`, `subfolder` and `revision`; `file`,
            `sha256`, and the `target` it names.
        provenance: For each resolved value, where it came from: `file`, `rule: …`, `default`,
            `override` or `probe`.
    """

    drafter_type: str
    format_version: int = FORMAT_VERSION
    taps: tuple[int, ...]
    hidden_size: int
    num_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    own_embedding: bool = False
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
        if self.taps[-1] > MAX_TAP:
            raise DriftError(f"taps reaches {self.taps[-1]}; expected at most {MAX_TAP}")
        last = self.target.num_layers
        if last is not None and self.taps[-1] > last + 1:
            raise DriftError(
                f"taps reaches {self.taps[-1]}, but the target has {last} layers: the last tap "
                f"there can be is {last + 1}, its final norm"
            )
        for where in (self, self.target):
            for f in fields(where):
                if f.type in (int, int | None) and f.name != "format_version":
                    _check_size(f.name, getattr(where, f.name))
        _check_positive(self, "rms_norm_eps")
        if unknown := sorted(self.provenance.keys() - {f.name for f in fields(self)}):
            raise DriftError(f"provenance has the unknown key {unknown[0]!r}")
        for text in (*self.source.values(), *self.provenance.values()):
            if not text.isprintable():
                raise DriftError(f"source or provenance holds {brief(text)}; expected one line")

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as `config_from_dict` reads it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def window_of(self, layer: int) -> int | None:
        """Returns the window of one layer; None if it sees all keys."""
        return None if layer in self.full_attention_layers else self.sliding_window


@dataclass(frozen=True, kw_only=True)
class LlamaLayersConfig(DrafterConfig):
    """What the configs of drafters made of Llama layers have in common.

    Attributes:
        rope_scaling: A RoPE kind of mlx-lm's `initialize_rope`, with its own keys.
        partial_rotary_factor: The part of each head that is rotated, its first dimensions.
        attention_bias: Queries, keys and values are projected with a bias.
        attention_output_bias: So is the attention's output.
    """

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: dict[str, str | float | list[float]] | None = None
    partial_rotary_factor: float = 1.0
    fc_bias: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        _check_positive(self, "rope_theta")
        if self.num_attention_heads % self.num_key_value_heads:
            raise DriftError(
                f"num_attention_heads is {self.num_attention_heads}, which "
                f"num_key_value_heads ({self.num_key_value_heads}) does not divide"
            )
        factor = self.partial_rotary_factor
        if not 0 < factor <= 1 or self.rotated_dims < 2 or self.rotated_dims % 2:
            raise DriftError(
                f"partial_rotary_factor is {factor} of a head_dim of {self.head_dim}; expected "
                "more than 0, at most 1, and an even number of dimensions"
            )
        for key, value in (self.rope_scaling or {}).items():
            if isinstance(value, list) and len(value) > self.head_dim:
                raise DriftError(
                    f"rope_scaling has {len(value)} numbers as {key}; expected at most head_dim "
                    f"({self.head_dim})"
                )

    @property
    def rotated_dims(self) -> int:
        """How many dimensions of each head RoPE rotates, rounded down as in transformers."""
        return int(self.head_dim * self.partial_rotary_factor)


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(LlamaLayersConfig):
    """An EAGLE-3 drafter, normalized (EAGLE-3.1) or not.

    Attributes:
        feedback: Which state the next chain step gets: before (`pre`) or after (`post`) the final
            norm. `norm_output` in PyTorch checkpoints; `post` is one half of EAGLE-3.1.
        fc: The taps are fused by a linear layer. Without one (NVIDIA's heads of a single feature)
            the one tap is the hidden state.
        fc_norm: One RMSNorm per tap before `fc`, the other half of EAGLE-3.1.
        norm_before_fc: One RMSNorm over all A·T captured values.
        hidden_norm: The first layer norms the hidden state it reads beside the embedding.
        norm_before_residual: The residual stream starts at the normed hidden state.
        qk_norm: RMSNorm of queries and keys per head, before RoPE.
        gated_attention: What a head says is multiplied, element by element, with the sigmoid of a
            projection of what its queries read, before the output's projection (Qiu et al., arXiv
            2505.06708; paper, App. A). `attn_output_gate` in Qwen3-Next and Qwen3.5, whose layout
            it has: for each head, `q_proj` has the queries' rows and then the gate's.
        draft_vocab_size: Rows of the drafter's head; `d2t` maps them if fewer than the target's.
        own_head: The checkpoint brings `lm_head`; else the target's head is used.
    """

    drafter_type: Literal["eagle3"] = "eagle3"
    feedback: Literal["pre", "post"]
    fc: bool = True
    fc_norm: bool
    norm_before_fc: bool
    hidden_norm: bool = True
    norm_before_residual: bool
    qk_norm: bool = False
    gated_attention: bool = False
    draft_vocab_size: int
    own_head: bool = True

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
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
        if not self.fc and (self.fc_bias or len(self.taps) > 1):
            raise DriftError(
                f"a drafter without fc reads one tap as it is, but this has taps {list(self.taps)}"
                f"{' and fc_bias' if self.fc_bias else ''}"
            )
        if not self.fc and self.hidden_size != self.target.hidden_size:
            raise DriftError(
                f"hidden_size is {self.hidden_size} and the target's {self.target.hidden_size}, "
                "so the drafter needs an fc"
            )
        if self.norm_before_residual and not self.hidden_norm:
            raise DriftError("norm_before_residual is true, but there is no hidden_norm")


@dataclass(frozen=True, kw_only=True)
class EagleConfig(LlamaLayersConfig):
    """An EAGLE-1 or EAGLE-2 drafter (the same weights; EAGLE-2 only drafts a tree).

    It reads the target's final norm alone, and its output goes to the target's head as it is.
    """

    drafter_type: Literal["eagle"] = "eagle"

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        if len(self.taps) != 1 or self.hidden_size != self.target.hidden_size:
            raise DriftError(
                "an EAGLE-1/2 drafter reads one tap of its own width, but this has taps "
                f"{list(self.taps)}, hidden_size {self.hidden_size} and the target's "
                f"{self.target.hidden_size}"
            )


@dataclass(frozen=True, kw_only=True)
class MTPConfig(DrafterConfig):
    """A multi-token-prediction head: a projection, one block of the target's own kind, a norm.

    Its one tap is the target's final norm or, one less, the last layer's output before it: engines
    disagree on which of the two the first step gets, and on which of its own the later steps get.

    Attributes:
        feedback: Which state the next chain step gets: before (`pre`) or after (`post`) the head's
            final norm.
        hidden_first: The projection reads the hidden state before the embedding (MiMo).
        block: The keys that mlx-lm's model file of the family builds its decoder layer from, layer
            0 being of the head's kind; `model_type` names the family.
        own_head: The checkpoint brings `lm_head`; else the target's head is used.
    """

    drafter_type: Literal["mtp"] = "mtp"
    feedback: Literal["pre", "post"]
    hidden_first: bool = False
    num_layers: int = 1
    block: dict[str, Any]
    own_head: bool = False

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        if len(self.taps) != 1 or self.hidden_size != self.target.hidden_size:
            raise DriftError(
                f"an MTP head reads one tap of its own width, but this has taps {list(self.taps)}, "
                f"hidden_size {self.hidden_size} and the target's {self.target.hidden_size}"
            )
        if self.num_layers != 1:
            raise DriftError(f"num_layers is {self.num_layers}; an MTP head has one block")
        _check_block(self.block, "block")


AnyConfig = Eagle3Config | EagleConfig | MTPConfig

CONFIGS: dict[str, type[Eagle3Config] | type[EagleConfig] | type[MTPConfig]] = {
    "eagle3": Eagle3Config,
    "eagle": EagleConfig,
    "mtp": MTPConfig,
}


def config_from_dict(values: dict[str, Any]) -> AnyConfig:
    """Reads a config, strictly.

    Raises:
        DriftError: If the kind or version is unknown, a key is unknown or missing, or a value makes
            no sense.
    """
    kind = values.get("drafter_type")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise DriftError(f"drafter_type is {brief(kind)}; this version runs {', '.join(CONFIGS)}")
    if values.get("format_version") != FORMAT_VERSION:
        raise DriftError(
            f"format_version is {brief(values.get('format_version'))}; this version of mlx-drift "
            f"reads {FORMAT_VERSION}: convert the drafter again, or upgrade mlx-drift"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    values["target"] = _from_dict(TargetShape, values.get("target"), "target")
    if values.get("quantization") is not None:
        values["quantization"] = _from_dict(Quantization, values["quantization"], "quantization")
    return _from_dict(CONFIGS[kind], values, "the config")


def pads(vocab_size: int, padded: int) -> bool:
    """Tells whether one vocabulary may be another, padded: all ids of the smaller are there.

    Models round their tokenizers' sizes up to a multiple of some power of two: Qwen3's 151,669 to
    151,936, DeepSeek-V3's 128,815 to 129,280. Heads are known that were made for the former.
    """
    missing = padded - vocab_size
    return 0 < missing < MOST_PADDING and 16 * missing < padded


def check_target(config: DrafterConfig, target: TargetShape, where: str) -> None:
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
        if key == "vocab_size" and pads(made_for, given):
            continue
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


def read_config(folder: Path) -> AnyConfig:
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
        return config_from_dict(values)
    except DriftError as error:
        raise DriftError(f"{path}: {error}") from None


def _check_size(name: str, value: int | None) -> None:
    most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
    if value is not None and not 1 <= value <= most:
        none = ", or null for none" if name == "sliding_window" else ""
        raise DriftError(f"{name} is {value}; expected at least 1 and at most {most}{none}")


def _check_positive(config: DrafterConfig, name: str) -> None:
    if getattr(config, name) <= 0:
        raise DriftError(f"{name} is {getattr(config, name)}; expected more than 0")


def _check_block(value: Any, where: str) -> None:
    """Checks that numbers in a block's keys are no larger than any model's."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "rope_theta":
                _check_block(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            _check_block(inner, where)
    elif isinstance(value, int | float) and not abs(value) <= MAX_SIZE:  # false for NaN
        raise DriftError(f"{where} is {value}; expected at most {MAX_SIZE}")


def _from_dict(cls: type[Schema], values: Any, where: str) -> Schema:
    if not isinstance(values, dict):
        raise DriftError(f"{where} is {brief(values)}; expected an object")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
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
            raise DriftError(f"{where} has {name} = {brief(value)}; expected {expected}")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Tells whether a JSON value is of the annotated type (sizes are never negative)."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin is UnionType:
        return any(_fits(value, choice) for choice in get_args(hint))
    if origin in (tuple, list):
        item = get_args(hint)[0]
        return isinstance(value, origin) and all(_fits(v, item) for v in value)
    if origin is dict:
        item = get_args(hint)[1]
        return isinstance(value, dict) and all(_fits(v, item) for v in value.values())
    if hint is Any:
        return True
    if hint is int:
        return type(value) is int and value >= 0
    if hint is float:
        return type(value) in (int, float) and abs(value) < MAX_FLOAT  # false for NaN
    return isinstance(value, hint)
