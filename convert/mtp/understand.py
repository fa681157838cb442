"""Understands the checkpoint of an MTP head: its tensors as mlx-lm's block wants them, its config.

What the head's files have in another form goes through `block` (fp8, experts, latent attention),
`norms` (zero-centred gains) and `packed` (quantized heads).
"""

from pathlib import Path
from typing import Any

from mlx_drift.convert.dialects.refused import quantized_to
from mlx_drift.convert.given import Overrides
from mlx_drift.convert.mtp.block import (
    ATTENTION,
    EXPERTS,
    quantized,
    scale_blocks,
    size,
    split_experts,
    split_latent,
    stack_experts,
)
from mlx_drift.convert.mtp.layouts import ZERO_CENTRED, find_layout, modules_of, text_config
from mlx_drift.convert.mtp.norms import with_their_1
from mlx_drift.convert.mtp.packed import packed_layers, unpack
from mlx_drift.convert.read.source import Checkpoint
from mlx_drift.convert.read.stored import StoredTensor
from mlx_drift.convert.resolved import Resolved
from mlx_drift.drafters.block import block_keys
from mlx_drift.drafters.config import config_from_dict
from mlx_drift.drafters.load import build_network, linear_layers
from mlx_drift.drafters.schema import FORMAT_VERSION, Quantization
from mlx_drift.errors import DriftError, brief

Tensors = dict[str, StoredTensor]

SIZES = "hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"


def understand_mtp(checkpoint: Checkpoint, overrides: Overrides) -> Resolved:
    """Resolves an MTP head's tensors and every convention.

    Args:
        checkpoint: What was read, the head's own tensors alone.
        overrides: The user's choices.

    Raises:
        DriftError: If anything is missing, left over or contradictory.
    """
    weights, config_file = checkpoint.weights, checkpoint.config_file
    overrides.refuse(
        f"{weights} is an MTP head, whose block takes RoPE from the target", "rope_theta"
    )
    layout, family = find_layout(checkpoint.config, config_file)
    modules = modules_of(layout, checkpoint.config, checkpoint.tensors, weights)
    if len(modules) != 1:
        raise DriftError(
            f"{weights} holds {len(modules)} MTP modules, to be run one after another; this "
            "version runs heads of one module"
        )
    names = next(iter(modules.values()))
    if (kind := quantized_to(names.keys())) is not None:
        raise quantized(weights, kind)
    config = text_config(checkpoint.config)
    sizes = {key: size(config, key, config_file) for key in SIZES}

    tensors = {ours: checkpoint.tensors[theirs] for ours, theirs in names.items()}
    tensors = split_experts(stack_experts(scale_blocks(tensors, weights), weights))
    if f"{ATTENTION}.kv_b_proj.scales" in tensors:  # packed along what is to be taken apart
        width = {f"{ATTENTION}.kv_b_proj": size(config, "kv_lora_rank", config_file)}
        tensors = unpack(tensors, packed_layers(tensors, width, weights))
    tensors = split_latent(tensors, config, config_file)
    notes: list[str] = []
    if family in ZERO_CENTRED:
        tensors, notes = with_their_1(tensors, weights)

    fields: dict[str, Any] = {
        "drafter_type": "mtp",
        "format_version": FORMAT_VERSION,
        "taps": [sizes["num_hidden_layers"] + (overrides.taps != "output")],
        "hidden_first": layout.hidden_first,
        "hidden_size": sizes["hidden_size"],
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": sizes["max_position_embeddings"],
        "sliding_window": overrides.window or None,
        "block": block_keys(family, _flat(config, notes), EXPERTS in tensors),
        "own_embedding": "embed_tokens.weight" in tensors,
        "own_head": "lm_head.weight" in tensors,
        "target": {
            "hidden_size": sizes["hidden_size"],
            "vocab_size": sizes["vocab_size"],
            "num_layers": sizes["num_hidden_layers"],
        },
    }
    said = checkpoint.config.get("mtp_feedback")
    said = said if said in ("pre", "post") else None
    fields["feedback"] = overrides.feedback or said or "post"
    provenance = {
        "taps": _chosen_by(overrides, "taps") or "rule: what the target's head reads, as in vLLM",
        "feedback": _chosen_by(overrides, "feedback")
        or ("file" if said else "rule: the normed state, as in vLLM"),
        "hidden_first": f"rule: {layout.name}",
        **dict.fromkeys(("hidden_size", "rms_norm_eps", "block"), "file"),
    }
    if layout.dropped:
        reason = "rule: the target's, of which the checkpoint has a copy (arXiv 2412.19437 §2.2)"
        provenance |= {"own_embedding": reason, "own_head": reason}
    tensors, quantization, told = _quantization(fields, tensors, weights)
    if quantization is not None:
        fields["quantization"], provenance["quantization"] = vars(quantization), "file"
    return Resolved(
        dialect=layout.name,
        config_file=config_file,
        fields=fields,
        provenance=provenance,
        tensors=tensors,
        unknown_keys=[],  # the config is the target's
        notes=notes + told,
    )


def _chosen_by(overrides: Overrides, name: str) -> str | None:
    """Tells who overrides a convention, if anyone does: the user or the probe."""
    if getattr(overrides, name) is None:
        return None
    return "probe" if name in overrides.probed else "override"


def _flat(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Puts the keys of transformers 5's `rope_parameters` where older configs have them.

    There they win over their namesakes, as in transformers; `notes` tells of those that differ.
    """
    rope = config.get("rope_parameters")
    flat: dict[str, Any] = {"rope_scaling": None} | config
    if not isinstance(rope, dict):
        return flat
    for key in ("rope_theta", "partial_rotary_factor"):
        newer, older = rope.get(key), config.get(key)
        if newer is None:
            continue
        flat[key] = newer
        if older is not None and older != newer:
            notes.append(
                f"rope_parameters.{key} is {brief(newer)} and {key} is {brief(older)}: the former "
                "is taken, as transformers 5 does"
            )
    is_scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    if is_scaled and config.get("rope_scaling") is None:
        flat["rope_scaling"] = rope
    return flat


def _quantization(
    fields: dict[str, Any], tensors: Tensors, where: str
) -> tuple[Tensors, Quantization | None, list[str]]:
    """Settles which layers stay packed: all of a kind that its network packs, or none.

    Returns:
        The tensors, how those that are packed are, and what the user should know.
    """
    if not any(name.endswith(".scales") for name in tensors):
        return tensors, None, []
    network = build_network(config_from_dict(fields), Path(where))
    widths = linear_layers(network)
    packed = packed_layers(tensors, widths, where)
    wanted = linear_layers(network, kept=False)
    kinds = {packed[layer].how if layer in packed else None for layer in wanted}
    odd = {layer: one for layer, one in packed.items() if layer not in wanted}
    if len(kinds) == 1 and (how := kinds.pop()) is not None:
        return unpack(tensors, odd), how, []
    note = "its layers are quantized in several ways; it is written unquantized: -q quantizes it"
    return unpack(tensors, packed), None, [note]
