"""Builds a target as mlx-lm does, lazily: with shapes and dtypes, and without memory.

Of weights on this machine the headers are read, by mlx-lm itself; of those on the Hub the sizes. A
config is data of strangers: what would make a model file loop for minutes, or MLX divide by zero,
is refused before anything is built.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes, load_model

from mlx_drift.convert.convert import DTYPES
from mlx_drift.doctor.diagnosis import Source
from mlx_drift.errors import DriftError, brief
from mlx_drift.files.hub import find_hub_folder, is_repository, resolve
from mlx_drift.files.paths import existing
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.target.load import code_on_trust

WEIGHTS = "model*.safetensors"
"""The files that mlx-lm loads."""

COUNTED = re.compile(
    r"(layers?|loops?|iters|experts?|per_tok(en)?|heads?|groups?|inputs|(neighbor|split)_num)$"
)
MAX_COUNTED = 2048
"""Keys of what model files loop over; and how often at most, also through a list or a pattern."""

DIVISORS = ("kv_heads", "key_value_heads", "group_norm_size")
"""Keys of what MLX divides by before it looks, which would end the process."""

COMPUTES = {"dbrx": "it picks its experts on the CPU while it is fed"}
"""Model files that compute before anything is asked of them, so that nothing lazy can be told."""


@dataclass(frozen=True)
class Place:
    """Where a target is.

    Attributes:
        name: As it was named.
        folder: It holds the config.
        weights: The bytes of each of its files of weights.
        here: Whether these are in the folder, and there are any.
    """

    name: str
    folder: Path
    weights: dict[str, int]
    here: bool


def find_model(model: str) -> Place:
    """Finds a target, downloading its config at most.

    Raises:
        DriftError: If there is none.
    """
    if existing(model) is not None or not is_repository(model):
        folder = resolve(model, "model", None, ["config.json"])
        try:
            weights = {path.name: path.stat().st_size for path in sorted(folder.glob(WEIGHTS))}
        except OSError as error:
            raise DriftError(f"{folder}: cannot be read ({error.strerror})") from None
        return Place(model, folder, weights, bool(weights))
    repository = find_hub_folder(model, None, "model")
    folder = repository.path("config.json").parent
    names = sorted(name for name in repository.files if fnmatch(name, WEIGHTS))
    with ThreadPoolExecutor(8) as pool:  # one request for each file
        weights = dict(zip(names, pool.map(repository.size, names), strict=True))
    here = bool(names) and all((folder / name).is_file() for name in names)
    return Place(model, folder, weights, here)


def check_config(config: dict[str, Any], where: Path) -> None:
    """Checks what must be sound before a model is built.

    Raises:
        DriftError: Naming what is not.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise DriftError(
            f"{where} is not the config of a target: model_type is {brief(model_type)}, expected "
            "the name of a family of mlx-lm"
        )
    if model_type in COMPUTES:
        raise DriftError(
            f"{where}: a model of the type {model_type} cannot be looked at without its weights: "
            f"{COMPUTES[model_type]}. Only a run tells"
        )
    for key, value in _entries(config):
        least = 1 if key.endswith(DIVISORS) else None
        most = MAX_COUNTED if COUNTED.search(key) else None
        for number in value if isinstance(value, list) else [value]:
            _check_number(key, number, least, most, where)
        if isinstance(value, list | str) and len(value) > MAX_COUNTED:
            raise DriftError(
                f"{where}: {key[:80]} has a length of {len(value)}; expected at most {MAX_COUNTED}"
            )
    for quantization in (config.get("quantization"), config.get("quantization_config")):
        if isinstance(quantization, dict):
            for values in (quantization, *quantization.values()):
                for key in ("bits", "group_size") if isinstance(values, dict) else ():
                    _check_number(key, values.get(key), 1, 1024, where)  # divisors too


def _check_number(key: str, value: Any, least: int | None, most: int | None, where: Path) -> None:
    """Checks that a value is in bounds, if it is a whole number."""
    if type(value) is not int:
        return
    if (least is not None and value < least) or (most is not None and value > most):
        expected = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * bool(most)
        raise DriftError(
            f"{where}: {key[:80]} is {brief(value)}; expected {' and '.join(expected)}"
        )


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the keys of a config, and of the objects in it, that model files may read."""
    for key, value in config.items():
        if key.startswith(("vision", "audio", "quantization")):
            continue
        yield key, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _entries(inner)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts back the state of MLX's random numbers: layers draw their first weights."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def build_model(
    place: Place, config: dict[str, Any], trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Builds a target as `mlx_lm.load` does, and leaves it lazy.

    Returns:
        It, and the config as mlx-lm completes it.

    Raises:
        DriftError: If mlx-lm cannot, or it would run code that is not trusted.
    """
    for name in place.weights if place.here else ():
        read_safetensors(place.folder / name)  # the header: mlx-lm trusts it
    try:
        with code_on_trust(place.name):
            if place.here:
                return load_model(place.folder, lazy=True, trust_remote_code=trust_remote_code)
            network, loaded = load_model(
                place.folder,
                lazy=True,
                strict=False,
                get_model_classes=_classes_without_weights,
                trust_remote_code=trust_remote_code,
            )
        if isinstance(config.get("quantization"), dict):
            _quantize(network, config["quantization"])
        return network, loaded
    except DriftError:
        raise
    except Exception as error:  # whatever a strange config makes mlx-lm or a model file raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise DriftError(f"{place.name}: mlx-lm cannot load it ({reason})") from error


def _classes_without_weights(config: dict[str, Any]) -> tuple[Callable[[Any], nn.Module], Any]:
    """Chooses the classes of a model as mlx-lm does, for one that gets no weights.

    Its parameters have the dtype that the config names, as `mlx_lm.convert` casts them.
    """
    model_class, arguments_class = _get_classes(config)
    dtype = named_dtype(config) or mx.bfloat16

    def build(arguments: Any) -> nn.Module:
        model = model_class(arguments)
        casts = getattr(model, "cast_predicate", lambda path: True)

        def cast(path: str, value: mx.array) -> mx.array:
            is_cast = mx.issubdtype(value.dtype, mx.floating) and casts(path)
            return value.astype(dtype) if is_cast else value

        model.update(tree_map_with_path(cast, model.parameters()))
        model.sanitize = lambda weights: weights  # some miss what is not there
        return model

    return build, arguments_class


def named_dtype(config: dict[str, Any]) -> mx.Dtype | None:
    """Returns the dtype that a config names for the weights, if it is one that mlx-lm casts to."""
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        for key in ("torch_dtype", "dtype"):
            if isinstance(name := values.get(key), str) and name in DTYPES:
                return DTYPES[name]
    return None


def _quantize(network: nn.Module, quantization: dict[str, Any]) -> None:
    """Quantizes what `mlx_lm.convert` does; what the config names was quantized by mlx-lm."""
    group_size, bits = quantization["group_size"], quantization["bits"]
    chosen = getattr(network, "quant_predicate", None) or (lambda path, module: True)

    def is_quantized(path: str, module: nn.Module) -> bool:
        return (
            hasattr(module, "to_quantized")
            and module.weight.shape[-1] % group_size == 0
            and quantization.get(path, True) is not False
            and chosen(path, module) is not False
        )

    mode = quantization.get("mode", "affine")
    nn.quantize(network, group_size, bits, mode=mode, class_predicate=is_quantized)


def weights_of(
    place: Place, network: nn.Module, loaded: dict[str, Any]
) -> tuple[int | None, Source | None]:
    """Returns the bytes of a target's weights, and what tells them; None where nothing does.

    A config alone tells if the weights are not quantized, or were by mlx-lm, which says how.
    """
    if place.here:
        return nbytes_of(network), "tensors"
    if place.weights:
        return sum(place.weights.values()), "sizes"
    if "quantization_config" in loaded and "quantization" not in loaded:
        return None, None
    return nbytes_of(network), "config"


def nbytes_of(module: nn.Module) -> int:
    """Returns the bytes of a module's parameters."""
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))
