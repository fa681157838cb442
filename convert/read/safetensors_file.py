"""Reads the header of a safetensors file, on a disk or on the Hub, as untrusted data.

The format: 8 bytes with the length of the header, a JSON header, the data. The rules are those of
the reference parser (huggingface/safetensors `src/tensor.rs`, `Metadata::validate`): every tensor's
bytes are where its shape and dtype say, the tensors cover the data without gap or overlap. That
parser maps a whole local file, which neither a converter within a memory bound nor a file on the
Hub allows; `tests/convert/read/test_safetensors_file.py` holds this reader against it.
"""

import math
from functools import partial
from typing import Any

import numpy.typing as npt

from mlx_drift.convert.read.stored import DTYPES, ReadAt, StoredTensor, as_carrier, itemsize
from mlx_drift.errors import DriftError, brief
from mlx_drift.files.json_file import parse_json
from mlx_drift.files.lfs import POINTER, refuse_pointer
from mlx_drift.files.tensors import MAX_HEADER_BYTES

MAX_DIMS, MAX_DIM = 32, 2**31 - 1  # an MLX shape is int32


def read_safetensors_file(read_at: ReadAt, size: int, where: str) -> dict[str, StoredTensor]:
    """Reads the header; the tensors stay in the file.

    Args:
        read_at: Reads bytes of the file.
        size: Bytes of the whole file.
        where: The file's name, for messages.

    Returns:
        The tensors by name.

    Raises:
        DriftError: If the file is damaged, claims what it does not hold, or is a Git LFS pointer.
    """

    def damaged(what: str) -> DriftError:
        return DriftError(
            f"{where}: cannot be read as safetensors ({what}). Download or copy it again"
        )

    length = int.from_bytes(read_at(0, 8).tobytes(), "little") if size >= 8 else size
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        refuse_pointer(read_at(0, min(size, len(POINTER))).tobytes(), where)
        raise damaged(f"a header of {length} bytes in a file of {size}")
    try:
        header = parse_json(read_at(8, length).tobytes())
    except (ValueError, RecursionError):
        raise damaged("its header is not JSON") from None
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    file_format = metadata.get("format") if isinstance(metadata, dict) else None

    start, data_size = 8 + length, size - 8 - length
    tensors, spans = {}, []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
                pass
            case _:
                raise damaged(f"{name} is described by {brief(entry)}")
        if dtype not in DTYPES:
            raise DriftError(
                f"{where}: {name} is of the dtype {dtype}, which MLX has not. Dequantize the head "
                "to bfloat16, or take an unquantized one"
            )
        if len(shape) > MAX_DIMS or not all(type(n) is int and 0 <= n <= MAX_DIM for n in shape):
            raise damaged(f"{name} has the shape {brief(shape)}")
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= data_size:
            raise damaged(f"{name} lies at {brief([begin, end])} of {data_size} bytes")
        if end - begin != math.prod(shape) * itemsize(dtype):
            raise damaged(f"{name} takes {end - begin} bytes, which its shape {shape} does not")
        spans.append((begin, end))
        read = partial(_read_rows, read_at, start + begin, tuple(shape), dtype, where)
        tensors[name] = StoredTensor(tuple(shape), dtype, read, file_format)
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != data_size:
        raise damaged("its tensors overlap or leave gaps")
    return tensors


def _read_rows(
    read_at: ReadAt, offset: int, shape: tuple[int, ...], dtype: str, where: str, *rows: int
) -> npt.NDArray[Any]:
    start, stop = rows
    row_shape = shape[1:]
    row_bytes = math.prod(row_shape) * itemsize(dtype)
    data: Any = read_at(offset + start * row_bytes, (stop - start) * row_bytes)
    if data.size != (stop - start) * row_bytes:
        raise DriftError(f"{where}: ends too soon; it changed while it was read")
    array = data.view(DTYPES[dtype][0]).reshape((stop - start, *row_shape) if shape else ())
    return as_carrier(array, dtype)
