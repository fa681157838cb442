"""A target cut over the ranks: by the width of its layers, or layer by layer.

The cuts are mlx-lm's own (`Model.shard`, `PipelineMixin.pipeline`); what would come out wrong, or
fail in the middle of an answer, is refused here while all is lazy.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.errors import DriftError
from mlx_drift.ranks.world import Ranks

ENDINGS = ".json .jinja .txt .model .tiktoken .py .safetensors".split()
PIECES, PIECE = 16, 1 << 16
"""Of a large file so many pieces or one more, evenly spaced, are compared; and its size."""


@dataclass(frozen=True)
class Stage:
    """The layers of a pipeline that a rank has: `start` to `end` of `layers`."""

    start: int
    end: int
    layers: int


def stage_of(model: nn.Module) -> Stage | None:
    """Returns the part of a pipeline that a model is; None for a model with all its layers."""
    return getattr(model, "stage", None)


def has_pipeline(model: nn.Module) -> bool:
    """Tells whether a model's layers can be spread over ranks."""
    return hasattr(getattr(model, "model", None), "pipeline")


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Cuts a model's layers by their width, every rank having a part of each.

    Args:
        model: The target, with lazy weights: only a rank's own part is ever computed.
        ranks: The ranks. All must call.

    Raises:
        DriftError: If the model cannot be cut so, or not into so many parts.
    """
    model_type = model.model_type
    if not hasattr(model, "shard"):
        instead = "add --pipeline, to spread its layers" if has_pipeline(model) else "run it on one"
        raise DriftError(
            f"mlx-lm cannot cut the target ({model_type}) over ranks by its width; {instead}"
        )
    before = _counts(model)
    try:
        model.shard(ranks.group)
        uneven = _uneven(before, _counts(model), ranks.size)
        if uneven is None:
            model(mx.zeros((1, 1), mx.int32))  # lazy: shapes are checked, nothing is computed
    except Exception as error:  # whatever a model file raises for sizes it was not written for
        raise DriftError(
            f"the target ({model_type}) cannot be cut over {ranks.size} ranks "
            f"({error}); use another number of ranks"
        ) from error
    if uneven is not None:
        name, count = uneven
        raise DriftError(
            f"the target ({model_type}) cannot be cut over {ranks.size} ranks: its {name} is "
            f"{count}, which {ranks.size} does not divide; use another number of ranks"
        )
    model.ranks = ranks


def spread(model: nn.Module, ranks: Ranks) -> None:
    """Gives a rank its layers of a model, the last ones to rank 0.

    Raises:
        DriftError: If mlx-lm has no such cut for the model, or there are more ranks than layers.
    """
    layers = check_spread(model, ranks)
    model.model.pipeline(ranks.group)
    note_stage(model, ranks, layers)


def check_spread(model: nn.Module, ranks: Ranks) -> int:
    """Checks that a whole model's layers can be spread over the ranks; returns their number.

    Raises:
        DriftError: If not.
    """
    if not has_pipeline(model):
        raise DriftError(
            f"mlx-lm cannot spread the layers of the target ({model.model_type}) over ranks; leave "
            "--pipeline out"
        )
    layers = len(model.model.layers)
    if layers < ranks.size:
        raise DriftError(
            f"the target has {layers} layers, which do not go round {ranks.size} ranks"
        )
    return layers


def note_stage(model: nn.Module, ranks: Ranks, layers: int) -> None:
    """Notes which of the `layers` of a pipeline this rank was given."""
    model.ranks = ranks
    model.stage = Stage(model.model.start_idx, model.model.end_idx, layers)


def fingerprints(folder: Path) -> dict[str, str]:
    """Returns what tells each file of a model's folder from another, without reading it whole."""
    names = sorted(p for p in folder.iterdir() if p.suffix in ENDINGS and p.is_file())
    return {path.name: _fingerprint(path) for path in names}


def _fingerprint(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    last = max(size - PIECE, 0)
    step = max(PIECE, last // (PIECES - 1))
    with path.open("rb") as file:
        for offset in (*range(0, last, step), last):
            file.seek(offset)
            digest.update(file.read(PIECE))
    return f"{size} bytes, {digest.hexdigest()[:12]}"


def _counts(model: nn.Module) -> dict[tuple[str, str], int]:
    """Returns the whole numbers that modules keep: of heads, say."""
    modules: list[tuple[str, Any]] = model.named_modules()
    return {
        (path, name): value
        for path, module in modules
        for name, value in vars(module).items()
        if type(value) is int
    }


def _uneven(
    before: dict[tuple[str, str], int], after: dict[tuple[str, str], int], size: int
) -> tuple[str, int] | None:
    """Finds a number that cutting rounded down: mlx-lm's model files divide and do not look.

    Fewer heads than ranks are no fault where a model file repeats them: one each is left then.
    """
    for key, count in before.items():
        left = after.get(key, count)
        repeated = left == 1 and count < size and size % count == 0
        if left not in (count, count / size) and not repeated:
            return key[1], count
    return None
