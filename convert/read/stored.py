"""Tensors that stay in their file until their rows are asked for.

Both file formats, on a disk or on the Hub, hand out tensors as `StoredTensor`: shape and dtype are
known and checked, the data is read block by block, so that a converter never holds more than a
block of a tensor and `inspect` holds none.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_drift.errors import DriftError

BLOCK_BYTES = 4 << 20

Bytes = npt.NDArray[np.uint8]
ReadAt = Callable[[int, int], Bytes]
"""Reads so many bytes from an offset of a file; fewer only at its end."""


def file_reader(path: Path) -> ReadAt:
    """Returns a reader of a file on this machine.

    Positioned reads and no memory map: mapped pages would count as the converter's own memory.
    """

    def read_at(offset: int, count: int) -> Bytes:
        try:
            return np.fromfile(path, np.uint8, count, offset=offset)
        except OSError as error:
            raise DriftError(f"{path}: cannot be read ({error.strerror})") from None

    return read_at


def _fp8_table(mantissa_bits: int, bias: int, finite: bool) -> npt.NDArray[np.uint16]:
    """The bfloat16 bits of each float8 number; bfloat16 holds every one of them exactly."""
    code = np.arange(256)
    exponent, mantissa = (code & 127) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    top = 127 >> mantissa_bits
    unit = 2.0 ** (1 - bias - mantissa_bits)  # of subnormal numbers
    value = np.where(
        exponent == 0, mantissa, (mantissa + (1 << mantissa_bits)) * 2.0 ** (exponent - 1)
    )
    value = (value * unit).astype(np.float32)
    nan = (code & 127) == 127  # e4m3fn: no infinities, one NaN
    if not finite:
        value[(exponent == top) & (mantissa == 0)] = np.inf
        nan = (exponent == top) & (mantissa != 0)
    value = np.where(nan, np.nan, np.where(code >= 128, -value, value)).astype(np.float32)
    return (value.view(np.uint32) >> 16).astype(np.uint16)


_FP8 = {"F8_E4M3": _fp8_table(3, 7, True), "F8_E5M2": _fp8_table(2, 15, False)}

# By safetensors' name of a dtype: NumPy's carrier of the bits, and the MLX dtype. NumPy has no
# bfloat16, MLX on GPU no float64; a bool goes through uint8 because a byte above 1 is not a valid
# NumPy bool.
DTYPES: dict[str, tuple[str, mx.Dtype]] = {
    "BF16": ("<u2", mx.bfloat16),
    "F16": ("<f2", mx.float16),
    "F32": ("<f4", mx.float32),
    "F64": ("<f8", mx.float32),
    "F8_E4M3": ("|u1", mx.bfloat16),
    "F8_E5M2": ("|u1", mx.bfloat16),
    "I8": ("|i1", mx.int8),
    "I16": ("<i2", mx.int16),
    "I32": ("<i4", mx.int32),
    "I64": ("<i8", mx.int64),
    "U8": ("|u1", mx.uint8),
    "U16": ("<u2", mx.uint16),
    "U32": ("<u4", mx.uint32),
    "U64": ("<u8", mx.uint64),
    "BOOL": ("|u1", mx.bool_),
}


def itemsize(stored: str) -> int:
    """Bytes of one element in the file, by safetensors' name of its dtype."""
    return np.dtype(DTYPES[stored][0]).itemsize


def as_carrier(raw: npt.NDArray[Any], stored: str) -> npt.NDArray[Any]:
    """Turns elements as they are in a file into NumPy's carrier of the MLX dtype, bit for bit.

    float64 is rounded to float32; float8 becomes the bfloat16 of the same value.
    """
    if stored in _FP8:
        raw = _FP8[stored][raw]
    elif stored == "BOOL":
        raw = raw != 0
    elif stored == "F64":
        with np.errstate(over="ignore"):  # to infinity, which the writer reports
            raw = raw.astype(np.float32)
    return np.require(raw, requirements=["C", "A"])


def to_mlx(carrier: npt.NDArray[Any], dtype: mx.Dtype) -> mx.array:
    """Turns NumPy's carrier into an array."""
    return mx.array(carrier).view(dtype) if dtype == mx.bfloat16 else mx.array(carrier)


def from_mlx(array: mx.array) -> npt.NDArray[Any]:
    """Turns an array into NumPy's carrier; nothing is copied that lies in order."""
    array = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.require(np.array(array, copy=False), requirements=["C"])


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        shape: Its shape.
        stored: Its dtype in the file, by safetensors' name.
        read: Reads rows start … stop of the first axis, in NumPy's carrier of the MLX dtype; all
            of a scalar for 0 … 1.
        file_format: The `format` of a safetensors file, where it says one: `pt` or `mlx`.
    """

    shape: tuple[int, ...]
    stored: str
    read: Callable[[int, int], npt.NDArray[Any]]
    file_format: str | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in MLX."""
        return DTYPES[self.stored][1]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * itemsize(self.stored)

    def whole(self) -> mx.array:
        """Reads all of it."""
        return to_mlx(self.read(0, self.shape[0] if self.shape else 1), self.dtype)

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """Reads it in blocks of rows, of `BLOCK_BYTES` or one row at least."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, BLOCK_BYTES // max(1, self.nbytes // max(1, rows)))
        for start in range(0, rows, step):
            yield self.read(start, min(start + step, rows))
