"""Understands the checkpoint of an MTP head: its tensors as mlx-lm's block wants them, its config.

What the files of a family hold in another form than mlx-lm's model files is turned over as the
model files' own `sanitize` does it for the layers that mlx-lm keeps: experts are stacked, fp8 is
scaled, `kv_b_proj` is split, zero-centred norms get their 1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_drift.convert.derive import (
    dequantized,
    heads_of,
    middle,
    packing,
    plus_one,
    scaled_by_blocks,
    stack,
)
from mlx_drift.convert.layers import Overrides
from mlx_drift.convert.mtp_layouts import ZERO_CENTRED, find_layout, modules_of, text_config
from mlx_drift.convert.resolved import Resolved
from mlx_drift.convert.source import Checkpoint
from mlx_drift.convert.stored import StoredTensor, to_mlx
from mlx_drift.drafters.block import block_keys
from mlx_drift.drafters.config import FORMAT_VERSION, Quantization, config_from_dict
from mlx_drift.drafters.load import build_network, quantized_layers
from mlx_drift.errors import DriftError, brief, printable

Tensors = dict[str, StoredTensor]

NORMS = (
    "embedding_norm hidden_norm norm layers.0.input_layernorm layers.0.post_attention_layernorm "
    "layers.0.self_attn.q_norm layers.0.self_attn.k_norm"
).split()
EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)\.(\w+)")
ATTENTION, EXPERTS = "layers.0.self_attn", "layers.0.mlp.switch_mlp.up_proj.weight"
MAX_EXPERTS = 4096


def understand_mtp(checkpoint: Checkpoint, overrides: Overrides) -> Resolved:
    """Resolves an MTP head's tensors and every convention.

    Args:
        checkpoint: What was read, the head's own tensors alone.
        overrides: The user's choices.

    Raises:
        DriftError: If anything is missing, left over or contradictory.
    """
    weights, config_file = checkpoint.weights, checkpoint.config_file
    if overrides.rope_theta is not None:
        raise DriftError(
            f"{weights} is an MTP head, whose block takes RoPE from the target: leave "
            "--rope-theta out"
        )
    layout, family = find_layout(checkpoint.config, config_file)
    modules = modules_of(layout, checkpoint.config, checkpoint.tensors)
    if len(modules) != 1:
        raise DriftError(
            f"{weights} holds {len(modules)} MTP modules, to be run one after another; this "
            "version runs heads of one module"
        )
    names = next(iter(modules.values()))
    tensors = {ours: checkpoint.tensors[theirs] for ours, theirs in names.items()}
    config = text_config(checkpoint.config)
    sizes = {key: _size(config, key, config_file) for key in SIZES}
    notes: list[str] = []
    quantization = _read_quantization(checkpoint.config, tensors, weights)
    if quantization is not None and _needs_floats(tensors):
        tensors, quantization = _unpack(tensors, checkpoint.config, quantization), None
    tensors = _scale(tensors, weights)
    tensors = _stack_experts(tensors, weights)
    tensors = _split_experts(tensors)
    tensors = _split_latent(tensors, config, config_file)
    if family in ZERO_CENTRED:
        tensors, told = _centre_norms(tensors, weights)
        notes += told

    provenance: dict[str, str] = {}
    layers = sizes["num_hidden_layers"]
    after_norm = overrides.taps != "output"
    provenance["taps"] = _said(
        overrides, "taps", "rule: the state that the target's head reads, as vLLM and SGLang feed"
    )
    said = checkpoint.config.get("mtp_feedback")
    feedback = overrides.feedback or (said if said in ("pre", "post") else "post")
    provenance["feedback"] = _said(
        overrides,
        "feedback",
        "file" if said == feedback else "rule: the normed state, as vLLM and SGLang recycle",
    )
    fields: dict[str, Any] = {
        "drafter_type": "mtp",
        "format_version": FORMAT_VERSION,
        "taps": [layers + after_norm],
        "feedback": feedback,
        "hidden_first": layout.hidden_first,
        "hidden_size": sizes["hidden_size"],
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": sizes["max_position_embeddings"],
        "sliding_window": overrides.window or None,
        "block": block_keys(
            family, _flat(config), "layers.0.mlp.switch_mlp.up_proj.weight" in tensors
        ),
        "own_embedding": "embed_tokens.weight" in tensors,
        "own_head": "lm_head.weight" in tensors,
        "target": {
            "hidden_size": sizes["hidden_size"],
            "vocab_size": sizes["vocab_size"],
            "num_layers": layers,
        },
    }
    provenance["hidden_first"] = f"rule: {layout.name}"
    provenance |= dict.fromkeys(("hidden_size", "rms_norm_eps", "block"), "file")
    if quantization is not None:
        kept = _uniform(fields, tensors, checkpoint.config, quantization)
        if kept is None:
            tensors = _unpack(tensors, checkpoint.config, quantization)
            notes.append(
                "its layers are quantized in several ways; it is written unquantized: "
                "-q quantizes it anew"
            )
        else:
            tensors, fields["quantization"] = kept, vars(quantization)
            provenance["quantization"] = "file"
    return Resolved(
        dialect=layout.name,
        config_file=config_file,
        fields=fields,
        provenance=provenance,
        tensors=tensors,
        unknown_keys=[],  # the config is the target's
        notes=notes,
    )


SIZES = "hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"


def _said(overrides: Overrides, name: str, otherwise: str) -> str:
    if getattr(overrides, name) is None:
        return otherwise
    return "probe" if name in overrides.probed else "override"


def _size(config: dict[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise DriftError(f"{where}: {key} is {brief(value)}; expected a positive whole number")
    return value


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Adds the keys of transformers 5's `rope_parameters` where older configs have them."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    lifted = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        lifted["rope_scaling"] = rope
    return lifted | config


def _scale(tensors: Tensors, where: str) -> Tensors:
    """Multiplies fp8 weights with the scales of their blocks."""
    scaled = dict(tensors)
    for name in tensors:
        if name.endswith("_scale_inv"):
            weight, scales = tensors.get(name.removesuffix("_scale_inv")), scaled.pop(name)
            blocks = weight and tuple(-(-n // 128) for n in weight.shape)
            if weight is None or blocks != scales.shape:
                raise DriftError(
                    f"{where}: {name} has shape {scales.shape}; expected one scale for each block "
                    f"of 128 × 128 of its weight, {blocks}"
                )
            scaled[name.removesuffix("_scale_inv")] = scaled_by_blocks(weight, scales)
    return scaled


def _stack_experts(tensors: Tensors, where: str) -> Tensors:
    """Stacks numbered experts as mlx-lm's `SwitchGLU` has them."""
    stacked: Tensors = {}
    numbered: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if match := EXPERT.fullmatch(name):
            mlp, number, part, kind = match.groups()
            numbered.setdefault(f"{mlp}.switch_mlp.{part}.{kind}", {})[int(number)] = tensor
        else:
            stacked[name] = tensor
    for name, experts in numbered.items():
        first = experts[min(experts)]
        if sorted(experts) != list(range(len(experts))) or len(experts) > MAX_EXPERTS:
            raise DriftError(
                f"{where}: the experts of {printable(name)} are not numbered 0 … {len(experts) - 1}"
            )
        for number, expert in experts.items():
            if (expert.shape, expert.stored) != (first.shape, first.stored):
                raise DriftError(
                    f"{where}: expert {number} of {printable(name)} is {expert.stored} "
                    f"{expert.shape}, another {first.stored} {first.shape}"
                )
        stacked[name] = stack([experts[n] for n in range(len(experts))])
    return stacked


def _split_experts(tensors: Tensors) -> Tensors:
    """Splits experts that transformers 5 fuses, `gate_up_proj` `[E, 2·I, H]` and `down_proj`."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        mlp, found, part = name.partition(".experts.")
        if not found or tensor.ndim != 3:
            split[name] = tensor
        elif part.startswith("gate_up_proj"):
            half = tensor.shape[1] // 2
            suffix = part.removeprefix("gate_up_proj") or ".weight"
            split[f"{mlp}.switch_mlp.gate_proj{suffix}"] = middle(tensor, 0, half)
            split[f"{mlp}.switch_mlp.up_proj{suffix}"] = middle(tensor, half, tensor.shape[1])
        else:
            suffix = "" if "." in part else ".weight"
            split[f"{mlp}.switch_mlp.{part}{suffix}"] = tensor
    return split


def _split_latent(tensors: Tensors, config: dict[str, Any], where: str) -> Tensors:
    """Splits `kv_b_proj` of latent attention into what mlx-lm absorbs into queries and outputs."""
    name = f"{ATTENTION}.kv_b_proj.weight"
    if name not in tensors:
        return tensors
    keys = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")
    heads, nope, value = (_size(config, key, where) for key in keys)
    both = tensors[name]
    if both.ndim != 2 or both.shape[0] != heads * (nope + value):
        raise DriftError(
            f"{where}: kv_b_proj has shape {both.shape}; expected {heads * (nope + value)} rows, "
            f"from {', '.join(keys)}"
        )
    split = {other: tensor for other, tensor in tensors.items() if other != name}
    split[f"{ATTENTION}.embed_q.weight"] = heads_of(both, heads, 0, nope, transposed=True)
    split[f"{ATTENTION}.unembed_out.weight"] = heads_of(
        both, heads, nope, nope + value, transposed=False
    )
    return split


def _centre_norms(tensors: Tensors, where: str) -> tuple[Tensors, list[str]]:
    """Adds 1 to gains that PyTorch stores as w of 1 + w, but never to those that have it.

    Which they are a file's own `format` says, `pt` or `mlx`. Some sidecars say it wrongly, and in
    some 1 was added twice to a few norms (youssofal/MTPLX #301), so their means, which training
    leaves near 0 or 1, are looked at too.
    """
    norms = [f"{name}.weight" for name in NORMS]
    norms = [name for name in norms if name in tensors and tensors[name].ndim == 1]
    if not norms:
        return tensors, []
    means = {name: _mean(tensors[name]) for name in norms}
    formats = {tensors[name].file_format for name in norms}
    usual = median(means.values())
    lacking, notes = [name for name in norms if means[name] < 0.5], []
    if formats == {"pt"} and lacking:
        lacking = norms
    elif formats == {"pt"}:
        notes.append(
            f"{where} calls itself a PyTorch file, but all its norms average near 1, so they are "
            "mlx's: nothing was added"
        )
    elif formats == {"mlx"} and lacking:
        notes.append(
            f"{where} calls itself an mlx file, but norms in it are PyTorch's, zero-centred: 1 was "
            f"added to {len(lacking)} of {len(norms)}"
        )
    twice = sorted(name for name in norms if means[name] > min(usual, 1.0) + 0.75)
    if len(twice) < len(norms) and twice and formats != {"pt"}:
        notes.append(
            f"{where}: {', '.join(name.removesuffix('.weight') for name in twice)} average "
            f"{median(means[name] for name in twice):.2f}, the norms all in all {usual:.2f}: 1 "
            "looks added twice. If little is accepted, take the head from the original repository"
        )
    return tensors | {name: plus_one(tensors[name]) for name in lacking}, notes


def _mean(tensor: StoredTensor) -> float:
    blocks = (to_mlx(block, tensor.dtype).astype(mx.float32) for block in tensor.blocks())
    return sum(float(block.sum()) for block in blocks) / max(1, tensor.size)


@dataclass(frozen=True)
class _Packed:
    """A layer that mlx quantized."""

    parts: list[StoredTensor]
    group_size: int
    bits: int
    mode: str


def _packed(tensors: Mapping[str, StoredTensor], config: dict[str, Any]) -> dict[str, _Packed]:
    """Finds the quantized layers; a layer's own entry in the config wins."""
    default = config.get("quantization") or config.get("quantization_config") or {}
    layers = {}
    for name in tensors:
        if not name.endswith(".scales"):
            continue
        layer = name.removesuffix(".scales")
        kinds = ("weight", "scales", "biases")
        parts = [tensors[f"{layer}.{kind}"] for kind in kinds if f"{layer}.{kind}" in tensors]
        entries = (v for k, v in default.items() if str(k).endswith(layer) and isinstance(v, dict))
        own = default | next(entries, {})
        group_size, mode = own.get("group_size", 64), str(own.get("mode", "affine"))
        if type(group_size) is not int or not 1 <= group_size <= 1024 or len(parts) < 2:
            raise DriftError(f"{layer} is quantized with group_size {brief(group_size)}")
        layers[layer] = _Packed(parts, group_size, packing(parts[0], parts[1], group_size), mode)
    return layers


def _read_quantization(config: dict[str, Any], tensors: Tensors, where: str) -> Quantization | None:
    """Returns how most of the layers are quantized; None if none is."""
    try:
        layers = _packed(tensors, config).values()
    except DriftError as error:
        raise DriftError(f"{where}: {error}") from None
    if not layers:
        return None
    kinds = [(layer.group_size, layer.bits, layer.mode) for layer in layers]
    group_size, bits, mode = max(kinds, key=kinds.count)
    return Quantization(group_size=group_size, bits=bits, mode=mode)


def _needs_floats(tensors: Tensors) -> bool:
    """Tells whether a quantized tensor has to be taken apart across its groups."""
    return f"{ATTENTION}.kv_b_proj.scales" in tensors


def _unpack(tensors: Tensors, config: dict[str, Any], quantization: Quantization) -> Tensors:
    """Unpacks all quantized layers."""
    floats = dict(tensors)
    for layer, packed in _packed(tensors, config).items():
        for kind in ("scales", "biases"):
            floats.pop(f"{layer}.{kind}", None)
        floats[f"{layer}.weight"] = dequantized(packed.parts, packed.group_size, packed.mode)
    return floats


def _uniform(
    fields: dict[str, Any], tensors: Tensors, config: dict[str, Any], quantization: Quantization
) -> Tensors | None:
    """Returns the tensors with just those layers packed that a network so quantized has packed.

    What it keeps unquantized (routers, the projection) is unpacked; None if a layer that it has
    packed is not, or otherwise.
    """
    network = build_network(
        config_from_dict(fields | {"quantization": vars(quantization)}), Path("config.json")
    )
    wanted, packed = quantized_layers(network), _packed(tensors, config)
    alike = (quantization.group_size, quantization.bits, quantization.mode)
    if any(
        layer not in packed
        or (packed[layer].group_size, packed[layer].bits, packed[layer].mode) != alike
        for layer in wanted
    ):
        return None
    odd = {name: tensors[f"{name}.weight"] for name in packed.keys() - wanted}
    rest = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in odd}
    loose = {n: t for n, t in tensors.items() if n.rpartition(".")[0] in odd}
    return rest | _unpack(loose, config, quantization)
