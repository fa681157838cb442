"""Understands DFlash and DSpark checkpoints.

What is in no tensor and halves the acceptance if it is read wrongly: which slot predicts which
position, and what layer ids mean. The first is settled by counts (a block of B slots makes B − 1 or
B drafts), by a flag, or by the user; the second by who wrote the file. EAGLE-3's rules for ids say
nothing here: those ids are other defaults.
"""

from typing import Any

from mlx_drift.convert.conventions import TapConvention, Undecided, Values, read_tap_ids
from mlx_drift.convert.dialects.dflash import has_markov
from mlx_drift.convert.eagle3 import gated, read_draft_vocab_size
from mlx_drift.convert.given import Given, Overrides, Slots, Tensors, Understood
from mlx_drift.convert.layers import read_layers, read_target, sliding_layers
from mlx_drift.convert.masks import read_mask_token, read_max_drafts
from mlx_drift.errors import DriftError, brief
from mlx_drift.target.model import TargetShape


def understand_dflash(given: Given) -> Understood:
    """Resolves every field of a `DFlashConfig`.

    Raises:
        DriftError: If anything is missing or contradictory, or an override says what such a head
            has not.
    """
    values, tensors, weights = given.values, given.tensors, given.weights
    given.overrides.refuse(f"{weights} is a block drafter, which feeds no state back", "feedback")
    hidden_size = values.size("hidden_size")
    made_for = read_target(values, given.target, values.size("target_hidden_size", hidden_size))
    if values.take("num_target_layers") is not None:
        made_for = _with_layers(values, made_for)
    layers = read_layers(values, tensors, given.overrides)
    block_size = values.size("block_size")
    of_speculators = "speculators_config" in values.config
    values.look("norm_output", "num_anchors", "attention_mode")
    _refuse_what_is_not_run(values)
    convention: TapConvention = given.overrides.taps or given.tap_ids or "output"
    taps = _taps(values, tensors, weights, convention, given.overrides, made_for)
    fields = layers | {
        "drafter_type": "dflash",
        "format_version": 1,
        "hidden_size": hidden_size,
        "taps": taps,
        "block_size": block_size,
        "mask_token_id": read_mask_token(values, "mask_token_id"),
        "slots": _slots(values, block_size, given.overrides.slots, has_markov(tensors.keys())),
        "causal_layers": _causal_layers(values, layers, of_speculators),
        "window_rule": values.rule(
            "window_rule", "anchor" if of_speculators else "slot", "the trainer's mask"
        ),
        "qk_norm": "layers.0.self_attn.q_norm.weight" in tensors,
        "gated_attention": gated(values, tensors),
        "draft_vocab_size": read_draft_vocab_size(values, tensors, made_for.vocab_size),
        "own_head": "lm_head.weight" in tensors,
        "target": vars(made_for),
    }
    return fields, None


def understand_dspark(given: Given) -> Understood:
    """Resolves every field of a `DSparkConfig`; as `understand_dflash`."""
    values, tensors, weights = given.values, given.tensors, given.weights
    fields, undecided = understand_dflash(given)
    w1 = tensors.get("markov.w1.weight")
    kind = None
    if w1 is not None:
        if w1.ndim != 2:
            raise DriftError(f"{weights}: markov.w1.weight has shape {w1.shape}; expected a matrix")
        seen = {"gated": "markov.gate.weight" in tensors, "rnn": "markov.joint.weight" in tensors}
        kind = next((name for name, there in seen.items() if there), "vanilla")
        said = values.take("markov_head_type", kind, name="markov")
        if said != kind:
            raise DriftError(
                f"{values.file}: markov_head_type is {brief(said)}, but the tensors are those of "
                f"a {kind} one"
            )
    values.look(
        *"markov_rank enable_confidence_head use_confidence_head confidence_head_with_markov "
        "projector_type".split()
    )
    return fields | {
        "drafter_type": "dspark",
        "markov": kind,
        "markov_rank": 1 if w1 is None else values.rule("markov_rank", w1.shape[1], "markov.w1"),
        "confidence": _confidence(values, tensors, weights, fields["hidden_size"]),
    }, undecided


def _confidence(values: Values, tensors: Tensors, weights: str, hidden_size: int) -> str | None:
    """Tells what the confidence head reads, by its width; None if there is none."""
    head = tensors.get("confidence.weight")
    if head is None:
        return None
    if head.ndim != 2 or head.shape[1] < hidden_size:
        raise DriftError(
            f"{weights}: confidence.weight has shape {head.shape}; expected (1, at least "
            f"{hidden_size})"
        )
    reads = "state" if head.shape[1] == hidden_size else "state and token"
    return str(values.rule("confidence", reads, "the columns of its weight"))


def _with_layers(values: Values, made_for: TargetShape) -> TargetShape:
    """Takes the number of the target's layers from the file."""
    return TargetShape(
        hidden_size=made_for.hidden_size,
        vocab_size=made_for.vocab_size,
        num_layers=values.size("num_target_layers"),
    )


def _taps(
    values: Values,
    tensors: Tensors,
    weights: str,
    convention: TapConvention,
    overrides: Overrides,
    made_for: TargetShape,
) -> list[int]:
    """Turns layer ids into taps; `fc` is as wide as there are ids."""
    ids = read_tap_ids(values)
    if ids is None:
        raise DriftError(
            f"{values.file} names no tap layers (target_layer_ids, aux_hidden_state_layer_ids); "
            "add those the head was trained with"
        )
    fc = tensors.get("fc.weight")
    if fc is None:
        raise DriftError(f"{weights} lacks the tensor fc.weight")
    if fc.ndim != 2 or fc.shape[1] != len(ids) * made_for.hidden_size:
        raise DriftError(
            f"{weights}: fc.weight has shape {fc.shape}; expected {len(ids)} tap layers "
            f"{brief(ids)} times the target's hidden size {made_for.hidden_size} columns"
        )
    by = values.chosen_by("taps") if overrides.taps is not None else "rule"
    why = "" if overrides.taps is not None else ", since the trainer writes them so"
    values.provenance["taps"] = f"file; {by}: {convention} of layer{why}"
    return ids if convention == "input" else [i + 1 for i in ids]


def _slots(values: Values, block_size: int, override: Slots | None, is_dspark: bool) -> Slots:
    """Settles which position a slot predicts.

    Raises:
        DriftError: If the file contradicts itself.
        Undecided: If it does not say.
    """
    flags = {key: values.checked(key, bool) for key in ("sample_from_anchor", "shift_label")}
    drafts = read_max_drafts(values)
    values.provenance.pop("max_drafts", None)
    if override is not None:
        values.override("slots", override)
        return override
    said = {key: flag for key, flag in flags.items() if flag is not None}
    if drafts is not None:
        if drafts not in (block_size - 1, block_size):
            raise DriftError(
                f"{values.file}: speculative_tokens is {drafts} for a block_size of {block_size}; "
                "expected as many, or one less"
            )
        said["speculative_tokens"] = drafts == block_size
    if len(set(said.values())) > 1:
        raise DriftError(
            f"{values.file}: {' and '.join(said)} disagree on which position a slot predicts. Say "
            "which: --slots shifted or --slots unshifted"
        )
    if said:
        values.provenance["slots"] = f"file: {', '.join(said)}"
        return "shifted" if next(iter(said.values())) else "unshifted"
    if not is_dspark:
        values.rule("slots", "unshifted", "a DFlash slot predicts its own position")
        return "unshifted"
    if values.config.get("projector_type") != "dspark":
        values.rule("slots", "shifted", "the default of DeepSpec, which writes flat configs")
        return "shifted"
    raise Undecided(
        f"{values.file} does not say which position a slot predicts: SpecForge trains DSpark heads "
        "on the one after its own, while its generation reads its own. Say which: --slots shifted "
        "or --slots unshifted; or let --probe-conventions try both"
    )


def _causal_layers(values: Values, layers: dict[str, Any], of_speculators: bool) -> list[int]:
    """Tells in which layers a slot sees only the slots before it.

    They are those that were trained to slide: another window at run time does not change them.
    """
    num_layers = layers["num_layers"]
    windows = values.config.get("sliding_window"), layers["sliding_window"]
    sliding = [] if windows == (None, None) else sliding_layers(values, num_layers)
    if of_speculators:
        full = values.checked("sliding_window_non_causal", bool)
        values.provenance["causal_layers"] = "file: sliding_window_non_causal"
        return [] if full else sliding
    causal = values.checked("is_causal", bool, name="causal_layers")
    nested = values.checked("causal", bool)
    causal = nested if causal is None else causal
    if causal is None:
        values.rule("causal_layers", None, "sliding layers, as in z-lab's code")
        return sliding
    return [*range(num_layers)] if causal else []


def _refuse_what_is_not_run(values: Values) -> None:
    """Takes the switches that change the arithmetic and are allowed one value only."""
    only = {"attention_sink_bias": False, "input_embedding_scale": 1.0}
    for key, value in only.items():
        if values.take(key, value) != value:
            raise DriftError(
                f"{values.file}: {key} is {brief(values.config[key])}; this head is run only with "
                f"{value}"
            )
