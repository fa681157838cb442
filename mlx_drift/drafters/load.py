"""Loads a converted drafter and binds it to a target."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_drift.drafters.config import Eagle3Config, check_target, read_config
from mlx_drift.drafters.eagle3 import Eagle3Drafter, Eagle3Network
from mlx_drift.errors import DriftError
from mlx_drift.hub import resolve
from mlx_drift.target import Target
from mlx_drift.tensors import read_safetensors

WEIGHTS = "model.safetensors"


def load_drafter(
    path_or_hf_repo: str, model: nn.Module, *, revision: str | None = None
) -> Eagle3Drafter:
    """Loads a converted drafter and binds it to a target.

    All weights are evaluated and cast to the dtype of the target's activations, so the drafter may
    be used from any thread and shared between conversations.

    Args:
        path_or_hf_repo: A folder that `convert_drafter` wrote, or a Hub repository of that form.
        model: The target, as `mlx_lm.load` returns it.
        revision: Branch, tag or commit on the Hub.

    Raises:
        DriftError: If the drafter is missing, damaged, not converted, or made for another target.
    """
    folder = resolve(path_or_hf_repo, "drafter", revision, ["config.json", WEIGHTS])
    config = read_config(folder)
    target = Target(model)
    check_target(config, target.shape, str(folder))

    weights = read_safetensors(folder / WEIGHTS)
    d2t = weights.pop("d2t", None)
    network = build_network(config, weights, folder / WEIGHTS)
    network.set_dtype(target.dtype)
    mx.eval(network)
    return Eagle3Drafter(config, network, target, target_ids(config, d2t, folder / WEIGHTS))


def build_network(config: Eagle3Config, weights: dict[str, mx.array], path: Path) -> Eagle3Network:
    """Builds the network a config describes and gives it its weights, strictly.

    Raises:
        DriftError: Naming the first tensor that is missing, unknown or of another shape.
    """
    try:
        network = Eagle3Network(config)
        if (q := config.quantization) is not None:
            quantize_linears(network, q.group_size, q.bits, q.mode)
    except KeyError as error:
        where = path.parent / "config.json"
        raise DriftError(f"{where}: rope_scaling lacks the key {error}") from None
    except (ValueError, TypeError, ArithmeticError, AssertionError) as error:
        where = path.parent / "config.json"
        raise DriftError(f"{where}: no network can be built from it ({error})") from None
    expected = dict(tree_flatten(network.parameters()))
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise DriftError(f"{path} lacks the tensor {name}, which its config asks for")
        if name not in expected:
            raise DriftError(f"{path} has the tensor {name}, for which its config has no place")
        if weights[name].shape != expected[name].shape:
            raise DriftError(
                f"{path}: {name} has shape {weights[name].shape}, "
                f"its config asks for {expected[name].shape}"
            )
    network.load_weights(list(weights.items()))
    return network


def quantize_linears(
    network: Eagle3Network, group_size: int | None, bits: int | None, mode: str
) -> None:
    """Quantizes the linear layers in place; norms and embedding stay as they are.

    Group size and bits are mlx's defaults for the mode where they are None.
    """

    def is_linear(path: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    nn.quantize(network, group_size, bits, mode=mode, class_predicate=is_linear)


def target_ids(config: Eagle3Config, d2t: mx.array | None, path: Path) -> mx.array | None:
    """Turns `d2t` offsets into the target token id of each draft token id.

    Args:
        config: The drafter's config.
        d2t: Offsets `[D]`: target id = draft id + offset, as every trainer writes them.
        path: The file they came from, for the message.

    Returns:
        `[D]` int32, or None if the vocabularies are the same.

    Raises:
        DriftError: If there is none where one is needed, or an id lies outside the vocabulary.
    """
    if d2t is None:
        if config.draft_vocab_size != config.target.vocab_size:
            raise DriftError(
                f"{path} lacks d2t, but the drafter's vocabulary ({config.draft_vocab_size}) is "
                f"not the target's ({config.target.vocab_size})"
            )
        return None
    if d2t.shape != (config.draft_vocab_size,):
        raise DriftError(
            f"{path}: d2t has shape {d2t.shape}, expected ({config.draft_vocab_size},)"
        )
    ids = d2t.astype(mx.int64) + mx.arange(config.draft_vocab_size)
    if mx.any(ids < 0).item() or mx.any(ids >= config.target.vocab_size).item():
        raise DriftError(
            f"{path}: d2t maps outside the target's vocabulary of {config.target.vocab_size}"
        )
    ids = ids.astype(mx.int32)
    mx.eval(ids)
    return ids
