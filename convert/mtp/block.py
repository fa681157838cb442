"""A block's tensors as mlx-lm's model files have them, from what the families' files have.

What the model files' own `sanitize` does for the layers that mlx-lm keeps: fp8 is scaled, experts
are stacked, `kv_b_proj` is split. It is done row by row, when the rows are read.
"""

import re
from typing import Any

from mlx_drift.convert.derive import FP8_BLOCK, heads_of, middle, scaled_by_blocks, stack
from mlx_drift.convert.dialects.refused import FP8, UNQUANTIZED
from mlx_drift.convert.read.stored import StoredTensor
from mlx_drift.errors import DriftError, brief, printable

Tensors = dict[str, StoredTensor]

EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)\.(\w+)")
STACKED = re.compile(r"(.*\.mlp)\.((?:gate|up|down)_proj\.\w+)")
ATTENTION, EXPERTS = "layers.0.self_attn", "layers.0.mlp.switch_mlp.up_proj.weight"
MAX_EXPERTS = 4096


def size(config: dict[str, Any], key: str, where: str) -> int:
    """Reads a positive whole number.

    Raises:
        DriftError: If it is missing or something else.
    """
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise DriftError(f"{where}: {key} is {brief(value)}; expected a positive whole number")
    return value


def quantized(where: str, kind: str) -> DriftError:
    """Says that a head is quantized to what is not run."""
    return DriftError(
        f"{where} holds a quantized MTP head ({kind}), which mlx-drift does not run. {UNQUANTIZED}"
    )


def scale_blocks(tensors: Tensors, where: str) -> Tensors:
    """Multiplies fp8 weights with the scales of their blocks."""
    scaled = dict(tensors)
    for name in tensors:
        if name.endswith("_scale_inv"):
            weight, scales = tensors.get(name.removesuffix("_scale_inv")), scaled.pop(name)
            blocks = weight and tuple(-(-n // FP8_BLOCK) for n in weight.shape)
            if weight is not None and blocks != scales.shape and scales.size == 1:
                raise quantized(where, FP8)
            if weight is None or blocks != scales.shape:
                raise DriftError(
                    f"{where}: {name} has shape {scales.shape}; expected one scale for each block "
                    f"of 128 × 128 of its weight, {blocks}"
                )
            scaled[name.removesuffix("_scale_inv")] = scaled_by_blocks(weight, scales)
    return scaled


def stack_experts(tensors: Tensors, where: str) -> Tensors:
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


def split_experts(tensors: Tensors) -> Tensors:
    """Splits experts that transformers 5 fuses, `gate_up_proj` `[E, 2·I, H]` and `down_proj`.

    Those that vllm-mlx stacked under the names of a dense layer get the names of experts.
    """
    split: Tensors = {}
    for name, tensor in tensors.items():
        mlp, found, part = name.partition(".experts.")
        if tensor.ndim == 3 and (match := STACKED.fullmatch(name)):
            split["{}.switch_mlp.{}".format(*match.groups())] = tensor
        elif not found or tensor.ndim != 3:
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


def split_latent(tensors: Tensors, config: dict[str, Any], where: str) -> Tensors:
    """Splits `kv_b_proj` of latent attention into what mlx-lm absorbs into queries and outputs."""
    name = f"{ATTENTION}.kv_b_proj.weight"
    if name not in tensors:
        return tensors
    keys = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")
    heads, nope, value = (size(config, key, where) for key in keys)
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
