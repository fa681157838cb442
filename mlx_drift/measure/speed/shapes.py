"""Pairs of random weights at real models' shapes: what a round costs there needs no checkpoint.

The time of a pass depends on shapes, quantization and device, hardly on values. So a model file of
mlx-lm is built from the numbers of a published config, and its quantized layers get random codes at
once: no weight is ever there unquantized, and the memory it takes is the memory it runs in.

Sources of the numbers: the targets' `config.json` on the Hub; for the heads, the one of
yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, SpecForge's `configs/` (Qwen3-8B, Qwen3-30B-A3B, gpt-oss-20B)
and RedHatAI/gpt-oss-20b-speculator.eagle3 (its vocabulary). For a target without a known head, a
head's layer is taken to be as one of the target's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from mlx_drift.doctor.build import nbytes_of
from mlx_drift.doctor.memory import machine_memory
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.chain_config import Eagle3Config
from mlx_drift.drafters.fold import fold
from mlx_drift.drafters.load import build_network, quantize_linears
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target, TargetShape

GROUP = 64
"""Weights that share a scale, as `mlx_lm.convert` quantizes."""

UNQUANTIZED = 16
"""Bits that stand for none to quantize to."""

BLOCK = 1_000_003
"""Random numbers that are drawn for an array; they repeat, out of step with its rows."""

SPARE = 0.1
"""The share of the memory that is left for activations, and everything else on the machine."""


@dataclass(frozen=True)
class Shape:
    """A real model's sizes, and its head's.

    Attributes:
        config: What mlx-lm's model file needs to know.
        head_intermediate_size: The head's feed-forward size.
        draft_vocab_size: Tokens that the head knows.
    """

    config: dict[str, Any]
    head_intermediate_size: int
    draft_vocab_size: int = 32000


def _dense(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int, int],
    vocab: int,
    **others: Any,
) -> dict[str, Any]:
    """Returns a config; `heads` are those of queries, those of keys and values, and their size."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **others,
    }


QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960}
EXPERTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
SHAPES = {
    "Llama-3.2-1B": Shape(
        _dense("llama", 2048, 8192, 16, (32, 8, 64), 128256, tie_word_embeddings=True), 8192
    ),
    "Llama-3.1-8B": Shape(_dense("llama", 4096, 14336, 32, (32, 8, 128), 128256), 14336),
    "Llama-3.3-70B": Shape(_dense("llama", 8192, 28672, 80, (64, 8, 128), 128256), 28672),
    "Qwen3-4B": Shape(
        _dense("qwen3", 2560, 9728, 36, (32, 8, 128), 151936, tie_word_embeddings=True, **QWEN),
        9728,
    ),
    "Qwen3-8B": Shape(_dense("qwen3", 4096, 12288, 36, (32, 8, 128), 151936, **QWEN), 12288),
    "Qwen3-32B": Shape(_dense("qwen3", 5120, 25600, 64, (64, 8, 128), 151936, **QWEN), 25600),
    "Qwen3-30B-A3B": Shape(
        _dense("qwen3_moe", 2048, 6144, 48, (32, 4, 128), 151936, **QWEN, **EXPERTS), 12288
    ),
    "gpt-oss-20b": Shape(
        _dense(
            "gpt_oss",
            2880,
            2880,
            24,
            (64, 8, 64),
            201088,
            num_local_experts=32,
            num_experts_per_tok=4,
            sliding_window=128,
            rope_theta=150000.0,
        ),
        17280,
        draft_vocab_size=64000,
    ),
}


@dataclass(frozen=True)
class RandomPair:
    """A target and a drafter of random weights.

    Attributes:
        model: The target, as `mlx_lm.load` would return it.
        drafter: An EAGLE-3.1 drafter for it.
        layers: The target's layers.
        target_bytes: Of the target's weights.
        drafter_bytes: Of the drafter's.
    """

    model: nn.Module
    drafter: ChainDrafter
    layers: int
    target_bytes: int
    drafter_bytes: int


def random_pair(
    name: str,
    *,
    layers: int | None = None,
    bits: int = 4,
    drafter_bits: int | None = None,
    dtype: mx.Dtype = mx.bfloat16,
    context: int = 0,
) -> RandomPair:
    """Builds a pair of random weights at a real model's shapes.

    Args:
        name: One of `SHAPES`.
        layers: Of the target, so that it fits; None for as many as the model has.
        bits: To quantize the target to; 16 for not at all.
        drafter_bits: To quantize the drafter to; None for not at all.
        dtype: Of all floats, hence of the activations.
        context: Tokens that are to fit in the caches.

    Raises:
        DriftError: If the name is unknown, a number is out of range, or the memory is too small.
    """
    if name not in SHAPES:
        raise DriftError(f"the shape {name} is unknown; there are {', '.join(SHAPES)}")
    shape = SHAPES[name]
    most = shape.config["num_hidden_layers"]
    layers = most if layers is None else layers
    if not 2 <= layers <= most:
        raise DriftError(f"layers is {layers}; {name} has {most}, expected 2 to {most}")
    model = _build_model(shape.config | {"num_hidden_layers": layers}, bits, dtype)
    config = _head_config(shape, layers)
    network = build_network(config, Path(name, "head"))
    network.set_dtype(dtype)
    fold(network)
    if drafter_bits is not None:
        try:
            quantize_linears(network, None, drafter_bits, "affine")
        except ValueError as error:
            raise DriftError(
                f"the drafter cannot be quantized to {drafter_bits} bits ({error})"
            ) from None
    sizes = nbytes_of(model), nbytes_of(network)
    _check_memory(name, sum(sizes) + _cache_bytes(shape.config, layers, dtype) * context)
    _randomize(model)
    _randomize(network)
    target_ids = mx.arange(config.draft_vocab_size, dtype=mx.int32)
    drafter = ChainDrafter(config, network, Target(model, config.taps), target_ids)
    return RandomPair(model, drafter, layers, *sizes)


def _build_model(config: dict[str, Any], bits: int, dtype: mx.Dtype) -> nn.Module:
    """Builds a target, lazily: it takes no memory yet."""
    model_class, arguments_class = _get_classes(config)
    model: nn.Module = model_class(arguments_class.from_dict(config))
    model.set_dtype(dtype)
    if bits != UNQUANTIZED:
        chosen = getattr(model, "quant_predicate", None) or (lambda path, module: True)

        def is_quantized(path: str, module: nn.Module) -> bool | dict[str, Any]:
            fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP == 0
            return fits and chosen(path, module)

        try:
            nn.quantize(model, GROUP, bits, class_predicate=is_quantized)
        except ValueError as error:
            raise DriftError(f"the target cannot be quantized to {bits} bits ({error})") from None
    mx.eval(mx.random.state)  # layers draw their first weights: a lazy chain of keys, growing
    return model


def _head_config(shape: Shape, layers: int) -> Eagle3Config:
    """Describes the usual head of a target: one layer, three taps (SafeAILab's, paper §2)."""
    config = shape.config
    inner = (2, layers // 2, layers - 3) if layers >= 8 else (layers - 1, layers, layers + 1)
    return Eagle3Config(
        taps=inner,
        hidden_size=config["hidden_size"],
        intermediate_size=shape.head_intermediate_size,
        num_layers=1,
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=config["rope_theta"],
        max_position_embeddings=2048,
        target=TargetShape(
            hidden_size=config["hidden_size"], vocab_size=config["vocab_size"], num_layers=layers
        ),
        feedback="post",
        fc_norm=True,
        norm_before_fc=False,
        norm_before_residual=True,
        draft_vocab_size=shape.draft_vocab_size,
    )


def _cache_bytes(config: dict[str, Any], layers: int, dtype: mx.Dtype) -> int:
    """Returns the bytes of a token's keys and values, at most: windows hold less."""
    values = 2 * config["num_key_value_heads"] * config["head_dim"]
    return int((layers + 1) * values * dtype.size)


def _check_memory(name: str, needed: int) -> None:
    available = int(machine_memory() * (1 - SPARE))
    if needed > available:
        raise DriftError(
            f"a pair of {name}'s shapes takes {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB "
            "are there for it; give fewer --layers or --target-bits, or a smaller --context"
        )


def _randomize(module: nn.Module) -> None:
    """Gives a module random weights of a trained one's size, an array at a time."""
    arrays = dict(tree_flatten(module.parameters()))
    for number, (name, array) in enumerate(_filled(arrays)):
        mx.eval(array)
        module.update(tree_unflatten([(name, array)]))
        if number % 64 == 0:
            mx.clear_cache()


def _filled(arrays: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """Yields an array of random values, or of constants, for each that a module has."""
    for number, (name, array) in enumerate(arrays.items()):
        shape, dtype, key = array.shape, array.dtype, mx.random.key(number)
        part, _, kind = name.rpartition(".")
        quantized = arrays.get(f"{part}.scales")
        if quantized is not None and kind in ("weight", "scales", "biases"):
            width = quantized.shape[-1] * GROUP
            codes = 1 << arrays[f"{part}.weight"].shape[-1] * 32 // width
            scale = (12 / width) ** 0.5 / (codes - 1)  # of uniform values of variance 1 / width
            if kind == "weight":
                drawn = mx.random.randint(0, 0xFFFFFFFF, (BLOCK,), mx.uint32, key=key)
                yield name, _repeat(drawn, shape)
            else:
                value = scale if kind == "scales" else -scale * (codes - 1) / 2
                yield name, mx.full(shape, value, dtype)
        elif array.ndim > 1:
            drawn = mx.random.normal((BLOCK,), dtype, scale=shape[-1] ** -0.5, key=key)
            yield name, _repeat(drawn, shape)
        else:
            yield name, mx.ones(shape, dtype) if kind == "weight" else mx.zeros(shape, dtype)


def _repeat(values: mx.array, shape: tuple[int, ...]) -> mx.array:
    size = math.prod(shape)
    return mx.tile(values, -(-size // values.size))[:size].reshape(shape)
