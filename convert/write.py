"""Writes a converted drafter: beside its place first, then renamed into it, all or nothing.

The weights stream through, a block of rows at a time, so that a converter never holds a whole
tensor: mlx's own writer wants all of them at once.
"""

import fcntl
import glob
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_drift.convert.read.stored import DTYPES, StoredTensor, from_mlx, to_mlx
from mlx_drift.drafters.schema import Quantization
from mlx_drift.errors import DriftError

NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if not name.startswith(("F8", "F64"))}
"""Safetensors' name of each MLX dtype."""

EXPONENTS = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
}
"""The exponent's bits, all set in NaN and the infinities."""

PARTIAL, SECONDS_TO_LOCK = ".partial", 10
"""What a folder in the making is called at the end, and how soon it is locked, amply."""

Progress = Callable[[int, int], None]
"""Called with the bytes read so far, and all of them."""


@dataclass(frozen=True)
class Output:
    """A tensor to write, made block by block from one that is stored.

    Attributes:
        source: The stored tensor.
        dtype: What its floats are cast to; None leaves them.
        quantization: How it is quantized; None leaves it.
    """

    source: StoredTensor
    dtype: mx.Dtype | None = None
    quantization: Quantization | None = None

    def parts(self, block: npt.NDArray[Any]) -> list[tuple[npt.NDArray[Any], str]]:
        """Turns a block of rows into the rows to write: the weights, or packed ones and scales.

        Returns:
            Their carriers, each with safetensors' name of its dtype.
        """
        dtype = self.source.dtype
        cast = self.dtype if mx.issubdtype(dtype, mx.floating) else None
        if cast is None and self.quantization is None:
            return [(block, NAMES[dtype])]
        array = to_mlx(block, dtype)
        parts = [array if cast is None else array.astype(cast)]
        if (q := self.quantization) is not None:
            parts = list(mx.quantize(parts[0], q.group_size, q.bits, q.mode))
        mx.eval(parts)
        return [(from_mlx(part), NAMES[part.dtype]) for part in parts]

    def names(self, name: str) -> list[str]:
        """The names of the parts, as mlx's quantized layers call them."""
        if self.quantization is None:
            return [name]
        module = name.removesuffix("weight")
        affine = self.quantization.mode == "affine"
        return [name, module + "scales", *([module + "biases"] if affine else [])]


def write_weights(
    path: Path, outputs: Mapping[str, Output], progress: Progress, file_format: str = "mlx"
) -> dict[str, int]:
    """Writes a safetensors file; the same input, the same bytes.

    Args:
        path: The file, which must not exist.
        outputs: What to write, by name.
        progress: Told after each block.
        file_format: Whose conventions the tensors follow: `mlx`, or `pt` for PyTorch.

    Returns:
        For each tensor that has any, how many of its values are NaN or infinite.
    """
    header: dict[str, Any] = {"__metadata__": {"format": file_format}}
    size = 0
    for name, output in sorted(outputs.items()):
        rows = output.source.shape[:1]
        first = output.parts(output.source.read(0, min(1, *rows) if rows else 1))
        for part_name, (part, dtype) in zip(output.names(name), first, strict=True):
            shape = [*rows, *part.shape[1:]]
            nbytes = part.itemsize * math.prod(shape)
            header[part_name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [size, size + nbytes],
            }
            size += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned, as the reference writer does

    total = sum(output.source.nbytes for output in outputs.values())
    done = 0
    bad: dict[str, int] = {}
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        positions = {
            name: 8 + len(text) + entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        }
        for name, output in sorted(outputs.items()):
            for block in output.source.blocks():
                parts = output.parts(block)
                for part_name, (part, dtype) in zip(output.names(name), parts, strict=True):
                    if count := _count_not_finite(part, dtype):
                        bad[part_name] = bad.get(part_name, 0) + count
                    file.seek(positions[part_name])
                    file.write(part.data)
                    positions[part_name] += part.nbytes
                done += block.nbytes
                progress(min(done, total), total)
                mx.clear_cache()
    return bad


def _count_not_finite(data: npt.NDArray[Any], dtype: str) -> int:
    if dtype not in EXPONENTS:
        return 0
    carrier, mask = EXPONENTS[dtype]
    exponents = data.view(carrier) & carrier(mask)
    if not data.size or exponents.max() != mask:
        return 0
    return int(np.count_nonzero(exponents == mask))


def free_path(path: str | Path, flag: str = "--mlx-path") -> Path:
    """Returns where a folder is to be written, at which nothing stands.

    Args:
        path: The folder, as a user names it.
        flag: What names it on the command line.

    Raises:
        DriftError: If something stands there, or nothing can.
    """
    try:
        free = Path(path).expanduser()
        free.lstat()
    except FileNotFoundError:
        return free
    except (OSError, RuntimeError, ValueError) as error:  # no such user, too long, no path at all
        reason = getattr(error, "strerror", None) or error
        raise DriftError(f"{path}: cannot be written ({reason})") from None
    raise DriftError(f"{free} exists already; choose another {flag}, or remove it first")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a folder to fill that becomes `path` at the end, unless an exception passes.

    Raises:
        DriftError: If something stands there, or it cannot be written.
    """
    path = free_path(path)
    made = [parent for parent in path.parents if not parent.exists()]
    partial, lock = None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
        lock = _lock(partial)
        yield partial
        partial.chmod(0o755)  # mkdtemp makes private folders
        partial.rename(path)
    except OSError as error:
        raise DriftError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if lock is not None:
            os.close(lock)
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if not path.exists():
            for parent in made:
                with suppress(OSError):  # somebody else may have put something there
                    parent.rmdir()


def _lock(folder: Path) -> int | None:
    """Locks a folder until the handle is closed, if by the end of the process, however it ends.

    Returns:
        The handle; None if another process holds the lock.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_left_over(path: Path) -> None:
    """Removes what a killed process left: partial folders, not brand-new, that nobody holds."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        with suppress(OSError):
            old = time.time() - left.stat().st_mtime > SECONDS_TO_LOCK
            if old and (handle := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)
