"""What every drafter's config holds: the sizes of its layers, their RoPE and their window.

Tensors tell what shows in them, the config what does not (heads, RoPE, window).
"""

from typing import Any

from mlx_drift.convert.conventions import Values
from mlx_drift.convert.given import Overrides, Tensors
from mlx_drift.convert.rope import LAYER_KINDS, read_rope
from mlx_drift.errors import DriftError, brief
from mlx_drift.target.model import TargetShape


def read_layers(values: Values, tensors: Tensors, overrides: Overrides) -> dict[str, Any]:
    """Reads what is common to all drafters that chain Llama layers.

    Returns:
        Fields of `DrafterConfig`.

    Raises:
        DriftError: If a value is missing, of the wrong kind, or not supported.
    """
    heads = values.size("num_attention_heads")
    length = values.size("max_position_embeddings", 2048)
    rope = read_rope(values, length, overrides.rope_theta)
    if values.take("hidden_act", "silu") != "silu":
        raise DriftError(
            f"{values.file}: hidden_act is {brief(values.config['hidden_act'])}; only 'silu' is "
            "supported"
        )
    values.look("attention_bias", "mlp_bias", "bias", "tie_word_embeddings")  # the tensors tell
    num_layers = _count_layers(values, tensors)
    window, full = _window(values, num_layers, overrides.window)
    return {
        "intermediate_size": _intermediate_size(values, tensors),
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": values.size("num_key_value_heads", heads),
        "head_dim": _head_dim(values, tensors, heads),
        "rms_norm_eps": values.take("rms_norm_eps", 1e-6),
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "partial_rotary_factor": rope.partial_rotary_factor,
        "max_position_embeddings": length,
        "sliding_window": window,
        "full_attention_layers": full,
        "fc_bias": "fc.bias" in tensors,
        "attention_bias": "layers.0.self_attn.q_proj.bias" in tensors,
        "attention_output_bias": "layers.0.self_attn.o_proj.bias" in tensors,
        "mlp_bias": "layers.0.mlp.gate_proj.bias" in tensors,
        "own_embedding": "embed_tokens.weight" in tensors,
    }


def read_target(values: Values, target: TargetShape | None, hidden_size: int) -> TargetShape:
    """Reads the sizes of the target the drafter was made for; its layers from the target itself."""
    num_layers = None if target is None else target.num_layers
    if values.take("target_num_hidden_layers") is not None:
        num_layers = values.size("target_num_hidden_layers")
    return TargetShape(
        hidden_size=hidden_size, vocab_size=values.size("vocab_size"), num_layers=num_layers
    )


def _count_layers(values: Values, tensors: Tensors) -> int:
    """Counts the layers in the file; configs are known to give the target's number instead."""
    values.look("num_hidden_layers")
    numbers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    return values.rule("num_layers", len(numbers), "the layers in the file")


def _intermediate_size(values: Values, tensors: Tensors) -> int:
    """Takes the inner width of the feed-forward layer; it shows in the tensors."""
    inner = tensors.get("layers.0.mlp.gate_proj.weight")
    if values.take("intermediate_size") is not None or inner is None:
        return values.size("intermediate_size")
    return values.rule("intermediate_size", inner.shape[0], "rows of gate_proj")


def _head_dim(values: Values, tensors: Tensors, heads: int) -> int:
    """Takes the width of a head; never hidden size over heads, which is often another number."""
    output = tensors.get("layers.0.self_attn.o_proj.weight")
    if values.take("head_dim") is not None or output is None or len(output.shape) != 2:
        return values.size("head_dim")
    return values.rule("head_dim", output.shape[1] // heads, "columns of o_proj over heads")


def sliding_layers(values: Values, num_layers: int) -> list[int]:
    """Tells which layers slide by what the file says, whatever their window is.

    A layer slides if `layer_types` says so, as in vLLM and speculators; without `layer_types` all
    do, or none, as `use_sliding_window` says, whose `false` only the Qwen configs obey where there
    are both.
    """
    kinds = _layer_types(values, num_layers)
    enabled = values.checked("use_sliding_window", bool)
    obeyed = str(values.config.get("model_type", "")).startswith("qwen") or not kinds
    if enabled is False and obeyed:
        return []
    if not kinds:
        return [*range(num_layers)] if enabled else []
    return [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]


def _layer_types(values: Values, num_layers: int) -> list[str]:
    return list(map(str, values.checked("layer_types", list) or []))[:num_layers]


def _window(values: Values, num_layers: int, override: int | None) -> tuple[int | None, list[int]]:
    """Reads the sliding window, and which layers see everything all the same.

    transformers keeps `sliding_window` in a file even where it is off.
    """
    values.look("max_window_layers")
    if override is not None:
        values.look("layer_types", "use_sliding_window", "sliding_window")
        return values.override("sliding_window", override or None), []
    kinds, enabled = _layer_types(values, num_layers), values.checked("use_sliding_window", bool)
    if values.take("sliding_window") is None:
        if "sliding_attention" in kinds and enabled is not False:
            raise DriftError(
                f"{values.file}: layer_types names sliding layers, but there is no sliding_window. "
                "Say which: --window W"
            )
        return None, []
    window = values.size("sliding_window")
    if unknown := sorted(set(kinds) - LAYER_KINDS):
        raise DriftError(
            f"{values.file}: layer_types has {brief(unknown[0])}; expected "
            f"{' or '.join(sorted(LAYER_KINDS))}"
        )
    if kinds and len(kinds) < num_layers:
        raise DriftError(
            f"{values.file}: layer_types names {len(kinds)} layers, but the weights have "
            f"{num_layers}"
        )
    sliding = sliding_layers(values, num_layers)
    if not sliding:
        all_full = kinds and enabled is not False
        why = (
            "layer_types: all layers see everything"
            if all_full
            else "the file does not say that it is on"
        )
        return values.rule("sliding_window", None, why), []
    return window, [layer for layer in range(num_layers) if layer not in sliding]
