"""Reads the tensors of a PyTorch checkpoint (`pytorch_model.bin`) without PyTorch and without risk.

The file never reaches `pickle`: `inert_pickle` decodes it, and every size is checked here before
it is believed. Two containers hold the pickle (torch 2.13, `torch/serialization.py`):

* zip (`_save`, since 1.6): `<root>/data.pkl`, optional `<root>/byteorder`, and one *stored* member
  `<root>/data/<key>` a storage. `PyTorchStreamWriter` pads the extra field of the *local* header
  until a storage is aligned (64 bytes), so its data lies at local header + 30 + name + extra, with
  the lengths of that header and not of the central directory (APPNOTE.TXT 4.3.7).
* stream (`_legacy_save`): five pickles (magic, protocol version, system info, the object, the
  storage keys), then a storage each: int64 element count, little-endian data.

The tensors stay in the file until their rows are read.
"""

import io
import math
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlx_drift.convert.read.inert_pickle import MAX_ELEMENTS, Machine, Refusal, Storage, Tensor
from mlx_drift.convert.read.stored import (
    BLOCK_BYTES,
    DTYPES,
    Bytes,
    ReadAt,
    StoredTensor,
    as_carrier,
    file_reader,
    itemsize,
)
from mlx_drift.errors import DriftError
from mlx_drift.files.lfs import POINTER, refuse_pointer

_MAX_PICKLE_BYTES = 64 << 20
_MAX_DIRECTORY_BYTES = 4 << 20  # some 40,000 storages; `zipfile` makes an object of each
_MAX_TENSORS = 10_000  # one could have any number of names
_MAX_DIMS = 32
_MAX_DIM = 2**31 - 1  # an MLX shape is int32
_GAP_BYTES = 1 << 20  # a view with gaps within so much is read with them: few reads are faster

_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, of the extra field
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")


class _Span(NamedTuple):
    """Where something lies in the file, in bytes."""

    start: int
    size: int


@dataclass(frozen=True)
class _File:
    """A checkpoint; `at` reads all of a span or raises DriftError."""

    path: Path
    size: int
    at: ReadAt


class _DirectoryFile(io.FileIO):
    """What `zipfile` may read: the end of the file, then no more than a sane directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads; raises Refusal where it would take much memory."""
        if size is not None and size > _MAX_DIRECTORY_BYTES:
            limit = f"at most {_MAX_DIRECTORY_BYTES}"
            raise Refusal(f"a zip directory of {size} bytes", limit)
        return super().read(size)


def _read_zip(file: _File) -> tuple[Any, dict[str, _Span]]:
    """The object of a zip container, and the place of each storage by its key."""
    members = _zip_members(file)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refusal(f"{len(pickles)} members named data.pkl", "one, as torch.save writes")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise Refusal("a TorchScript archive", "a state dict", "torch.save its state_dict()")
    byteorder = members.get(f"{root}byteorder")
    if byteorder and (byteorder.size != 6 or file.at(*byteorder).tobytes() != b"little"):
        raise Refusal("a byteorder other than little", "little", "save it on such a machine")
    pickled = members[pickles[0]]
    if pickled.size > _MAX_PICKLE_BYTES:
        raise Refusal(f"a pickle of {pickled.size} bytes", f"at most {_MAX_PICKLE_BYTES}")
    value = Machine().run(io.BytesIO(file.at(*pickled).tobytes()))
    prefix = f"{root}data/"
    return value, {n.removeprefix(prefix): m for n, m in members.items() if n.startswith(prefix)}


def _zip_members(file: _File) -> dict[str, _Span]:
    """The place of each member's data: one after the other, all before the central directory."""
    try:
        with _DirectoryFile(file.path) as source, zipfile.ZipFile(source) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error) as e:
        raise Refusal(f"a broken zip archive ({e!s:.80})", "a whole one", "fetch it again") from e
    members: dict[str, _Span] = {}
    end = 0  # of the member before
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.filename in members or info.compress_type != zipfile.ZIP_STORED:
            raise Refusal(f"the member {info.filename!r:.80} twice or compressed", "stored once")
        member = _member(file, info) if end <= info.header_offset <= directory else None
        if member is None or member.start + member.size > directory:
            found = f"overlapping or out-of-range storages (member {info.filename!r:.80})"
            raise Refusal(found, "each in its own place", "fetch it again")
        members[info.filename] = member
        end = member.start + member.size
    return members


def _member(file: _File, info: zipfile.ZipInfo) -> _Span:
    signature, *lengths = _LOCAL_HEADER.unpack(file.at(info.header_offset, _LOCAL_HEADER.size).data)
    if signature != b"PK\3\4" or info.file_size != info.compress_size:
        found = f"the member {info.filename!r:.80} without a header or of two sizes"
        raise Refusal(found, "a whole archive", "fetch it again")
    return _Span(info.header_offset + _LOCAL_HEADER.size + sum(lengths), info.file_size)


def _read_stream(file: _File) -> tuple[Any, dict[str, _Span]]:
    """The object of a stream container, and the place of each storage by its key."""
    stream = io.BytesIO(file.at(0, min(file.size, _MAX_PICKLE_BYTES)).tobytes())
    machine = Machine()
    if machine.run(stream) != _STREAM_MAGIC or machine.run(stream) != _STREAM_VERSION:
        raise Refusal("a pickle without PyTorch's magic number", "a torch.save file")
    match machine.run(stream):
        case {"little_endian": True}:
            pass
        case _:
            raise Refusal("a byteorder other than little", "little", "save it on such a machine")
    value, keys = machine.run(stream), machine.run(stream)
    storages: dict[str, _Span] = {}
    start = stream.tell()
    for key in keys if isinstance(keys, list) else ():
        storage = machine.storages.get(key) if isinstance(key, str) else None
        if storage is None or storage.key in storages or start + 8 + _nbytes(storage) > file.size:
            raise Refusal("a storage unknown, twice or cut off", "a whole file", "fetch it again")
        if int.from_bytes(file.at(start, 8).tobytes(), "little") != storage.numel:
            raise Refusal("a storage of another size", "the one its tensors name")
        storages[storage.key] = _Span(start + 8, _nbytes(storage))
        start += 8 + _nbytes(storage)
    return value, storages


def _nbytes(storage: Storage) -> int:
    return storage.numel * itemsize(storage.dtype)


def _state_dict(value: Any) -> dict[str, Tensor]:
    """The named tensors, out of the wrappers of training code; all else is left behind."""
    for _ in _WRAPPERS:  # bounded: a dict may hold itself
        inner = (value.get(name) for name in _WRAPPERS) if isinstance(value, dict) else ()
        value = next((item for item in inner if isinstance(item, dict)), value)
    if isinstance(value, dict):
        tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
        if len(tensors) > _MAX_TENSORS:
            raise Refusal(f"{len(tensors)} tensors", f"at most {_MAX_TENSORS}")
        if tensors and all(isinstance(name, str) for name in tensors):
            return tensors
    raise Refusal("no tensors by name", f"a state dict, plain or under {', '.join(_WRAPPERS)}")


def _check(name: str, tensor: Tensor, available: int) -> int:
    """Proves every element to lie inside its storage, of which so many bytes are there.

    Returns:
        The bytes of the tensor, or those of the file that it stretches over where they are more.
    """
    what = f"the tensor {name!r:.80} with"
    if tensor.dtype not in DTYPES:
        remedy = "dequantize it to bfloat16 first"
        raise Refusal(f"{what} dtype {tensor.dtype}", "a dtype MLX has", remedy)
    offset, shape, stride = tensor.offset, tensor.shape, tensor.stride
    if not (isinstance(shape, tuple) and isinstance(stride, tuple)) or not (
        len(shape) == len(stride) <= _MAX_DIMS
        and _all_between((offset, *stride), MAX_ELEMENTS)
        and _all_between(shape, _MAX_DIM)
        and math.prod(size or 1 for size in shape) <= MAX_ELEMENTS  # NumPy minds, empty or not
    ):
        raise Refusal(f"{what} an impossible offset, shape or stride", "whole numbers in range")
    if available < _nbytes(tensor.storage):
        raise Refusal(f"{what} a missing or short storage", "all its bytes", "fetch it again")
    if 0 in shape:
        return 0
    span = _reach(shape, stride) + 1
    if (offset + span) * itemsize(tensor.dtype) > _nbytes(tensor.storage):
        raise Refusal(f"{what} elements outside its storage", "a view inside it")
    if _overlap(shape, stride):
        raise Refusal(f"{what} elements that overlap", "a plain view", "save its contiguous()")
    return max(math.prod(shape), span) * itemsize(tensor.dtype)


def _all_between(values: Sequence[Any], limit: int) -> bool:
    return all(type(value) is int and 0 <= value <= limit for value in values)


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The distance of the last element from the first, in the unit of the strides."""
    return sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def _overlap(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether axes interleave, as those of no view but a sliding window do; expanded ones do not.

    Where they do not, the halves of a view along its longest stride lie one behind the other.
    """
    reach = 0
    for step, size in sorted(zip(strides, shape, strict=True)):
        if step and size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def _fill(out: npt.NDArray[Any], read_at: ReadAt, start: int, strides: Sequence[int]) -> None:
    """Copies a view of the file, from byte `start` on and by strides in bytes, into `out`.

    A view with gaps is halved until little is read in vain, a large one until no copy of its bytes
    is large: time and memory follow the elements and not the distance between them.
    """
    span = _reach(out.shape, strides) + out.itemsize
    if span <= min(BLOCK_BYTES, max(out.nbytes, _GAP_BYTES)):
        data = read_at(start, span)
        out[...] = np.ndarray(out.shape, out.dtype, buffer=data, strides=strides)
        return
    axis = max(range(out.ndim), key=lambda axis: (out.shape[axis] > 1, strides[axis]))
    half = out.shape[axis] // 2
    lower, upper = np.split(out, [half], axis)
    _fill(lower, read_at, start, strides)
    _fill(upper, read_at, start + half * strides[axis], strides)


def _stored(tensor: Tensor, read_at: ReadAt, start: int) -> StoredTensor:
    """A checked tensor whose storage starts at that byte of the file."""
    size = itemsize(tensor.dtype)
    strides = tuple(step * size for step in tensor.stride)
    origin = start + tensor.offset * size
    rows, step = (tensor.shape[0], strides[0]) if tensor.shape else (1, 0)

    def read(first: int, last: int) -> npt.NDArray[Any]:
        if not 0 <= first <= last <= rows:
            raise IndexError(f"rows {first} … {last} of a tensor of {rows}")
        shape = tensor.shape and (last - first, *tensor.shape[1:])
        out: npt.NDArray[Any] = np.empty(shape, DTYPES[tensor.dtype][0])
        if out.size:
            _fill(out, read_at, origin + first * step, strides)
        return as_carrier(out, tensor.dtype)

    return StoredTensor(tensor.shape, tensor.dtype, read)


def _exact_reader(path: Path) -> ReadAt:
    read_at = file_reader(path)

    def read_all_at(offset: int, count: int) -> Bytes:
        data = read_at(offset, count)
        if data.size != count:
            raise DriftError(f"{path}: ends too soon; it changed while it was read")
        return data

    return read_all_at


def read_torch_checkpoint(path: Path) -> dict[str, StoredTensor]:
    """Opens the tensors of a `torch.save` file, without reading them.

    Args:
        path: A state dict, or one under `state_dict`, `model`, `model_state_dict` or `module`, in
            either container. What is no tensor is left out.

    Returns:
        The tensors by name in file order. They are read bit for bit, except float64, which is
        rounded to float32, and float8 (e4m3fn, e5m2), which becomes the bfloat16 of the same value.
        Rows are read from the file that is at `path` then; they raise DriftError if it is gone or
        has become shorter.

    Raises:
        DriftError: The file cannot be read, is damaged, or holds anything but data: an unknown
            global or opcode, TorchScript, big-endian data, a complex dtype or another float8, a
            tensor that reaches outside its storage, overlapping storages, or tensors that take far
            more than the file has.
    """
    try:
        return _read(_File(path, path.stat().st_size, _exact_reader(path)))
    except OSError as error:
        raise DriftError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except Refusal as refusal:
        raise DriftError(f"{path}: {refusal}") from refusal


def _read(file: _File) -> dict[str, StoredTensor]:
    start = file.at(0, min(len(POINTER), file.size)).tobytes()
    head = start[:4]
    if head != b"PK\3\4" and head[:1] != b"\x80":
        refuse_pointer(start, file.path)
        raise Refusal("neither a zip archive nor a pickle", "a torch.save file", "fetch it again")
    value, storages = _read_zip(file) if head[:1] == b"P" else _read_stream(file)
    # Tied weights may share a storage and a small one be expanded, but not beyond all measure.
    budget = 4 * file.size + (64 << 20)
    tensors = {}
    for name, tensor in _state_dict(value).items():
        storage = storages.get(tensor.storage.key, _Span(0, 0))
        budget -= _check(name, tensor, storage.size)
        if budget < 0:
            raise Refusal("tensors far larger than the file", "at most four times its size")
        tensors[name] = _stored(tensor, file.at, storage.start)
    return tensors
