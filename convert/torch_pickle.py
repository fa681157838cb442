"""Reads the tensors of a PyTorch checkpoint (`pytorch_model.bin`) without PyTorch and without risk.

The file never reaches `pickle`: `inert_pickle` decodes it, and every size is checked here before
it is believed. Two containers hold the pickle (torch 2.13, `torch/serialization.py`):

* zip (`_save`, since 1.6): `<root>/data.pkl`, optional `<root>/byteorder`, and one *stored* member
  `<root>/data/<key>` a storage. `PyTorchStreamWriter` pads the extra field of the *local* header
  until a storage is aligned (64 bytes), so its data lies at local header + 30 + name + extra, with
  the lengths of that header and not of the central directory (APPNOTE.TXT 4.3.7).
* stream (`_legacy_save`): five pickles (magic, protocol version, system info, the object, the
  storage keys), then a storage each: int64 element count, little-endian data.
"""

import io
import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_drift.convert.inert_pickle import MAX_ELEMENTS, Machine, Refusal, Storage, Tensor
from mlx_drift.errors import DriftError

_Bytes = npt.NDArray[np.uint8]

_MAX_PICKLE_BYTES = 64 << 20
_MAX_DIMS = 32
_MAX_DIM = 2**31 - 1  # an MLX shape is int32

_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, of the extra field
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")

# numpy's carrier of the bits, and the MLX dtype. NumPy has no bfloat16, MLX on GPU no float64; a
# bool goes through uint8 because a byte above 1 is not a valid NumPy bool.
_DTYPES: dict[str, tuple[str, mx.Dtype]] = {
    "torch.bfloat16": ("<u2", mx.bfloat16),
    "torch.float16": ("<f2", mx.float16),
    "torch.float32": ("<f4", mx.float32),
    "torch.float64": ("<f8", mx.float32),
    "torch.int8": ("|i1", mx.int8),
    "torch.int16": ("<i2", mx.int16),
    "torch.int32": ("<i4", mx.int32),
    "torch.int64": ("<i8", mx.int64),
    "torch.uint8": ("|u1", mx.uint8),
    "torch.uint16": ("<u2", mx.uint16),
    "torch.uint32": ("<u4", mx.uint32),
    "torch.uint64": ("<u8", mx.uint64),
    "torch.bool": ("|u1", mx.bool_),
}


def _read_zip(data: _Bytes, file: IO[bytes]) -> tuple[Any, dict[str, _Bytes]]:
    """The object of a zip container, and the bytes of each storage by its key."""
    members = _zip_members(data, file)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refusal(f"{len(pickles)} members named data.pkl", "one, as torch.save writes")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise Refusal("a TorchScript archive", "a state dict", "torch.save its state_dict()")
    byteorder = members.get(f"{root}byteorder")
    if byteorder is not None and byteorder[:8].tobytes() != b"little":
        raise Refusal("a byteorder other than little", "little", "save it on such a machine")
    pickled = members[pickles[0]]
    if len(pickled) > _MAX_PICKLE_BYTES:
        raise Refusal(f"a pickle of {len(pickled)} bytes", f"at most {_MAX_PICKLE_BYTES}")
    value = Machine().run(io.BytesIO(pickled.tobytes()))
    prefix = f"{root}data/"
    return value, {n.removeprefix(prefix): m for n, m in members.items() if n.startswith(prefix)}


def _zip_members(data: _Bytes, file: IO[bytes]) -> dict[str, _Bytes]:
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error) as e:
        raise Refusal(f"a broken zip archive ({e!s:.80})", "a whole one", "fetch it again") from e
    members: dict[str, _Bytes] = {}
    for info in infos:
        if info.filename in members or info.compress_type != zipfile.ZIP_STORED:
            raise Refusal(f"the member {info.filename!r:.80} twice or compressed", "stored once")
        members[info.filename] = _stored_bytes(data, info)
    return members


def _stored_bytes(data: _Bytes, info: zipfile.ZipInfo) -> _Bytes:
    header = info.header_offset
    if 0 <= header <= len(data) - _LOCAL_HEADER.size:
        signature, *lengths = _LOCAL_HEADER.unpack_from(data.data, header)
        start = header + _LOCAL_HEADER.size + sum(lengths)
        size = info.file_size
        if signature == b"PK\3\4" and size == info.compress_size and start + size <= len(data):
            return data[start : start + size]
    raise Refusal(f"the member {info.filename!r:.80} cut off", "a whole file", "fetch it again")


def _read_stream(data: _Bytes) -> tuple[Any, dict[str, _Bytes]]:
    """The object of a stream container, and the bytes of each storage by its key."""
    stream = io.BytesIO(data[:_MAX_PICKLE_BYTES].tobytes())
    if Machine().run(stream) != _STREAM_MAGIC or Machine().run(stream) != _STREAM_VERSION:
        raise Refusal("a pickle without PyTorch's magic number", "a torch.save file")
    match Machine().run(stream):
        case {"little_endian": True}:
            pass
        case _:
            raise Refusal("a byteorder other than little", "little", "save it on such a machine")
    machine = Machine()
    value = machine.run(stream)
    members: dict[str, _Bytes] = {}
    keys, start = Machine().run(stream), stream.tell()
    for key in keys if isinstance(keys, list) else ():
        storage = machine.storages.get(key) if isinstance(key, str) else None
        count = int.from_bytes(data[start : start + 8].tobytes(), "little")
        if storage is None or count != storage.numel:
            raise Refusal("a storage missing or of another size", "the one its tensors name")
        start += 8
        members[storage.key] = data[start : start + _nbytes(storage)]
        start += _nbytes(storage)
    return value, members


def _state_dict(value: Any) -> dict[str, Tensor]:
    """The named tensors, out of the wrappers of training code; all else is left behind."""
    for _ in _WRAPPERS:  # bounded: a dict may hold itself
        inner = (value.get(name) for name in _WRAPPERS) if isinstance(value, dict) else ()
        value = next((item for item in inner if isinstance(item, dict)), value)
    if isinstance(value, dict):
        tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            return tensors
    raise Refusal("no tensors by name", f"a state dict, plain or under {', '.join(_WRAPPERS)}")


def _checked_nbytes(name: str, tensor: Tensor, available: int) -> int:
    """The size of a tensor once copied, its every element proven to lie inside its storage."""
    what = f"the tensor {name!r:.80} with"
    if tensor.dtype not in _DTYPES:
        remedy = "dequantize it to bfloat16 first"
        raise Refusal(f"{what} dtype {tensor.dtype}", "a dtype MLX has", remedy)
    offset, shape, stride = tensor.offset, tensor.shape, tensor.stride
    if not (isinstance(shape, tuple) and isinstance(stride, tuple)) or not (
        len(shape) == len(stride) <= _MAX_DIMS
        and _all_between((offset, *stride), MAX_ELEMENTS)
        and _all_between(shape, _MAX_DIM)
    ):
        raise Refusal(f"{what} an impossible offset, shape or stride", "whole numbers in range")
    numel = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    itemsize = np.dtype(_DTYPES[tensor.dtype][0]).itemsize
    if numel and (last + 1) * itemsize > _nbytes(tensor.storage):
        raise Refusal(f"{what} elements outside its storage", "a view inside it")
    if available < _nbytes(tensor.storage):
        raise Refusal(f"{what} a missing or short storage", "all its bytes", "fetch it again")
    return numel * itemsize


def _nbytes(storage: Storage) -> int:
    return storage.numel * np.dtype(_DTYPES[storage.dtype][0]).itemsize


def _all_between(values: Sequence[Any], limit: int) -> bool:
    return all(type(value) is int and 0 <= value <= limit for value in values)


def _to_mlx(tensor: Tensor, storage: _Bytes) -> mx.array:
    carrier, dtype = _DTYPES[tensor.dtype]
    if 0 in tensor.shape:
        return mx.zeros(tensor.shape, dtype)
    itemsize = np.dtype(carrier).itemsize
    view: npt.NDArray[Any] = np.ndarray(  # checks its bounds once more
        tensor.shape,
        carrier,
        buffer=storage,
        offset=tensor.offset * itemsize,
        strides=[step * itemsize for step in tensor.stride],
    )
    view = np.require(view, requirements=["C", "A"])  # the stream container aligns nothing
    return mx.array(view).view(dtype) if dtype == mx.bfloat16 else mx.array(view, dtype)


def read_torch_checkpoint(path: Path) -> dict[str, mx.array]:
    """Reads the tensors of a `torch.save` file; the file is mapped and only they are copied.

    Args:
        path: a state dict, or one under `state_dict`, `model`, `model_state_dict` or `module`, in
            either container. What is no tensor is left out.

    Returns:
        The arrays by name in file order, bit for bit, except float64, which MLX has on no GPU and
        which is rounded to float32.

    Raises:
        DriftError: the file cannot be read, is damaged, or holds anything but data: an unknown
            global or opcode, TorchScript, big-endian or float8 data, a complex dtype, a tensor that
            reaches outside its storage, or tensors far larger than the file.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except OSError as error:
        raise DriftError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except Refusal as refusal:
        raise DriftError(f"{path}: {refusal}") from refusal


def _read(file: IO[bytes]) -> dict[str, mx.array]:
    head = file.read(4)
    if head != b"PK\3\4" and head[:1] != b"\x80":
        raise Refusal("neither a zip archive nor a pickle", "a torch.save file", "fetch it again")
    data: _Bytes = np.memmap(file, np.uint8, "r")
    value, storages = _read_zip(data, file) if head[0] == ord("P") else _read_stream(data)
    # Tied weights may share a storage and a small one be expanded, but not beyond all measure.
    budget = 4 * len(data) + (64 << 20)
    arrays = {}
    for name, tensor in _state_dict(value).items():
        storage = storages.get(tensor.storage.key, data[:0])
        budget -= _checked_nbytes(name, tensor, len(storage))
        if budget < 0:
            raise Refusal("tensors far larger than the file", "at most four times its size")
        arrays[name] = _to_mlx(tensor, storage)
    return arrays
