"""Writes `torch.save` files byte by byte: every byte of a hostile file is ours, without torch."""

import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclass(frozen=True)
class Call:
    function: Any
    arguments: Any


@dataclass(frozen=True)
class Persistent:
    id: Any


@dataclass(frozen=True)
class Build:
    value: Any
    state: Any


@dataclass(frozen=True)
class Raw:
    opcodes: bytes


def encode(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            data = pickle.encode_long(value)
            return b"\x8b" + struct.pack("<i", len(data)) + data
        case str():
            data = value.encode(errors="surrogatepass")
            return b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
        case Global(module, name):
            return f"c{module}\n{name}\n".encode(errors="surrogatepass")
        case Call(function, arguments):
            return encode(function) + encode(arguments) + b"R"
        case Persistent(id):
            return encode(id) + b"Q"
        case Build(target, state):
            return encode(target) + encode(state) + b"b"
        case Raw(opcodes):
            return opcodes
    raise AssertionError(value)


def dumps(value: Any) -> bytes:
    return b"\x80\x02" + encode(value) + b"."


MAGIC = 0x1950A86A20F9469CFC6C
ORDERED_DICT = Call(Global("collections", "OrderedDict"), ())


def storage(kind: str = "FloatStorage", key: Any = "0", numel: Any = 6) -> Persistent:
    return Persistent(("storage", Global("torch", kind), key, "cpu", numel))


def tensor(
    source: Any = None, offset: Any = 0, shape: Any = (2, 3), stride: Any = (3, 1), *metadata: Any
) -> Call:
    arguments = (source or storage(), offset, shape, stride, False, ORDERED_DICT, *metadata)
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


def entry(name: bytes, size: int, header: int, method: int = 0) -> bytes:
    """What the central directory of a zip says of a member; long numbers in a zip64 field."""
    numbers = [n for n in (size, size, header) if n >= 2**32 - 1]
    extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
    size, header = min(size, 2**32 - 1), min(header, 2**32 - 1)
    fields = struct.pack("<HHHHHHIII", 20, 20, 0, method, 0, 0, 0, size, size)
    lengths = struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, header)
    return b"PK\1\2" + fields + lengths + name + extra


def typed(dtype: str, numel: int, nbytes: int) -> Call:
    """A tensor of a dtype that has no storage type of its own."""
    source = Persistent(("storage", Global("torch.storage", "UntypedStorage"), "0", "cpu", nbytes))
    arguments = (source, 0, (numel,), (1,), False, ORDERED_DICT, Global("torch", dtype))
    return Call(Global("torch._utils", "_rebuild_tensor_v3"), arguments)


def zip_archive(members: dict[str, bytes], method: int = 0, *more: bytes) -> bytes:
    """A zip as torch writes it, and more entries of its central directory.

    Only the *local* extra field pads the data to 64 bytes.
    """
    parts, entries, header = [], [], 0
    for path, data in members.items():
        name = path.encode()
        pad = -(header + 30 + len(name) + 4) % 64
        extra = b"FB" + struct.pack("<H", pad) + bytes(pad)
        common = struct.pack("<HHHHHIII", 20, 0, method, 0, 0, 0, len(data), len(data))
        lengths = struct.pack("<HH", len(name), len(extra))
        parts.append(b"PK\3\4" + common + lengths + name + extra + data)
        entries.append(entry(name, len(data), header, method))
        header += len(parts[-1])
    count, directory = len(entries) + len(more), b"".join([*entries, *more])
    count = min(count, 2**16 - 1)  # which nobody reads
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), header, 0)
    return b"".join(parts) + directory + b"PK\5\6" + end


def stream(value: Any, *storages: tuple[str, int, bytes], **changed: Any) -> bytes:
    """The container before the zip: pickles, then storages of a key, a size and data."""
    header = {"magic": MAGIC, "version": 1001, "info": {"little_endian": True}} | changed
    pickles = (*header.values(), value, [key for key, _, _ in storages])
    tail = (struct.pack("<q", numel) + data for _, numel, data in storages)
    return b"".join(map(dumps, pickles)) + b"".join(tail)


STORAGES = {
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}


def write_bin(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a state dict as `torch.save` does."""
    entries, members = {}, {}
    for key, (name, array) in enumerate(tensors.items()):
        strides = tuple(int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim))
        source = storage(STORAGES[array.dtype.name], str(key), array.size)
        entries[name] = tensor(source, 0, array.shape, strides)
        members[f"archive/data/{key}"] = array.tobytes()
    path.write_bytes(
        zip_archive({"archive/data.pkl": dumps(entries), "archive/byteorder": b"little"} | members)
    )
