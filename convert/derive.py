"""Tensors made from stored ones, still row by row: what a file has in another form than mlx-lm.

Each function returns a `StoredTensor` that computes its rows when they are read, so that a
converter never holds more of a head of 256 experts than one block of it.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_drift.convert.read.stored import StoredTensor, from_mlx, to_mlx

FLOATS = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}

FP8_BLOCK = 128
"""Rows and columns that share a scale in DeepSeek's fp8 checkpoints."""


def plus_one(tensor: StoredTensor) -> StoredTensor:
    """Adds 1 to a zero-centred gain, in float32, as PyTorch does when it uses it."""

    def read(start: int, stop: int) -> npt.NDArray[np.float32]:
        return _floats(tensor, start, stop) + np.float32(1)

    return StoredTensor(tensor.shape, "F32", read, tensor.file_format)


def stack(tensors: Sequence[StoredTensor]) -> StoredTensor:
    """Stacks tensors of one shape and dtype along a new first axis."""
    first = tensors[0]

    def read(start: int, stop: int) -> npt.NDArray[np.generic]:
        return np.stack([t.read(0, t.shape[0]) for t in tensors[start:stop]])

    return StoredTensor((len(tensors), *first.shape), first.stored, read, first.file_format)


def middle(tensor: StoredTensor, begin: int, end: int) -> StoredTensor:
    """Takes rows begin … end of each matrix of a stack `[E, rows, columns]`."""

    def read(start: int, stop: int) -> npt.NDArray[np.generic]:
        return np.ascontiguousarray(tensor.read(start, stop)[:, begin:end])

    shape = (tensor.shape[0], end - begin, *tensor.shape[2:])
    return StoredTensor(shape, tensor.stored, read, tensor.file_format)


def heads_of(
    tensor: StoredTensor, heads: int, begin: int, end: int, transposed: bool
) -> StoredTensor:
    """Takes rows begin … end of each head's share of a matrix, as a stack of one matrix a head.

    Args:
        tensor: `[heads · rows, columns]`.
        heads: How many heads there are.
        begin: The first row of a head to take.
        end: The row after the last.
        transposed: Turn each matrix over: `[heads, columns, end − begin]`.
    """
    rows, columns = tensor.shape[0] // heads, tensor.shape[1]

    def read(start: int, stop: int) -> npt.NDArray[np.generic]:
        of_heads = tensor.read(start * rows, stop * rows).reshape(stop - start, rows, columns)
        taken = of_heads[:, begin:end]
        return np.ascontiguousarray(taken.swapaxes(1, 2) if transposed else taken)

    matrix = (columns, end - begin) if transposed else (end - begin, columns)
    return StoredTensor((heads, *matrix), tensor.stored, read, tensor.file_format)


def scaled_by_blocks(tensor: StoredTensor, scales: StoredTensor) -> StoredTensor:
    """Multiplies each block of 128 × 128 with its scale (DeepSeek-V3's fp8), to bfloat16.

    Args:
        tensor: `[rows, columns]`.
        scales: `[⌈rows / 128⌉, ⌈columns / 128⌉]`.
    """

    def read(start: int, stop: int) -> npt.NDArray[np.generic]:
        first = start // FP8_BLOCK
        of_rows = _floats(scales, first, -(-stop // FP8_BLOCK)).repeat(FP8_BLOCK, axis=0)
        of_rows = of_rows[start - first * FP8_BLOCK :][: stop - start]
        factor = of_rows.repeat(FP8_BLOCK, axis=1)[:, : tensor.shape[1]]
        return from_mlx(mx.array(_floats(tensor, start, stop) * factor).astype(mx.bfloat16))

    return StoredTensor(tensor.shape, "BF16", read, tensor.file_format)


def dequantized(
    parts: Sequence[StoredTensor],
    group_size: int,
    bits: int,
    mode: str,
    dtype: mx.Dtype = mx.bfloat16,
) -> StoredTensor:
    """Unpacks a matrix, or a stack of them, that mlx quantized.

    Args:
        parts: The packed weights `[…, packed]`, the scales `[…, groups]`, and the biases if the
            mode has them.
        group_size: Weights that share a scale.
        bits: Of a weight.
        mode: mlx's quantization mode.
        dtype: Of the result.
    """
    packed, scales, *_ = parts

    def read(start: int, stop: int) -> npt.NDArray[np.generic]:
        weight, of_groups, *rest = (to_mlx(t.read(start, stop), t.dtype) for t in parts)
        biases = rest[0] if rest else None
        floats = mx.dequantize(weight, of_groups, biases, group_size, bits, mode)
        return from_mlx(floats.astype(dtype))

    shape = (*packed.shape[:-1], scales.shape[-1] * group_size)
    return StoredTensor(shape, FLOATS[dtype], read, packed.file_format)


def _floats(tensor: StoredTensor, start: int, stop: int) -> npt.NDArray[np.float32]:
    return np.array(to_mlx(tensor.read(start, stop), tensor.dtype).astype(mx.float32))
