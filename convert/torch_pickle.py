"""Reads the tensors of a PyTorch checkpoint (`pytorch_model.bin`) without PyTorch and without risk.

A `torch.save` file is a pickle beside raw storages, and a pickle is a program: `pickle.load` calls
any function it names. Here the file never reaches `pickle`. `pickletools.genops`, which decodes
and does not execute, feeds a small stack machine that knows the opcodes a state dict needs; a
global becomes an inert name, and REDUCE picks one of five rebuild rules below. BUILD sets nothing,
no name is imported, no attribute is looked up, and every size is checked before it is believed.

Two containers hold that pickle (torch 2.13, `torch/serialization.py`):

* zip (`_save`, since 1.6): `<root>/data.pkl`, optional `<root>/byteorder`, and one *stored* member
  `<root>/data/<key>` a storage. `PyTorchStreamWriter` pads the extra field of the *local* header
  until a storage is aligned (64 bytes), so its data lies at local header + 30 + name + extra, with
  the lengths of that header and not of the central directory (APPNOTE.TXT 4.3.7).
* stream (`_legacy_save`): five pickles (magic, protocol version, system info, the object, the
  storage keys), then a storage each: int64 element count, little-endian data.

In both, the persistent id `('storage', type, key, location, numel)` stands for a storage, and
`_rebuild_tensor_v2` views it by offset, size and stride, all in elements. `_rebuild_tensor_v3` is
for dtypes without a storage type of their own (uint16/32/64, fp8): bytes, the dtype passed apart.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_drift.errors import DriftError

_Bytes = npt.NDArray[np.uint8]

_MAX_PICKLE_BYTES = 64 << 20
_MAX_OPCODES = 4_000_000  # about 40 a tensor; bounds time, and memory where one byte makes a dict
_MAX_DIMS = 32
_MAX_DIM = 2**31 - 1  # an MLX shape is int32
_MAX_ELEMENTS = 2**59  # their count of bytes still fits int64

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
_STORAGE_DTYPES = {
    "torch.BFloat16Storage": "torch.bfloat16",
    "torch.HalfStorage": "torch.float16",
    "torch.FloatStorage": "torch.float32",
    "torch.DoubleStorage": "torch.float64",
    "torch.CharStorage": "torch.int8",
    "torch.ShortStorage": "torch.int16",
    "torch.IntStorage": "torch.int32",
    "torch.LongStorage": "torch.int64",
    "torch.ByteStorage": "torch.uint8",
    "torch.BoolStorage": "torch.bool",
    "torch.storage.UntypedStorage": "torch.uint8",  # its numel counts bytes
}
_FLOAT8 = {f"torch.float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")}
_FUNCTIONS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
}
# Every other global is refused; these are only names.
_GLOBALS = _FUNCTIONS | _STORAGE_DTYPES.keys() | _DTYPES.keys() | _FLOAT8

_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_OPERANDS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}  # others: to a MARK

_RESAVE = "load it in PyTorch only if you trust it, and save its tensors as safetensors"


class _Refusal(Exception):
    """What was found, what was expected, what to do; the reader adds the file's name."""

    def __init__(self, found: str, expected: str, remedy: str = _RESAVE) -> None:
        super().__init__(f"found {found}, expected {expected}; {remedy}")


@dataclass(frozen=True)
class _Global:
    """An inert name: never imported, never called."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * np.dtype(_DTYPES[self.dtype][0]).itemsize


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A view of a storage; its fields are the file's claims, checked when it is read."""

    storage: _Storage
    dtype: str
    offset: Any
    shape: Any
    stride: Any


class _Machine:
    """The stack machine of the pickle format, for dicts, lists, tuples, scalars and tensors.

    Hashing, comparing or printing an untrusted container can take exponential time or overflow the
    C stack, so values are only moved; dict keys are strings or small integers.
    """

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes]) -> Any:
        """Executes one pickle and leaves `stream` behind its STOP."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if count == _MAX_OPCODES:
                    raise _Refusal(f"more than {_MAX_OPCODES} pickle opcodes", "a state dict")
                self._step(opcode.name, argument, count)
            return self._stack.pop()
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise _Refusal(f"a malformed pickle ({error!s:.80})", "one torch.save wrote") from error

    def _step(self, opcode: str, argument: Any, count: int) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_LITERALS[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._operands(opcode)))
            case "APPEND" | "APPENDS":
                self._extend(self._operands(opcode))
            case "SETITEM" | "SETITEMS":
                self._update(self._operands(opcode))
            case "BINPUT" | "LONG_BINPUT" if argument <= count:
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(_resolve(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_resolve(".".join((module, name))))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_rebuild(function, arguments))
            case "BUILD" if isinstance(stack[-2], dict):
                stack.pop()  # attributes of an OrderedDict: the `_metadata` of a state dict
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                raise _Refusal(f"the pickle opcode {opcode}", "those of a plain state dict")

    def _operands(self, opcode: str) -> list[Any]:
        count = _OPERANDS.get(opcode)
        start = self._marks.pop() if count is None else len(self._stack) - count
        if not 0 <= start <= len(self._stack):
            raise IndexError("stack underflow")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise TypeError("append to what is no list")
        self._stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict):
            raise TypeError("item of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 2**31):
                raise TypeError("a dict key that is neither a string nor a small integer")
            self._stack[-1][key] = value

    def _storage(self, persistent_id: Any) -> _Storage:
        match persistent_id:
            # The stream container appends the metadata of a storage view, None since torch 0.4.
            case ("storage", _Global(kind), str(key), _, int(numel), *view) if view in ([], [None]):
                if kind in _STORAGE_DTYPES and 0 <= numel <= _MAX_ELEMENTS:
                    storage = _Storage(key, _STORAGE_DTYPES[kind], numel)
                    if self.storages.setdefault(key, storage) == storage:
                        return storage
        raise _Refusal("an unknown persistent id", "('storage', type, key, location, numel)")


def _resolve(name: str) -> _Global:
    if name not in _GLOBALS:
        raise _Refusal(f"the global {name!r:.80}", "tensors and plain containers only")
    return _Global(name)


def _rebuild(function: Any, arguments: Any) -> Any:
    """The value of REDUCE; hooks and requires_grad of a tensor mean nothing here."""
    match function, arguments:
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("torch.Size"), (tuple(sizes),):
            return sizes
        case _Global("torch._utils._rebuild_parameter"), (_Tensor() as data, _, _):
            return data
        case (
            _Global("torch._utils._rebuild_tensor_v2"),
            (_Storage() as storage, offset, shape, stride, _, _, *metadata),
        ) if not any(metadata):  # metadata marks the lazy conjugate and negative views
            return _Tensor(storage, storage.dtype, offset, shape, stride)
        case (
            _Global("torch._utils._rebuild_tensor_v3"),
            (_Storage() as storage, offset, shape, stride, _, _, _Global(dtype), *metadata),
        ) if not any(metadata):
            return _Tensor(storage, dtype, offset, shape, stride)
    name = function.name if isinstance(function, _Global) else f"a {type(function).__name__}"
    raise _Refusal(f"a call of {name} with unknown arguments", "a tensor, parameter or OrderedDict")


def _read_zip(data: _Bytes, file: IO[bytes]) -> tuple[Any, dict[str, _Bytes]]:
    """The object of a zip container, and the bytes of each storage by its key."""
    members = _zip_members(data, file)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _Refusal(f"{len(pickles)} members named data.pkl", "one, as torch.save writes")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise _Refusal("a TorchScript archive", "a state dict", "torch.save its state_dict()")
    byteorder = members.get(f"{root}byteorder")
    if byteorder is not None and byteorder[:8].tobytes() != b"little":
        raise _Refusal("a byteorder other than little", "little", "save it on such a machine")
    pickled = members[pickles[0]]
    if len(pickled) > _MAX_PICKLE_BYTES:
        raise _Refusal(f"a pickle of {len(pickled)} bytes", f"at most {_MAX_PICKLE_BYTES}")
    value = _Machine().run(io.BytesIO(pickled.tobytes()))
    prefix = f"{root}data/"
    return value, {n.removeprefix(prefix): m for n, m in members.items() if n.startswith(prefix)}


def _zip_members(data: _Bytes, file: IO[bytes]) -> dict[str, _Bytes]:
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error) as e:
        raise _Refusal(f"a broken zip archive ({e!s:.80})", "a whole one", "fetch it again") from e
    members: dict[str, _Bytes] = {}
    for info in infos:
        if info.filename in members or info.compress_type != zipfile.ZIP_STORED:
            raise _Refusal(f"the member {info.filename!r:.80} twice or compressed", "stored once")
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
    raise _Refusal(f"the member {info.filename!r:.80} cut off", "a whole file", "fetch it again")


def _read_stream(data: _Bytes) -> tuple[Any, dict[str, _Bytes]]:
    """The object of a stream container, and the bytes of each storage by its key."""
    stream = io.BytesIO(data[:_MAX_PICKLE_BYTES].tobytes())
    if _Machine().run(stream) != _STREAM_MAGIC or _Machine().run(stream) != _STREAM_VERSION:
        raise _Refusal("a pickle without PyTorch's magic number", "a torch.save file")
    match _Machine().run(stream):
        case {"little_endian": True}:
            pass
        case _:
            raise _Refusal("a byteorder other than little", "little", "save it on such a machine")
    machine = _Machine()
    value = machine.run(stream)
    members: dict[str, _Bytes] = {}
    keys, start = _Machine().run(stream), stream.tell()
    for key in keys if isinstance(keys, list) else ():
        storage = machine.storages.get(key) if isinstance(key, str) else None
        count = int.from_bytes(data[start : start + 8].tobytes(), "little")
        if storage is None or count != storage.numel:
            raise _Refusal("a storage missing or of another size", "the one its tensors name")
        start += 8
        members[storage.key] = data[start : start + storage.nbytes]
        start += storage.nbytes
    return value, members


def _state_dict(value: Any) -> dict[str, _Tensor]:
    """The named tensors, out of the wrappers of training code; all else is left behind."""
    for _ in _WRAPPERS:  # bounded: a dict may hold itself
        inner = (value.get(name) for name in _WRAPPERS) if isinstance(value, dict) else ()
        value = next((item for item in inner if isinstance(item, dict)), value)
    if isinstance(value, dict):
        tensors = {name: item for name, item in value.items() if isinstance(item, _Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            return tensors
    raise _Refusal("no tensors by name", f"a state dict, plain or under {', '.join(_WRAPPERS)}")


def _checked_nbytes(name: str, tensor: _Tensor, available: int) -> int:
    """The size of a tensor once copied, its every element proven to lie inside its storage."""
    what = f"the tensor {name!r:.80} with"
    if tensor.dtype not in _DTYPES:
        remedy = "dequantize it to bfloat16 first"
        raise _Refusal(f"{what} dtype {tensor.dtype}", "a dtype MLX has", remedy)
    offset, shape, stride = tensor.offset, tensor.shape, tensor.stride
    if not (isinstance(shape, tuple) and isinstance(stride, tuple)) or not (
        len(shape) == len(stride) <= _MAX_DIMS
        and _all_between((offset, *stride), _MAX_ELEMENTS)
        and _all_between(shape, _MAX_DIM)
    ):
        raise _Refusal(f"{what} an impossible offset, shape or stride", "whole numbers in range")
    numel = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    itemsize = np.dtype(_DTYPES[tensor.dtype][0]).itemsize
    if numel and (last + 1) * itemsize > tensor.storage.nbytes:
        raise _Refusal(f"{what} elements outside its storage", "a view inside it")
    if available < tensor.storage.nbytes:
        raise _Refusal(f"{what} a missing or short storage", "all its bytes", "fetch it again")
    return numel * itemsize


def _all_between(values: Sequence[Any], limit: int) -> bool:
    return all(type(value) is int and 0 <= value <= limit for value in values)


def _to_mlx(tensor: _Tensor, storage: _Bytes) -> mx.array:
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
    except _Refusal as refusal:
        raise DriftError(f"{path}: {refusal}") from refusal


def _read(file: IO[bytes]) -> dict[str, mx.array]:
    head = file.read(4)
    if head != b"PK\3\4" and head[:1] != b"\x80":
        raise _Refusal("neither a zip archive nor a pickle", "a torch.save file", "fetch it again")
    data: _Bytes = np.memmap(file, np.uint8, "r")
    value, storages = _read_zip(data, file) if head[0] == ord("P") else _read_stream(data)
    # Tied weights may share a storage and a small one be expanded, but not beyond all measure.
    budget = 4 * len(data) + (64 << 20)
    arrays = {}
    for name, tensor in _state_dict(value).items():
        storage = storages.get(tensor.storage.key, data[:0])
        budget -= _checked_nbytes(name, tensor, len(storage))
        if budget < 0:
            raise _Refusal("tensors far larger than the file", "at most four times its size")
        arrays[name] = _to_mlx(tensor, storage)
    return arrays
