"""What training goes on from, exactly: one file, whole or not there.

Nothing random is in it: the order is a function of the seed and the step (`order`).
"""

import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_drift.errors import DriftError
from mlx_drift.files.tensors import read_metadata, read_safetensors

FORMAT = "mlx_drift_training"


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: Steps taken.
        tokens: The target read for them.
        best_step: After which step the acceptance was highest.
        history: What was measured, in order: `step`, `acceptance_length`, `val_loss`.
        finished: It stopped rising, or all steps are taken.
    """

    step: int = 0
    tokens: int = 0
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False

    @property
    def best(self) -> float:
        """The highest acceptance so far."""
        return max((one["acceptance_length"] for one in self.history), default=-1.0)


def save_checkpoint(path: Path, arrays: dict[str, mx.array], progress: Progress) -> None:
    """Writes a checkpoint in place of the one before, if there is one.

    Raises:
        DriftError: If the disk does not take it; the one before is still there then.
    """
    partial = path.with_name(f"partial-{path.name}")
    try:
        mx.save_safetensors(str(partial), arrays, {FORMAT: json.dumps(asdict(progress))})
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)  # a full disk has room again
        raise DriftError(f"{path}: cannot be written ({error})") from None


def load_checkpoint(path: Path, like: dict[str, mx.array]) -> tuple[dict[str, mx.array], Progress]:
    """Reads a checkpoint.

    Args:
        path: The file.
        like: What the arrays must be like.

    Raises:
        DriftError: If it is damaged, or of another head.
    """
    try:
        arrays = read_safetensors(path)
        progress = Progress(**json.loads(read_metadata(path)[FORMAT]))
        same = {n: (a.shape, a.dtype) for n, a in arrays.items()} == {
            n: (a.shape, a.dtype) for n, a in like.items()
        }
    except (DriftError, KeyError, TypeError, ValueError):
        same = False
    if not same:
        raise DriftError(
            f"{path}: damaged, or no checkpoint of this training; remove it, and the training "
            "begins anew, on the answers beside it"
        )
    return arrays, progress


def order(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """Returns which texts a step takes: epoch after epoch, each in an order of its own.

    Args:
        step: The step's number, from 0.
        batch_size: Texts a step.
        count: How many texts there are.
        seed: The training's.
    """
    places = (divmod(place, count) for place in range(step * batch_size, (step + 1) * batch_size))
    return [int(_permutation(count, epoch, seed)[at]) for epoch, at in places]


@functools.lru_cache(maxsize=2)
def _permutation(count: int, epoch: int, seed: int) -> npt.NDArray[Any]:
    return np.random.default_rng([seed, 3, epoch]).permutation(count)
