"""What the configs of all drafters have in common, and how they are read: strictly.

A key that is unknown or missing, or whose value is of another type than its field's annotation, is
an error that names it.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mlx_drift.errors import DriftError, brief
from mlx_drift.target.model import TargetShape

Schema = TypeVar("Schema")

FORMAT_VERSION = 1

COUNTED_FROM_0 = "format_version", "mask_token_id", "num_blocks"
"""Whole numbers in configs that are no sizes."""

MAX_SIZE, MAX_LAYERS, MAX_TAP, MAX_FLOAT = 2**24, 256, 10_000, 1e18
"""No drafter comes near these; a larger number in a file is an error or an attack."""

WORDS: dict[Any, str] = {
    int: "a whole number from 0 on",
    float: f"a number of at most {MAX_FLOAT:g}",
    bool: "true or false",
    str: "a text",
    tuple: "a list of whole numbers from 0 on",
    NoneType: "null",
}
"""What values are called in a JSON file; those of other annotations are objects."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """mlx's parameters of a quantized linear layer, under mlx-lm's names."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """What the configs of all drafters have in common that are heads on a target's states.

    H is the drafter's hidden size, T the target's, A the number of taps.

    Attributes:
        taps: Ascending indices into ``[embedding, out_0 … out_{n−1}, final norm]``.
        source: Where the drafter came from: `path`, or `repo`, `subfolder` and `revision`; `file`,
            `sha256`, and the `target` it names.
        provenance: For each resolved value, where it came from: `file`, `rule: …`, `default`,
            `override` or `probe`.
    """

    drafter_type: str
    format_version: int = FORMAT_VERSION
    taps: tuple[int, ...]
    hidden_size: int
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
                if f.type in (int, int | None) and f.name not in COUNTED_FROM_0:
                    check_size(f.name, getattr(where, f.name))
        if unknown := sorted(self.provenance.keys() - {f.name for f in fields(self)}):
            raise DriftError(f"provenance has the unknown key {unknown[0]!r}")
        for text in (*self.source.values(), *self.provenance.values()):
            if not text.isprintable():
                raise DriftError(f"source or provenance holds {brief(text)}; expected one line")

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as `config_from_dict` reads it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class LayersConfig(DrafterConfig):
    """What the configs of drafters with decoder layers have in common.

    Attributes:
        max_position_embeddings: The training length, not a limit.
        sliding_window: Key j is visible to query i while i − j < window; None for all keys.
        full_attention_layers: Layers that see all keys though there is a window.
        own_embedding: The checkpoint brings `embed_tokens`; else the target's rows are used.
    """

    num_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    own_embedding: bool = False

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_positive(self, "rms_norm_eps")
        check_layers(self, "full_attention_layers")

    def window_of(self, layer: int) -> int | None:
        """Returns the window of one layer; None if it sees all keys."""
        return None if layer in self.full_attention_layers else self.sliding_window


@dataclass(frozen=True, kw_only=True)
class LlamaLayersConfig(LayersConfig):
    """What the configs of drafters made of Llama layers have in common.

    Attributes:
        rope_scaling: A RoPE kind of mlx-lm's `initialize_rope`, with its own keys.
        partial_rotary_factor: The part of each head that is rotated, its first dimensions.
        qk_norm: RMSNorm of queries and keys per head, before RoPE.
        gated_attention: What a head says is multiplied, element by element, with the sigmoid of a
            projection of what its queries read, before the output's projection (Qiu et al., arXiv
            2505.06708; paper, App. A). `attn_output_gate` in Qwen3-Next and Qwen3.5, whose layout
            it has: for each head, `q_proj` has the queries' rows and then the gate's.
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
    qk_norm: bool = False
    gated_attention: bool = False
    fc_bias: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_positive(self, "rope_theta")
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
class VocabularyConfig(LlamaLayersConfig):
    """What the configs of drafters have in common that may have a vocabulary of their own.

    Attributes:
        draft_vocab_size: Rows of the drafter's head; `d2t` maps them if fewer than the target's.
        own_head: The checkpoint brings `lm_head`; else the target's head is used.
    """

    draft_vocab_size: int
    own_head: bool

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        if not self.own_head and self.draft_vocab_size != self.target.vocab_size:
            raise DriftError(
                f"draft_vocab_size is {self.draft_vocab_size} and the target's vocabulary "
                f"{self.target.vocab_size}, so the drafter needs an lm_head of its own"
            )
        own = self.own_embedding and self.own_head
        if self.hidden_size != self.target.hidden_size and not own:
            raise DriftError(
                f"hidden_size is {self.hidden_size} and the target's {self.target.hidden_size}, "
                "so the drafter needs an embed_tokens and an lm_head of its own"
            )


def check_size(name: str, value: int | None) -> None:
    """Checks a size, a count or a window; DriftError if no drafter comes near it."""
    most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
    if value is not None and not 1 <= value <= most:
        none = ", or null for none" if name == "sliding_window" else ""
        raise DriftError(f"{name} is {value}; expected at least 1 and at most {most}{none}")


def check_positive(config: DrafterConfig, name: str) -> None:
    """Checks that a number is more than 0; DriftError if not."""
    if getattr(config, name) <= 0:
        raise DriftError(f"{name} is {getattr(config, name)}; expected more than 0")


def check_layers(config: LayersConfig, name: str) -> None:
    """Checks that layers that are named are there; DriftError if not."""
    named = getattr(config, name)
    if any(layer >= config.num_layers for layer in named):
        raise DriftError(f"{name} is {list(named)}, but there are {config.num_layers} layers")


def check_mask(token: int, target: TargetShape) -> None:
    """Checks that there is an embedding of the mask token; DriftError if not."""
    if token >= target.vocab_size:
        raise DriftError(
            f"mask_token_id is {token}, outside the target's vocabulary of {target.vocab_size}"
        )


def check_one_tap(config: DrafterConfig, what: str) -> None:
    """Checks that a drafter reads one tap, as wide as itself; DriftError if not."""
    if len(config.taps) != 1 or config.hidden_size != config.target.hidden_size:
        raise DriftError(
            f"{what} reads one tap of its own width, but this has taps {list(config.taps)}, "
            f"hidden_size {config.hidden_size} and the target's {config.target.hidden_size}"
        )


def strictly(cls: type[Schema], values: Any, where: str) -> Schema:
    """Reads a JSON object as a dataclass.

    Args:
        cls: The dataclass; its annotations are what the values must be.
        values: What the file holds; lists as tuples where the annotation is one.
        where: What it is, for messages.

    Raises:
        DriftError: Naming the first key that is unknown, missing, or of another type.
    """
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
            shown = list(value) if isinstance(value, tuple) else value
            raise DriftError(f"{where} has {name} = {brief(shown)}; expected {_told(hints[name])}")
    return cls(**values)


def _told(hint: Any) -> str:
    """Says what an annotation allows, in JSON's words."""
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) in (UnionType, Union):
        return " or ".join(_told(choice) for choice in get_args(hint))
    return WORDS.get(get_origin(hint) or hint, "an object")


def _fits(value: Any, hint: Any) -> bool:
    """Tells whether a JSON value is of the annotated type (sizes are never negative)."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (UnionType, Union):  # the latter of a Literal and None
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
