"""Loads a converted drafter and binds it to a target."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.config import check_target, pads, read_config
from mlx_drift.drafters.dflash import DFlashDrafter, DFlashNetwork
from mlx_drift.drafters.dspark import DSparkDrafter, DSparkNetwork
from mlx_drift.drafters.eagle import EagleNetwork
from mlx_drift.drafters.eagle3 import Eagle3Network
from mlx_drift.drafters.eagle4 import Eagle4Drafter, Eagle4Network
from mlx_drift.drafters.fold import fold
from mlx_drift.drafters.head import HeadDrafter
from mlx_drift.drafters.hydra import (
    HydraDrafter,
    HydraNetwork,
    HydraPrefixDrafter,
    HydraPrefixNetwork,
)
from mlx_drift.drafters.medusa import MedusaDrafter, MedusaNetwork
from mlx_drift.drafters.mtp import MTPNetwork
from mlx_drift.drafters.p_eagle import PEagleDrafter, PEagleNetwork
from mlx_drift.drafters.schema import DrafterConfig
from mlx_drift.errors import DriftError
from mlx_drift.files.paths import inside
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.target.model import Target

WEIGHTS = "model.safetensors"

KINDS: dict[str, tuple[Any, Any]] = {
    "eagle3": (Eagle3Network, ChainDrafter),
    "eagle4": (Eagle4Network, Eagle4Drafter),
    "p-eagle": (PEagleNetwork, PEagleDrafter),
    "dflash": (DFlashNetwork, DFlashDrafter),
    "dspark": (DSparkNetwork, DSparkDrafter),
    "eagle": (EagleNetwork, ChainDrafter),
    "mtp": (MTPNetwork, ChainDrafter),
    "medusa": (MedusaNetwork, MedusaDrafter),
    "hydra": (HydraNetwork, HydraDrafter),
    "hydra-prefix": (HydraPrefixNetwork, HydraPrefixDrafter),
}
"""The network and the drafter of each kind."""


class ArrayLike(Protocol):
    """An array, or a tensor that is still in its file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis."""

    @property
    def dtype(self) -> mx.Dtype:
        """The type of its elements."""


def load_converted(folder: Path, model: nn.Module, bits: int | None = None) -> HeadDrafter:
    """Loads a converted drafter from its folder and binds it to a target.

    All weights are cast to the dtype of the target's activations, folded and packed
    (`mlx_drift.drafters.fold`) and evaluated, so the drafter may be used from any thread and shared
    between conversations.

    Args:
        folder: A folder that `convert_drafter` wrote.
        model: The target, as `mlx_lm.load` returns it.
        bits: Quantize the linear layers to so many bits; None leaves them as they are.

    Raises:
        DriftError: If the drafter is missing, damaged, not converted, or made for another target,
            or cannot be quantized so.
    """
    for name in ("config.json", WEIGHTS):
        inside(folder, name)
    config = read_config(folder)
    target = Target(model)
    check_target(config, target.shape, str(folder))
    weights = read_safetensors(folder / WEIGHTS)
    d2t = weights.pop("d2t", None)
    network = load_network(config, weights, folder / WEIGHTS)
    cast(network, target.dtype)
    fold(network)
    if bits is not None:
        if config.quantization is not None:
            raise DriftError(
                f"{folder} is quantized to {config.quantization.bits} bits already; leave "
                "drafter_bits out, or convert it again with other --q-bits"
            )
        try:
            quantize_linears(network, None, bits, "affine")
        except ValueError as error:
            raise DriftError(f"{folder}: cannot be quantized to {bits} bits ({error})") from None
    elif config.quantization is None:
        quantize_like_the_head(network, target)
    mx.eval(network)
    return build_drafter(config, network, target, target_ids(config, d2t, folder / WEIGHTS))


def load_network(config: DrafterConfig, weights: dict[str, mx.array], path: Path) -> Any:
    """Builds the network a config describes and gives it its weights, strictly.

    Raises:
        DriftError: Naming the first tensor that is missing, unknown or of another shape.
    """
    network = build_network(config, path)
    check_tensors(network, weights, path)
    network.load_weights(list(weights.items()))
    return network


def build_drafter(
    config: DrafterConfig, network: Any, target: Target, d2t: mx.array | None
) -> HeadDrafter:
    """Binds a network to a target, as the drafter of its kind.

    Args:
        config: The drafter's config.
        network: Its weights.
        target: What it drafts for.
        d2t: Target token id of each draft token id, `[D]` int32; None if they are the same.
    """
    _, drafter = KINDS[config.drafter_type]
    return drafter(config, network, target, d2t)


def build_network(config: DrafterConfig, path: Path) -> Any:
    """Builds the network a config describes; nothing is evaluated, so it takes no memory.

    Raises:
        DriftError: If the config describes none.
    """
    where = path.parent / "config.json"
    try:
        build, _ = KINDS[config.drafter_type]
        network = build(config)
        if (q := config.quantization) is not None:
            quantize_linears(network, q.group_size, q.bits, q.mode)
        network.try_row()  # lazily: not only built
    except KeyError as error:
        raise DriftError(f"{where}: rope_scaling lacks the key {error}") from None
    except (
        *(ValueError, TypeError, ArithmeticError, AssertionError),
        *(AttributeError, IndexError, RuntimeError),  # a model file meets what is no RoPE, say
    ) as error:
        raise DriftError(f"{where}: no network can be built from it ({error})") from None
    mx.eval(mx.random.state)  # layers draw their first weights: a lazy chain of keys, growing
    return network


def _is_float(dtype: mx.Dtype) -> bool:
    return mx.issubdtype(dtype, mx.floating)


def check_tensors(network: nn.Module, tensors: Mapping[str, ArrayLike], path: Path) -> None:
    """Checks that the tensors of a file are those of a network.

    Raises:
        DriftError: Naming the first tensor that is missing, unknown, of another shape, or of
            another dtype where one of them is no float.
    """
    expected = dict(tree_flatten(network.parameters()))
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise DriftError(f"{path} lacks the tensor {name}, which its config asks for")
        if name not in expected:
            raise DriftError(f"{path} has the tensor {name}, for which its config has no place")
        if tensors[name].shape != expected[name].shape:
            raise DriftError(
                f"{path}: {name} has shape {tensors[name].shape}, "
                f"its config asks for {expected[name].shape}"
            )
        found, asked = tensors[name].dtype, expected[name].dtype
        if found != asked and not (_is_float(found) and _is_float(asked)):
            raise DriftError(
                f"{path}: {name} is of the dtype {found}, its config asks for "
                f"{'floats' if _is_float(asked) else asked}"
            )


def quantize_linears(
    network: nn.Module, group_size: int | None, bits: int | None, mode: str
) -> None:
    """Quantizes the linear layers in place, of experts too; norms and embedding stay as they are.

    So does what a network names as `unquantized`. Group size and bits are mlx's defaults for the
    mode where they are None.

    Raises:
        ValueError: If they are none that mlx has, or do not fit a layer, which is named.
    """
    for number in (group_size, bits):
        if number is not None and not 1 <= number <= 1024:  # mlx divides by them before it checks
            raise ValueError(f"group size {group_size} and {bits} bits are none that mlx has")

    wanted = linear_layers(network, kept=False)
    size = _group_size(group_size, bits, mode)
    for name, width in wanted.items():
        if width % size:
            raise ValueError(
                f"a row of {name} has {width} values, which a group size of {size} does not divide"
            )
    nn.quantize(
        network,
        group_size,
        bits,
        mode=mode,
        class_predicate=lambda path, module: path in wanted and hasattr(module, "to_quantized"),
    )


def _group_size(group_size: int | None, bits: int | None, mode: str) -> int:
    """Returns the weights that share a scale, by trying it on a row that any number divides.

    Raises:
        ValueError: If there is no such quantization.
    """
    width = 32 * (group_size or 32)
    _, scales, *_ = mx.quantize(mx.zeros((1, width)), group_size, bits, mode=mode)
    return width // int(scales.shape[-1])


def quantize_like_the_head(network: nn.Module, target: Target) -> None:
    """Quantizes what a network names as `over_vocabulary`, if the target's own head is.

    A layer over the vocabulary is as large as that head, and there may be several: unquantized they
    would be read for longer than the whole target. Left as they are where their rows do not fit.
    """
    name, how = getattr(network, "over_vocabulary", None), target.head_quantization
    if name is None or how is None:
        return
    group_size, bits, mode = how
    nn.quantize(
        network,
        group_size,
        bits,
        mode=mode,
        class_predicate=lambda path, module: (
            path.rpartition(".")[2] == name and module.weight.shape[-1] % group_size == 0
        ),
    )


def linear_layers(network: nn.Module, kept: bool = True) -> dict[str, int]:
    """Returns how wide the rows of a network's linear layers are, by name.

    Args:
        network: The network, not quantized.
        kept: With those that stay as they are when it is quantized.
    """
    left_out = () if kept else getattr(network, "unquantized", ())
    return {
        name: module.weight.shape[-1]
        for name, module in network.named_modules()
        if hasattr(module, "to_quantized")
        and not isinstance(module, nn.Embedding)
        and name.rpartition(".")[2] not in left_out
    }


def cast(network: nn.Module, dtype: mx.Dtype) -> None:
    """Casts all floats but those that need float32 wherever they are."""

    def casted(path: str, value: mx.array) -> mx.array:
        return value.astype(dtype) if _is_float(value.dtype) and not needs_float32(path) else value

    network.update(tree_map_with_path(casted, network.parameters()))


def needs_float32(name: str) -> bool:
    """Tells whether a tensor is rounded to nothing in 16 bits: a router's small corrections are.

    DeepSeek's and GLM's are added to scores near each other; mlx-lm leaves them float32, too.
    """
    return name.endswith("e_score_correction_bias")


def quantized_layers(network: nn.Module) -> set[str]:
    """Returns the names of a network's quantized layers."""
    return {name for name, module in network.named_modules() if "scales" in module}


def target_ids(config: DrafterConfig, d2t: mx.array | None, path: Path) -> mx.array | None:
    """Turns `d2t` offsets into the target token id of each draft token id.

    Args:
        config: The drafter's config.
        d2t: Offsets `[D]`: target id = draft id + offset, as every trainer writes them.
        path: The file they came from, for the message.

    Returns:
        `[D]` int32, or None if the vocabularies are the same.

    Raises:
        DriftError: If there is none where one is needed, or an id is there twice or lies outside
            the vocabulary.
    """
    vocab = config.target.vocab_size
    rows = getattr(config, "draft_vocab_size", vocab)
    if d2t is None:
        if rows != vocab and not pads(rows, vocab):
            raise DriftError(
                f"{path} lacks d2t, but the drafter's vocabulary ({rows}) is not the target's "
                f"({vocab})"
            )
        return None
    if d2t.shape != (rows,):
        raise DriftError(f"{path}: d2t has shape {d2t.shape}, expected ({rows},)")
    ids = d2t.astype(mx.int64) + mx.arange(rows)
    if mx.any(ids < 0).item() or mx.any(ids >= vocab).item():
        raise DriftError(f"{path}: d2t maps outside the target's vocabulary of {vocab}")
    if np.unique(np.array(ids)).size != rows:
        raise DriftError(f"{path}: d2t maps two draft ids to one token of the target")
    ids = ids.astype(mx.int32)
    mx.eval(ids)
    return ids
