"""A conversation's tokens and caches in a file, and whose they are: others are refused."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.decode.fingerprint import fingerprint
from mlx_drift.decode.prompt_cache import PromptCache, check_snapshots
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.errors import DriftError
from mlx_drift.files.tensors import read_metadata, read_safetensors
from mlx_drift.target.caches import KVQuantization

FORMAT = "mlx_drift_prompt_cache"
FORMAT_VERSION = 1


def save_prompt_cache(path: str | Path, cache: PromptCache) -> None:
    """Writes a conversation's tokens and caches to a safetensors file; snapshots are left out.

    Raises:
        DriftError: If the cache was left in the middle of a round, or the file cannot be written.
    """
    path = Path(path)
    with cache.alone():
        _save(path, cache)


def _save(path: Path, cache: PromptCache) -> None:
    if cache.is_ahead:
        raise DriftError(
            f"{path}: the prompt cache is ahead of an answer under way, so it is not written. Save "
            "it when the answer has ended, or call cache.finish() first, which ends it"
        )
    if not cache.whole:
        raise DriftError(
            f"{path}: the prompt cache was interrupted in the middle of a step, so it is not "
            "written. Generate with it once more, and save it then"
        )
    described = {
        "version": FORMAT_VERSION,
        "taps": list(cache.drafter.taps),
        "target": fingerprint(cache.model),
        "drafter": fingerprint(cache.drafter.network),
        "max_kv_size": cache.max_kv_size,
        "quantization": None if cache.quantization is None else asdict(cache.quantization),
    }
    arrays = {"tokens": mx.array(cache.tokens, dtype=mx.int32)}
    for owner in ("target", "drafter"):
        held = getattr(cache, f"{owner}_cache").to_arrays()
        arrays |= {f"{owner}.{name}": array for name, array in held.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            partial = Path(folder) / "cache.safetensors"
            mx.save_safetensors(str(partial), arrays, {FORMAT: json.dumps(described)})
            partial.replace(path)
    except (OSError, RuntimeError) as error:
        raise DriftError(f"{path}: cannot be written ({error})") from None


def load_prompt_cache(
    path: str | Path, model: nn.Module, drafter: Drafter, *, max_snapshots: int = 4
) -> PromptCache:
    """Reads what `save_prompt_cache` wrote.

    Args:
        path: The file.
        model: The target it was made with.
        drafter: The drafter it was made with.
        max_snapshots: As in `make_prompt_cache`.

    Raises:
        DriftError: If the file is missing, damaged, of another program, model or drafter; or
            `max_snapshots` is out of range.
    """
    check_snapshots(max_snapshots)
    path = Path(path)
    arrays = read_safetensors(path)
    described = _described(path)
    same_taps = described.get("taps") == list(drafter.taps)
    for owner, module in (("target", model), ("drafter", drafter.network)):
        if described.get(owner) != fingerprint(module) or not (same_taps or owner == "target"):
            raise DriftError(
                f"{path} was made with another {owner} than the one given; load that one, or make "
                "the prompt cache anew"
            )
    try:
        quantization = described["quantization"]
        cache = PromptCache(
            model,
            drafter,
            max_kv_size=described["max_kv_size"],
            quantization=quantization and KVQuantization(**quantization),
            max_snapshots=max_snapshots,
        )
        _fill(cache, arrays)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DriftError(f"{path} is damaged ({error}). Make the prompt cache anew") from None
    return cache


def _described(path: Path) -> dict[str, Any]:
    """Reads what a file says of itself."""
    metadata = read_metadata(path)
    try:
        described = json.loads(metadata.get(FORMAT, "null"))
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise DriftError(
            f"{path} is not a prompt cache that mlx-drift wrote: it has no {FORMAT}. A file of "
            "mlx-lm's knows neither its tokens nor the drafter's rows; make one with mlx-drift "
            "cache-prompt, or save_prompt_cache"
        )
    if described.get("version") != FORMAT_VERSION:
        raise DriftError(
            f"{path} has another version than {FORMAT_VERSION}, which this mlx-drift reads. Make "
            "the prompt cache anew"
        )
    return described


def _fill(cache: PromptCache, arrays: dict[str, mx.array]) -> None:
    """Gives a new cache the arrays of a file.

    Raises:
        ValueError: If they are not what the caches of these models hold.
    """
    tokens = arrays.pop("tokens")
    if tokens.ndim != 1 or tokens.dtype != mx.int32:
        raise ValueError("tokens is no list of token ids")
    cache.tokens = tokens.tolist()  # type: ignore[assignment]
    if any(not 0 <= token < cache.target.shape.vocab_size for token in cache.tokens):
        raise ValueError("tokens lie outside the vocabulary")
    if len(cache.tokens) < 2:  # which saves nothing
        cache.tokens = []
        return
    # Fed the tokens, lazily and never computed, the caches tell what the arrays must be.
    _, taps = cache.target(tokens[:-1], cache.target_cache)
    cache.drafter.start(tokens[:1], cache.drafter_cache)
    cache.drafter.ingest(tokens[1:], taps, cache.drafter_cache)
    for owner, held in (("target", cache.target_cache), ("drafter", cache.drafter_cache)):
        own = {n.removeprefix(f"{owner}."): a for n, a in arrays.items() if n.startswith(owner)}
        held.check_arrays(own)
        held.from_arrays(own, len(cache.tokens) - 1)
        mx.eval(held.state)
