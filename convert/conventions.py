"""Resolves what a checkpoint leaves open, and keeps account of where each value came from.

Tap ids are the worst of it: producers write `i` for the *input* of layer i (vLLM, SafeAILab,
speculators) or for its *output* (SGLang, SpecForge, TorchSpec), and one layer off costs from 0.1
accepted tokens to a collapse. The rules below were made from engines' own patches (sgl-project/
sglang #25454 and #32334, vllm-project/vllm #43671); where they do not decide, the user must.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mlx_drift.errors import DriftError

TapConvention = Literal["input", "output"]

BOOKKEEPING = frozenset(
    """
    _name_or_path architectures attention_dropout auto_map bos_token_id dtype eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder label2id model_type
    output_attentions output_hidden_states pad_token_id pretraining_tp return_dict torch_dtype
    transformers_version use_cache
    """.split()
)
"""Keys of transformers' that say nothing about the arithmetic of a drafter."""


Kind = TypeVar("Kind", bool, list, dict)  # type: ignore[type-arg]
KINDS = {bool: "true or false", list: "list", dict: "JSON object"}


@dataclass
class Values:
    """The keys of a source config, taken one by one, with the provenance of each value.

    Attributes:
        config: The source's keys, flattened to one level by the dialect.
        file: The file they came from, for messages.
        provenance: For each resolved value: `file`, `default`, `override`, or the rule's name.
    """

    config: dict[str, Any]
    file: str
    provenance: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)  # parts of taken keys that nobody reads
    _taken: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None, *, name: str | None = None) -> Any:
        """Takes a key, or the default if the file lacks it or holds null."""
        self._taken.add(key)
        value = self.config.get(key)
        self.provenance[name or key] = "default" if value is None else "file"
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """Takes a positive whole number, which must be there unless a default is given.

        Raises:
            DriftError: If it is missing or something else.
        """
        value = self.take(key, default)
        if value is None:
            raise DriftError(f"{self.file} lacks the key {key!r}")
        if type(value) is not int or value < 1:
            raise DriftError(f"{self.file}: {key} is {value!r}; expected a positive whole number")
        return value

    def checked(self, key: str, kind: type[Kind], *, name: str | None = None) -> Kind | None:
        """Takes a key whose value must be of one kind; None if the file lacks it.

        Raises:
            DriftError: If it is of another kind.
        """
        value = self.take(key, name=name)
        if value is not None and type(value) is not kind:
            raise DriftError(f"{self.file}: {key} is {value!r}; expected a {KINDS[kind]}")
        return value

    def rule(self, name: str, value: Any, why: str) -> Any:
        """Notes a value that was not read but follows from something else."""
        self.provenance[name] = f"rule: {why}"
        return value

    def override(self, name: str, value: Any) -> Any:
        """Notes a value the user chose."""
        self.provenance[name] = "override"
        return value

    def unknown(self) -> list[str]:
        """The keys nobody read, transformers' bookkeeping aside."""
        return sorted(self.config.keys() - self._taken - BOOKKEEPING) + self.unread


def resolve_taps(
    values: Values,
    num_taps: int,
    num_layers: int | None,
    producer: TapConvention | None,
    override: TapConvention | None,
) -> tuple[int, ...]:
    """Turns a checkpoint's layer ids into taps, indices into ``[embedding, out_0 … out_{n−1}]``.

    Args:
        values: The config, with the ids if it has any.
        num_taps: How many taps `fc` was made for.
        num_layers: The target's number of layers, n, if known.
        producer: What ids mean to the tool that wrote the checkpoint, if that is known.
        override: What the user says they mean.

    Raises:
        DriftError: If the ids do not fit `fc`, or their meaning cannot be decided.
    """
    ids = values.checked("eagle_aux_hidden_state_layer_ids", list, name="taps")
    if ids is None:
        return _default_taps(values, num_taps, num_layers, override)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise DriftError(f"{values.file}: the tap layers are {ids}; expected layer numbers")
    if ids != sorted(set(ids)):
        raise DriftError(
            f"{values.file}: the tap layers are {ids}; expected distinct ones in ascending order, "
            "since fc's columns follow them"
        )
    if len(ids) != num_taps:
        raise DriftError(
            f"{values.file} names {len(ids)} tap layers {ids}, but fc was made for {num_taps}"
        )
    convention, why = _tap_convention(ids, num_layers, producer)
    if override is not None:
        convention, values.provenance["taps"] = override, f"file; override: {override} of layer"
    elif convention is None:
        raise DriftError(
            f"{values.file}: the tap layers {ids} may be inputs or outputs of those layers. "
            "Say which: --taps input or --taps output; or give the target, which may tell: "
            "--target MODEL"
        )
    else:
        values.provenance["taps"] = f"file; rule: {convention} of layer, since {why}"
    return tuple(ids) if convention == "input" else tuple(i + 1 for i in ids)


def _default_taps(
    values: Values, num_taps: int, num_layers: int | None, override: TapConvention | None
) -> tuple[int, ...]:
    if override is not None:
        raise DriftError(
            f"{values.file} names no tap layers, so --taps {override} has nothing to say; leave "
            "it out"
        )
    if num_taps != 3:
        raise DriftError(
            f"{values.file} names no tap layers, and fc was made for {num_taps} of them; the "
            "default of EAGLE-3 is for 3"
        )
    if num_layers is None:
        raise DriftError(
            f"{values.file} names no tap layers; their default depends on the target's number of "
            "layers. Give the target: --target MODEL"
        )
    return values.rule(
        "taps",
        (2, num_layers // 2, num_layers - 3),
        "no ids in the file; inputs of layers 2, n//2, n-3, the default of EAGLE-3",
    )


def _tap_convention(
    ids: list[int], num_layers: int | None, producer: TapConvention | None
) -> tuple[TapConvention | None, str]:
    if ids[0] == 1:
        return "output", "the first is 1, as in the default outputs 1, n//2-1, n-4"
    if 0 in ids:
        return "input", "there is no output before layer 0's"
    n = num_layers
    if n is None:  # the ids may be the default inputs, or end at the last layer's end
        return None, ""
    if ids == [2, n // 2, n - 3]:
        return "input", "they are the default inputs 2, n//2, n-3"
    if max(ids) == n:
        return "input", "the last is n, the end of the last layer"
    return producer, "the producer writes them so"
