"""Resolves what a checkpoint leaves open, and keeps account of where each value came from.

Tap ids are the worst of it: producers write `i` for the *input* of layer i (vLLM, SafeAILab,
speculators) or for its *output* (SGLang, SpecForge, TorchSpec), and one layer off costs from 0.1
accepted tokens to a collapse. The rules below were made from engines' own patches (sgl-project/
sglang #25454 and #32334, vllm-project/vllm #43671); where they do not decide, the user must.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mlx_drift.errors import DriftError, brief, printable

TapConvention = Literal["input", "output"]

BOOKKEEPING = frozenset(
    """
    _name_or_path architectures attention_dropout auto_map bos_token_id dtype eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder label2id model_type
    output_attentions output_hidden_states pad_token_id pretraining_tp return_dict torch_dtype
    transformers_version use_cache
    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix
    problem_type pruned_heads remove_invalid_values repetition_penalty return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torchscript typical_p use_bfloat16
    """.split()
)
"""Keys of transformers' configs that say nothing about the arithmetic of a drafter."""


Kind = TypeVar("Kind", bool, list, dict)  # type: ignore[type-arg]
MAX_LAYER_ID = 10_000
KINDS = {bool: "true or false", list: "list", dict: "JSON object"}


TAP_KEYS = (
    "eagle_aux_hidden_state_layer_ids",
    "target_layer_ids",  # verl-SpeCo
    "aux_hidden_state_layers",  # JANG
    "aux_hidden_state_layer_ids",  # speculators' block drafters
)

TAPS_KEY = "mlx_drift_taps"
"""What `mlx_drift.convert.export` writes beside a tool's ids: the taps that they mean."""


class Undecided(DriftError):
    """What the taps are cannot be told from the checkpoint alone: the user, or a probe, must."""


@dataclass
class Values:
    """The keys of a source config, taken one by one, with the provenance of each value.

    Attributes:
        config: The source's keys, flattened to one level by the dialect.
        file: The file they came from, for messages.
        defaults: What the dialect says of keys that the file may leave out: the value, and why.
        probed: Which values the probe chose and not the user.
        provenance: For each resolved value: `file`, `rule: …`, `default`, `override` or `probe`.
    """

    config: dict[str, Any]
    file: str
    defaults: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    probed: AbstractSet[str] = frozenset()
    provenance: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)  # parts of taken keys that nobody reads
    notes: list[str] = field(default_factory=list)  # what the user should know, a line each
    _taken: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None, *, name: str | None = None) -> Any:
        """Takes a key, or the default if the file lacks it or holds null."""
        self._taken.add(key)
        value = self.config.get(key)
        if value is None and key in self.defaults:
            value, why = self.defaults[key]
            return self.rule(name or key, value, why)
        self.provenance[name or key] = "default" if value is None else "file"
        return default if value is None else value

    def look(self, *keys: str) -> None:
        """Marks keys as read of which something else tells what they say, such as the tensors."""
        self._taken.update(keys)

    def size(self, key: str, default: int | None = None) -> int:
        """Takes a positive whole number, which must be there unless a default is given.

        Raises:
            DriftError: If it is missing or something else.
        """
        value = self.take(key, default)
        if value is None:
            raise DriftError(f"{self.file} lacks the key {key!r}")
        if type(value) is not int or value < 1:
            raise DriftError(
                f"{self.file}: {key} is {brief(value)}; expected a positive whole number"
            )
        return value

    def checked(self, key: str, kind: type[Kind], *, name: str | None = None) -> Kind | None:
        """Takes a key whose value must be of one kind; None if the file lacks it.

        Raises:
            DriftError: If it is of another kind.
        """
        value = self.take(key, name=name)
        if value is not None and type(value) is not kind:
            raise DriftError(f"{self.file}: {key} is {brief(value)}; expected a {KINDS[kind]}")
        return value

    def rule(self, name: str, value: Any, why: str) -> Any:
        """Notes a value that was not read but follows from something else."""
        self.provenance[name] = f"rule: {why}"
        return value

    def override(self, name: str, value: Any) -> Any:
        """Notes a value that the user or the probe chose."""
        self.provenance[name] = self.chosen_by(name)
        return value

    def chosen_by(self, name: str) -> str:
        """Tells who overrides a value: the user or the probe."""
        return "probe" if name in self.probed else "override"

    def unknown(self) -> list[str]:
        """The keys that were not recognised, transformers' bookkeeping aside."""
        said = {key for key, value in self.config.items() if value is not None}
        unknown = sorted(said - self._taken - BOOKKEEPING) + self.unread
        return [printable(key) for key in unknown]


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
        override: What the user, or the probe, says they mean.

    Raises:
        DriftError: If the ids do not fit `fc`.
        Undecided: If their meaning cannot be decided.
    """
    ids = read_tap_ids(values)
    meant = values.checked(TAPS_KEY, list)
    if meant and override is None:
        values.provenance["taps"] = f"file: {TAPS_KEY}"
        return _fitting(values, meant, num_taps, num_layers)
    if ids is None:
        return _default_taps(values, num_taps, num_layers, override)
    _fitting(values, ids, num_taps, num_layers)
    convention, why = tap_convention(ids, num_layers, producer)
    if override == "output" and num_layers in ids:
        raise DriftError(
            f"{values.file}: the tap layers are {ids}, but layer {num_layers} of a target of "
            f"{num_layers} layers has no output; they are inputs: --taps input"
        )
    if override is not None:
        convention = override
        values.provenance["taps"] = f"file; {values.chosen_by('taps')}: {override} of layer"
    elif convention is None:
        raise Undecided(
            f"{values.file}: the tap layers {ids} may be inputs or outputs of those layers. "
            "Say which: --taps input or --taps output; or give the target, which may tell: "
            "--target MODEL"
        )
    else:
        values.provenance["taps"] = f"file; rule: {convention} of layer, since {why}"
    return tuple(ids) if convention == "input" else tuple(i + 1 for i in ids)


def _fitting(
    values: Values, ids: list[Any], num_taps: int, num_layers: int | None
) -> tuple[Any, ...]:
    """Returns the ids, of which there must be as many as `fc` was made for."""
    if len(ids) != num_taps:
        wider = num_layers is None and num_taps % len(ids) == 0
        raise DriftError(
            f"{values.file} names {len(ids)} tap layers {brief(ids)}, but fc was made for "
            f"{num_taps}"
            + (", or for a target wider than the drafter: give it, --target MODEL" if wider else "")
        )
    return tuple(ids)


def read_tap_ids(values: Values) -> list[int] | None:
    """Takes a checkpoint's layer ids, in whatever key they are; None if there are none.

    Raises:
        DriftError: If they are no ascending layer numbers.
    """
    ids = next(filter(None, [values.checked(key, list, name="taps") for key in TAP_KEYS]), None)
    if not ids:
        return None
    if not all(type(i) is int and 0 <= i < MAX_LAYER_ID for i in ids):
        raise DriftError(f"{values.file}: the tap layers are {brief(ids)}; expected layer numbers")
    if ids != sorted(set(ids)):
        raise DriftError(
            f"{values.file}: the tap layers are {brief(ids)}; expected distinct ones in ascending "
            "order, since fc's columns follow them"
        )
    return ids


def _default_taps(
    values: Values, num_taps: int, num_layers: int | None, override: TapConvention | None
) -> tuple[int, ...]:
    if override is not None and "taps" not in values.probed:
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
        raise Undecided(
            f"{values.file} names no tap layers; their default depends on the target's number of "
            "layers. Give the target: --target MODEL"
        )
    return values.rule(
        "taps",
        (2, num_layers // 2, num_layers - 3),
        "no ids in the file; inputs of layers 2, n//2, n-3, the default of EAGLE-3",
    )


def tap_convention(
    ids: list[int], num_layers: int | None, producer: TapConvention | None
) -> tuple[TapConvention | None, str]:
    """Decides whether layer ids mean inputs or outputs, and says why; None if nothing decides.

    Args:
        ids: The layer ids, ascending.
        num_layers: The target's number of layers, n, if known.
        producer: What ids mean to the tool that wrote them, if that is known.
    """
    n = num_layers
    if n is not None and max(ids) == n:
        return "input", "the last is n, the end of the last layer"
    if ids[0] == 1:
        return "output", "the first is 1, as in the default outputs 1, n//2-1, n-4"
    if 0 in ids:
        return "input", "there is no output before layer 0's"
    if n is not None and ids == [2, n // 2, n - 3]:
        return "input", "they are the default inputs 2, n//2, n-3"
    if producer == "output" and n is None:
        return None, ""  # they may yet be the default inputs, or end at the last layer's end
    return producer, "the producer writes them so"
