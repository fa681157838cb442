"""Understands an EAGLE-3 checkpoint: canonical tensors and a flat config in, every value out."""

from mlx_drift.convert.conventions import (
    TAP_KEYS,
    Undecided,
    Values,
    resolve_taps,
)
from mlx_drift.convert.given import Given, Overrides, Tensors, Understood
from mlx_drift.convert.layers import read_layers, read_target
from mlx_drift.errors import DriftError, brief


def understand_eagle3(given: Given) -> Understood:
    """Resolves every field of an `Eagle3Config`.

    Raises:
        DriftError: If anything is missing or contradictory.
    """
    values, tensors, weights = given.values, given.tensors, given.weights
    hidden_size = values.size("hidden_size")
    made_for = read_target(values, given.target, _target_size(given, hidden_size))
    num_taps = _count_taps(values, tensors, weights, hidden_size, made_for.hidden_size)
    own_head = "lm_head.weight" in tensors
    if not own_head and "embed_tokens.weight" in tensors and values.take("tie_word_embeddings"):
        raise DriftError(
            f"{values.file}: tie_word_embeddings is true, but the weights have an embedding of "
            "their own and no lm_head.weight; save the head with its lm_head"
        )
    fields = read_layers(values, tensors, given.overrides) | {
        "drafter_type": "eagle3",
        "format_version": 1,
        "feedback": _feedback(values, given.overrides),
        "fc": "fc.weight" in tensors,
        "fc_norm": _seen(values, tensors, "fc_norm", "fc_norm.0.weight"),
        "norm_before_fc": _seen(values, tensors, "norm_before_fc", "input_norm.weight"),
        "hidden_norm": "layers.0.hidden_norm.weight" in tensors,
        "norm_before_residual": bool(values.checked("norm_before_residual", bool)),
        "hidden_size": hidden_size,
        "qk_norm": "layers.0.self_attn.q_norm.weight" in tensors,
        "gated_attention": gated(values, tensors),
        "draft_vocab_size": read_draft_vocab_size(values, tensors, made_for.vocab_size),
        "own_head": own_head,
        "target": vars(made_for),
    }
    _refuse_what_is_not_run(values, tensors)
    undecided = None
    try:
        fields["taps"] = (
            _final_norm(values, made_for.num_layers)
            if num_taps == 0
            else resolve_taps(
                values, num_taps, made_for.num_layers, given.tap_ids, given.overrides.taps
            )
        )
    except Undecided as error:
        undecided = error
    return fields, undecided


def _target_size(given: Given, hidden_size: int) -> int:
    """Tells the target's hidden size where the config does not: not every trainer writes it.

    The norms of the taps have it; else `fc` may suit just the target that is given.
    """
    values, tensors = given.values, given.tensors
    if values.config.get("target_hidden_size") is not None:
        return values.size("target_hidden_size")
    norm, fc = (tensors.get(f"{name}.weight") for name in ("fc_norm.0", "fc"))
    ids = next((i for key in TAP_KEYS if isinstance(i := values.config.get(key), list) and i), None)
    num_taps = 3 if ids is None else len(ids)
    width = 0 if given.target is None else given.target.hidden_size
    size, why = hidden_size, ""
    if norm is not None and norm.ndim == 1 and norm.size:
        size, why = norm.size, "fc_norm has that width"
    elif width and fc is not None and fc.shape[1:] == (num_taps * width,):
        size, why = width, f"fc suits {num_taps} taps of the one that is given"
    if size != hidden_size:
        values.notes.append(f"the target's hidden size is taken to be {size}: {why}")
    return size


def _count_taps(
    values: Values, tensors: Tensors, weights: str, hidden_size: int, target_size: int
) -> int:
    """Counts the taps that `fc` was made for; 0 if there is no `fc`."""
    if "fc.weight" not in tensors:
        if values.config.get("use_aux_hidden_state") is not False:
            raise DriftError(f"{weights} lacks the tensor fc.weight")
        queries = tensors.get("layers.0.self_attn.q_proj.weight")
        if queries is not None and queries.shape[1:] == (hidden_size,):
            raise DriftError(
                f"{weights}: a head without auxiliary states whose first layer reads no token "
                "embedding, as ModelOpt exports it from Hugging Face models; it is not run. Take a "
                "head with auxiliary states"
            )
        return 0
    shape = tensors["fc.weight"].shape
    if len(shape) != 2 or shape[0] != hidden_size or shape[1] < 1 or shape[1] % target_size:
        untold = target_size == hidden_size and values.config.get("target_hidden_size") is None
        hint = (
            ". If the target is wider than the drafter, give it: --target MODEL" if untold else ""
        )
        raise DriftError(
            f"{weights}: fc.weight has shape {shape}; expected ({hidden_size}, a multiple of the "
            f"target's hidden size {target_size}){hint}"
        )
    return shape[1] // target_size


def _final_norm(values: Values, num_layers: int | None) -> tuple[int, ...]:
    """Takes the target's final normed state, which a head without `fc` reads."""
    values.look("eagle_aux_hidden_state_layer_ids")
    if num_layers is None:
        raise Undecided(
            f"{values.file}: the drafter has no fc, so it reads the target's final norm; which tap "
            "that is depends on the target's number of layers. Give the target: --target MODEL"
        )
    return values.rule("taps", (num_layers + 1,), "no fc: the target's final normed state")


def _feedback(values: Values, overrides: Overrides) -> str:
    """Takes `norm_output`, which older TensorRT-LLM configs call `return_hidden_post_norm`."""
    normed = values.checked("norm_output", bool, name="feedback")
    if values.config.get("norm_output") is None:
        older = values.checked("return_hidden_post_norm", bool)
        if older is not None:
            normed, values.provenance["feedback"] = older, "file: return_hidden_post_norm"
    if overrides.feedback is not None:
        return values.override("feedback", overrides.feedback)
    return "post" if normed else "pre"


def read_draft_vocab_size(values: Values, tensors: Tensors, vocab_size: int) -> int:
    """Takes the rows of the head, which the config may state; DriftError if it states others."""
    values.look("truncated_vocab_size")  # nebius' name for it
    head = tensors.get("lm_head.weight")
    rows = head.shape[0] if head is not None and head.shape else vocab_size
    stated = values.size("draft_vocab_size", rows)
    if stated != rows:
        raise DriftError(
            f"{values.file}: draft_vocab_size is {stated}, but lm_head.weight has {rows} rows"
        )
    return rows


def _seen(values: Values, tensors: Tensors, switch: str, tensor: str) -> bool:
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


def gated(values: Values, tensors: Tensors) -> bool:
    """Tells whether `q_proj` has a gate's rows beside the queries', as in Qwen3-Next.

    Qwen3.5's `attn_output_gate` alone means nothing: trainers copy configs from targets.
    """
    queries, output = (
        tensors.get(f"layers.0.self_attn.{name}.weight") for name in ("q_proj", "o_proj")
    )
    if queries is None or output is None or len(queries.shape) != 2 or len(output.shape) != 2:
        return False
    seen = queries.shape[0] == 2 * output.shape[1]
    if seen and values.checked("attn_output_gate", bool) is False:
        raise DriftError(
            f"{values.file}: attn_output_gate is False, but q_proj has two rows for each column of "
            "o_proj, as attention with a gate does"
        )
    values.look("attn_output_gate")
    if seen:
        values.rule("gated_attention", seen, "q_proj has two rows for each column of o_proj")
    return seen


def _refuse_what_is_not_run(values: Values, tensors: Tensors) -> None:
    """Takes the switches that are allowed one value only: what the tensors say, or what is run."""
    only = {
        "use_aux_hidden_state": "fc.weight" in tensors,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "parallel_draft_step": 1,
    }
    for key, value in only.items():
        if values.take(key, value) != value:
            raise DriftError(
                f"{values.file}: {key} is {brief(values.config[key])}; this head is run only with "
                f"{value}"
            )
    values.look(
        *"use_input_layernorm_in_first_layer next_layer_regular parallel_draft_heads_num_layers "
        "num_aux_hidden_states use_aux_norm".split()
    )
