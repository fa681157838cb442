"""`read_torch_checkpoint` against hand-made files, and (marked torch) against `torch.save`."""

import copyreg
import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_drift.convert.read import inert_pickle, torch_pickle
from mlx_drift.convert.read.stored import StoredTensor, file_reader, to_mlx
from mlx_drift.convert.read.torch_pickle import read_torch_checkpoint
from mlx_drift.errors import DriftError
from torch_files import (
    MAGIC,
    ORDERED_DICT,
    Build,
    Call,
    Global,
    Persistent,
    Raw,
    dumps,
    encode,
    entry,
    storage,
    stream,
    tensor,
    typed,
    zip_archive,
)

FLOATS = np.arange(6, dtype=np.float32)
MEMBERS = {
    "archive/data.pkl": dumps({"w": tensor()}),
    "archive/byteorder": b"little",
    "archive/data/0": FLOATS.tobytes(),
    "archive/version": b"3\n",
}


def checkpoint(value: Any, data: bytes = FLOATS.tobytes()) -> bytes:
    return zip_archive(MEMBERS | {"archive/data.pkl": dumps(value), "archive/data/0": data})


def opened(tmp_path: Path, data: bytes) -> dict[str, StoredTensor]:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data)
    return read_torch_checkpoint(path)


def read(tmp_path: Path, data: bytes) -> dict[str, mx.array]:
    return {name: tensor.whole() for name, tensor in opened(tmp_path, data).items()}


def refusal(tmp_path: Path, data: bytes) -> str:
    """The message of the refusal, behind the name of the file."""
    with pytest.raises(DriftError) as caught:
        opened(tmp_path, data)
    name, _, message = str(caught.value).partition(": ")
    assert name == str(tmp_path / "pytorch_model.bin")
    assert "\n" not in message
    assert len(message) < 300
    return message


def bits(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()


# What is accepted.


def test_imports_neither_torch_nor_pickle():
    assert {"torch", "pickle"}.isdisjoint(vars(torch_pickle).keys() | vars(inert_pickle).keys())


def test_zip_container_reads_behind_the_local_header(tmp_path):
    array = read(tmp_path, zip_archive(MEMBERS))["w"]
    np.testing.assert_array_equal(np.array(array), FLOATS.reshape(2, 3))


def test_stream_container(tmp_path):
    source = Persistent((*storage().id, None))  # the view metadata of this container
    array = read(tmp_path, stream({"w": tensor(source)}, ("0", 6, FLOATS.tobytes())))["w"]
    np.testing.assert_array_equal(np.array(array), FLOATS.reshape(2, 3))


def test_names_keep_the_order_of_the_file(tmp_path):
    names = ["z", "a", "m.weight", "b"]
    assert list(read(tmp_path, checkpoint({name: tensor() for name in names}))) == names


def test_byteorder_member_is_optional(tmp_path):
    members = {name: data for name, data in MEMBERS.items() if name != "archive/byteorder"}
    assert list(read(tmp_path, zip_archive(members))) == ["w"]


def test_ordered_dict_with_the_metadata_of_a_state_dict(tmp_path):
    state = Build(
        Raw(encode(ORDERED_DICT) + encode("w") + encode(tensor()) + b"s"), {"_metadata": {}}
    )
    assert list(read(tmp_path, checkpoint(state))) == ["w"]


def test_empty_tensor_with_the_largest_dimensions(tmp_path):
    shape = (2**31 - 1, 0, 2**28)
    array = read(tmp_path, checkpoint({"w": tensor(None, 0, shape, (0,) * 3)}))["w"]
    assert array.shape == shape
    assert array.size == 0


def test_the_stride_of_a_dimension_of_one_is_free(tmp_path):
    array = read(tmp_path, checkpoint({"w": tensor(None, 2, (1, 2), (2**59, 3))}))["w"]
    assert array.tolist() == [[2, 5]]


CARRIED = ["BFloat16", "Half", "Float", "Char", "Short", "Int", "Long", "Byte"]
CARRIED_DTYPES = ["bfloat16", "float16", "float32", "int8", "int16", "int32", "int64", "uint8"]
RANDOM = np.random.default_rng(0).bytes(48)  # not a number, by chance, among them


@pytest.mark.parametrize(("kind", "dtype"), [*zip(CARRIED, CARRIED_DTYPES, strict=True)])
def test_storage_types_bit_for_bit(tmp_path, kind, dtype):
    dtype = getattr(mx, dtype)
    view = tensor(storage(f"{kind}Storage", numel=48 // dtype.size), 0, (48 // dtype.size,), (1,))
    array = read(tmp_path, checkpoint({"w": view}, RANDOM))["w"]
    assert (array.dtype, bits(array)) == (dtype, RANDOM)


@pytest.mark.parametrize("dtype", [*CARRIED_DTYPES, "uint16", "uint32", "uint64"])
def test_dtypes_apart_from_the_storage_bit_for_bit(tmp_path, dtype):
    view = typed(dtype, 48 // getattr(mx, dtype).size, 48)
    array = read(tmp_path, checkpoint({"w": view}, RANDOM))["w"]
    assert (array.dtype, bits(array)) == (getattr(mx, dtype), RANDOM)


@pytest.mark.parametrize(
    ("dtype", "codes", "values"),
    [
        ("float8_e4m3fn", "00 01 38 7e 80 b8 ff", [0, 2**-9, 1, 448, -0.0, -1, math.nan]),
        ("float8_e5m2", "00 01 3c 7b fc bc ff", [0, 2**-16, 1, 57344, -math.inf, -1, math.nan]),
    ],
)
def test_float8_is_read_as_bfloat16(tmp_path, dtype, codes, values):
    array = read(tmp_path, checkpoint({"w": typed(dtype, 7, 7)}, bytes.fromhex(codes)))["w"]
    assert array.dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(array.astype(mx.float32)), np.float32(values))


def test_bool_bytes_above_one_are_true(tmp_path):
    flags = tensor(storage("BoolStorage", numel=4), 0, (4,), (1,))
    array = read(tmp_path, checkpoint({"w": flags}, b"\0\1\2\xff"))["w"]
    assert (array.dtype, bits(array)) == (mx.bool_, b"\0\1\1\1")


def test_float64_is_rounded_to_float32(tmp_path):
    values = np.array([0.1, 1e300, -np.inf, 2.0])
    view = tensor(storage("DoubleStorage", numel=4), 0, (4,), (1,))
    array = read(tmp_path, checkpoint({"w": view}, values.tobytes()))["w"]
    assert array.dtype == mx.float32
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(np.array(array), values.astype(np.float32))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
def test_unwraps(tmp_path, wrapper):
    value = {"step": 3, wrapper: {"w": tensor()}, "optimizer": {"m": tensor()}}
    assert list(read(tmp_path, checkpoint(value))) == ["w"]


def test_unwraps_twice(tmp_path):
    assert list(read(tmp_path, checkpoint({"model": {"module": {"w": tensor()}}}))) == ["w"]


def test_returns_tensors_only(tmp_path):
    value = {"w": tensor(), "steps": [1, 2], "name": "x", "n": None, "size": (1, True), "d": {}}
    assert list(read(tmp_path, checkpoint(value))) == ["w"]


def test_a_small_tensor_may_be_expanded(tmp_path):
    array = read(tmp_path, checkpoint({"w": tensor(None, 5, (1000,), (0,))}))["w"]
    assert array.shape == (1000,)
    assert mx.all(array == 5).item()


# How rows are read.

MANY = np.arange(120, dtype=np.float32)
VIEWS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {  # offset, shape, stride
    "whole": (0, (5, 6, 4), (24, 4, 1)),
    "slice": (26, (3, 4, 4), (24, 4, 1)),
    "inner slice": (2, (5, 6, 2), (24, 4, 1)),
    "every other": (0, (3, 6, 2), (48, 4, 2)),
    "transposed": (0, (4, 30), (1, 4)),
    "permuted": (0, (6, 4, 5), (4, 1, 24)),
    "column": (3, (30,), (4,)),
    "rows expanded": (7, (6, 5), (0, 1)),
    "columns expanded": (7, (6, 5), (2, 0)),
    "one value expanded": (7, (6, 5), (0, 0)),
    "one row": (7, (1, 5), (99, 2)),
    "scalar": (119, (), ()),
    "empty": (120, (0, 3), (60, 1)),
    "rows of nothing": (120, (3, 0), (1, 1)),
}


def many(offset: int = 0, shape: Any = (120,), stride: Any = (1,)) -> bytes:
    source = storage(numel=MANY.size)
    return checkpoint({"w": tensor(source, offset, shape, stride)}, MANY.tobytes())


@pytest.mark.parametrize("limits", [{}, {"_GAP_BYTES": 8}, {"_GAP_BYTES": 8, "BLOCK_BYTES": 16}])
@pytest.mark.parametrize("view", VIEWS)
def test_blocks_of_rows_are_the_whole(tmp_path, monkeypatch, view, limits):
    for name, limit in limits.items():
        monkeypatch.setattr(torch_pickle, name, limit)
    offset, shape, stride = VIEWS[view]
    strides = [4 * step for step in stride]
    expected = np.lib.stride_tricks.as_strided(MANY[offset:], shape, strides)
    stored = opened(tmp_path, many(offset, shape, stride))["w"]
    assert (stored.shape, stored.stored) == (shape, "F32")
    np.testing.assert_array_equal(np.array(stored.whole()), expected)
    for step in range(1, max(shape, default=0)):
        for first in range(0, shape[0], step):
            block = stored.read(first, min(first + step, shape[0]))
            np.testing.assert_array_equal(block, expected[first : first + step])


@pytest.mark.parametrize("rows", [(-1, 1), (0, 6), (3, 2), (6, 7)])
def test_rows_outside_the_tensor_are_an_error(tmp_path, rows):
    stored = opened(tmp_path, many(0, (5, 24), (24, 1)))["w"]
    with pytest.raises(IndexError, match="of a tensor of 5"):
        stored.read(*rows)


@pytest.mark.parametrize(
    ("view", "rows", "limits", "spans"),
    {
        "contiguous": ((0, (30, 4), (4, 1)), (2, 5), (8, 64), [(32, 48)]),
        "with an offset": ((1, (29, 4), (4, 1)), (2, 5), (8, 64), [(36, 48)]),
        "large": ((0, (1, 32), (32, 1)), (0, 1), (8, 64), [(0, 64), (64, 64)]),
        "transposed, near": ((0, (4, 30), (1, 4)), (2, 4), (480, 480), [(8, 29 * 16 + 8)]),
        "transposed, far": (
            (0, (4, 9), (1, 4)),
            (2, 4),
            (8, 64),
            [(8 + 16 * i, 8) for i in range(9)],
        ),
        "expanded": ((0, (4, 2), (0, 100)), (1, 4), (8, 64), [(0, 4), (400, 4)]),
    }.values(),
)
def test_reads_the_rows_and_short_gaps(tmp_path, monkeypatch, view, rows, limits, spans):
    data, seen = many(*view), []

    def recording(path):
        read_at = file_reader(path)
        return lambda offset, count: seen.append((offset, count)) or read_at(offset, count)

    for name, limit in zip(("_GAP_BYTES", "BLOCK_BYTES"), limits, strict=True):
        monkeypatch.setattr(torch_pickle, name, limit)
    monkeypatch.setattr(torch_pickle, "file_reader", recording)
    stored = opened(tmp_path, data)["w"]
    seen.clear()
    stored.read(*rows)
    base = data.index(MANY.tobytes())
    assert seen == [(base + start, size) for start, size in spans]


@pytest.fixture
def vast(tmp_path):
    """A file of 8 GB, sparse on disk: its first and last element, and its last six."""
    numel, path = 2_000_000_000, tmp_path / "pytorch_model.bin"
    far = tensor(storage(numel=numel), 0, (2,), (numel - 1,))
    few = tensor(storage(numel=numel), numel - 6)
    path.write_bytes(stream({"far": far, "few": few}, ("0", numel, b"")))
    size = path.stat().st_size + 4 * numel
    os.truncate(path, size)
    with path.open("r+b") as file:
        file.seek(-24, 2)
        file.write(FLOATS.tobytes())
    return path


def test_a_large_file_opens_without_being_read(vast):
    start = time.perf_counter()
    stored = read_torch_checkpoint(vast)
    tracemalloc.start()
    assert stored["few"].whole().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert stored["far"].whole().tolist() == [0, 5]
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert time.perf_counter() - start < 2  # generous: it copies up to 64 MiB for the pickles


def test_a_file_that_became_shorter(tmp_path):
    view = tensor(storage(numel=6))
    stored = opened(tmp_path, stream({"w": view}, ("0", 6, FLOATS.tobytes())))["w"]
    path = tmp_path / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size - 1)
    assert stored.read(0, 1).tolist() == [[0, 1, 2]]
    with pytest.raises(DriftError, match=r"pytorch_model\.bin: ends too soon"):
        stored.read(1, 2)
    path.unlink()
    with pytest.raises(DriftError, match="cannot be read"):
        stored.read(0, 1)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="nowhere to count them")
def test_leaves_no_file_open(tmp_path):
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    stored = opened(tmp_path, many())["w"]
    assert [stored.read(i, i + 1).item() for i in range(120)] == MANY.tolist()
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


# What is refused: the container.


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "neither a zip"),
        (b"\x80", "malformed pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "neither a zip"),
        (b"PK\3\4 and no more", "broken zip"),
        (zip_archive({}), "neither a zip"),
        (zip_archive({"archive/version": b"3"}), "0 members named data.pkl"),
        (zip_archive(MEMBERS | {"other/data.pkl": b""}), "2 members named data.pkl"),
        (zip_archive(MEMBERS | {"archive/constants.pkl": b""}), "TorchScript"),
        (zip_archive(MEMBERS | {"archive/byteorder": b"big"}), "byteorder"),
        (zip_archive(MEMBERS, method=8), "compressed"),
        (zip_archive(MEMBERS)[100:], "neither a zip"),
        (zip_archive(MEMBERS)[:-1], "broken zip"),
        (stream({}, magic=MAGIC + 1), "magic number"),
        (stream({}, version=1000), "magic number"),
        (stream({}, info={"little_endian": False}), "byteorder"),
        (stream({}, info=[]), "byteorder"),
        (stream({}, magic=Raw(encode(MAGIC) + b"q\0"), version=Raw(b"h\0")), "malformed pickle"),
        (pickle.dumps({"w": 1}, 4), "magic number"),
    ],
)
def test_refuses_container(tmp_path, data, found):
    assert found in refusal(tmp_path, data)


def test_refuses_a_member_named_twice(tmp_path):
    data = zip_archive({"a/data.pkl": b"", "a/data.pk1": b""}).replace(b"data.pk1", b"data.pkl")
    assert "twice" in refusal(tmp_path, data)


HEADER = zip_archive(MEMBERS).index(b"archive/data/0") - 30
NESTED = b"PK\3\4" + bytes(26)  # the data of a member that looks like another one


@pytest.mark.parametrize(
    "more",
    {
        "the same data": entry(b"archive/data/1", 24, HEADER),
        "nothing, in the same place": entry(b"archive/data/1", 0, HEADER),
        "inside the data": entry(b"archive/data/1", 8, zip_archive({"a/0": NESTED}).index(NESTED)),
        "before the file": entry(b"archive/data/1", 24, 2**64 - 64),
        "behind the members": entry(b"archive/data/1", 24, len(zip_archive(MEMBERS)) - 30),
        "of 2**63 bytes": entry(b"archive/data/1", 2**63, HEADER),
        "at 2**63": entry(b"archive/data/1", 24, 2**63),
    }.items(),
    ids=lambda case: case[0],
)
def test_refuses_a_further_member(tmp_path, more):
    members = {"a/0": NESTED} | MEMBERS if more[0] == "inside the data" else MEMBERS
    assert "overlapping or out-of-range" in refusal(tmp_path, zip_archive(members, 0, more[1]))


@pytest.mark.parametrize("last", ["archive/data/0", "archive/version"])
@pytest.mark.parametrize("more", [1, 64, 2**31])
def test_refuses_a_member_that_reaches_into_what_follows(tmp_path, last, more):
    data = bytearray(
        zip_archive({n: d for n, d in MEMBERS.items() if n != last} | {last: MEMBERS[last]})
    )
    claim = data.rindex(b"archive/data/0") - 46 + 20  # in the central directory
    assert struct.unpack_from("<II", data, claim) == (24, 24)
    struct.pack_into("<II", data, claim, 24 + more, 24 + more)
    assert "overlapping or out-of-range" in refusal(tmp_path, bytes(data))


def test_refuses_a_member_without_a_local_header(tmp_path):
    data = zip_archive(MEMBERS)
    data = data[:64] + data[64:].replace(b"PK\3\4", b"PK\0\0", 1)
    assert "without a header" in refusal(tmp_path, data)


def test_refuses_a_negative_header_offset(tmp_path):
    data = bytearray(zip_archive(MEMBERS))
    end = data.index(b"PK\5\6") + 16
    (directory,) = struct.unpack_from("<I", data, end)
    struct.pack_into("<I", data, end, directory + 4)  # zipfile shifts every offset by -4
    assert "out-of-range" in refusal(tmp_path, bytes(data))


def test_refuses_a_stored_member_of_two_sizes(tmp_path):
    data = bytearray(zip_archive(MEMBERS))
    struct.pack_into("<I", data, data.index(b"PK\1\2") + 20, 4)
    assert "two sizes" in refusal(tmp_path, bytes(data))


def test_refuses_a_directory_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_MAX_DIRECTORY_BYTES", 200)
    assert "a zip directory of" in refusal(tmp_path, zip_archive(MEMBERS))


def test_refuses_a_pickle_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_MAX_PICKLE_BYTES", 20)
    assert "pickle of" in refusal(tmp_path, zip_archive(MEMBERS))


def test_refuses_more_opcodes_than_any_state_dict_has(tmp_path, monkeypatch):
    monkeypatch.setattr(inert_pickle, "_MAX_OPCODES", 1000)
    assert "opcodes" in refusal(tmp_path, checkpoint(Raw(b"}" * 1001)))


@pytest.mark.parametrize(
    "data",
    [
        stream({"w": tensor()}),
        stream({"w": tensor()}, ("0", 6, bytes(23))),
        stream({"w": tensor()}, ("0", 7, bytes(28))),
        stream({"w": tensor()}, ("0", -6, bytes(24))),
        stream({"w": tensor()}, ("1", 6, bytes(24))),
        stream({"w": tensor()}, ("0", 6, bytes(24)), ("0", 6, bytes(24))),
        stream({"w": tensor(storage(numel=2**59))}, ("0", 2**59, bytes(24))),
    ],
    ids=["missing", "short", "other numel", "negative numel", "other key", "twice", "huge"],
)
def test_refuses_stream_storages(tmp_path, data):
    assert "storage" in refusal(tmp_path, data)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(DriftError, match="cannot be read"):
        read_torch_checkpoint(tmp_path / "absent.bin")


def test_refuses_a_folder(tmp_path):
    with pytest.raises(DriftError, match="cannot be read"):
        read_torch_checkpoint(tmp_path)


# What is refused: the pickle.


@dataclass
class Reduced:
    command: str

    def __reduce__(self):
        return os.system, (self.command,)


def attacks(flag: Path) -> dict[str, Raw]:
    """Pickles that create `flag` when `pickle.loads` runs them."""
    command = f"touch {flag}"
    touch = encode(command)
    code = encode(f"__import__('pathlib').Path({str(flag)!r}).touch()")
    call = encode((command,))
    evaluate = b"cbuiltins\neval\n(" + code + b"tR"
    hooks = encode((1, 2)) + b"0cos\nsystem\n" + call + b"R"
    partial = b"cfunctools\npartial\n(cbuiltins\nprint\ntR"
    state = encode((Global("os", "system"), (command,), {}, None))
    reduced = {n: pickle.dumps(Reduced(command), n) for n in (0, 2, 4)}
    return {
        "__reduce__, protocol 0": Raw(reduced[0][:-1]),
        "__reduce__, protocol 2": Raw(reduced[2][2:-1]),
        "__reduce__, protocol 4": Raw(reduced[4][11:-1]),  # behind PROTO and FRAME
        "__setstate__": Raw(partial + state + b"b)R"),
        "NEWOBJ": Raw(b"cfunctools\npartial\n(cos\nsystem\n" + touch + b"t\x81)R"),
        "EXT1": Raw(b"\x82\xf0" + call + b"R"),
        "EXT4": Raw(b"\x84\xf0\0\0\0" + call + b"R"),
        "os.system": Raw(b"cos\nsystem\n" + call + b"R"),
        "posix.system": Raw(b"cposix\nsystem\n" + call + b"R"),
        "builtins.eval": Raw(evaluate),
        "__builtin__.eval": Raw(evaluate.replace(b"builtins", b"__builtin__")),
        "builtins.exec": Raw(evaluate.replace(b"eval", b"exec")),
        "in the arguments of REDUCE": Raw(b"ccollections\nOrderedDict\n(](" + evaluate + b"0etR"),
        "in the state of BUILD": Raw(
            b"ccollections\nOrderedDict\n)R}" + encode("x") + evaluate + b"sb"
        ),
        "BUILD of an attribute": Raw(b"cargparse\nNamespace\n)R}" + encode("x") + evaluate + b"sb"),
        "STACK_GLOBAL": Raw(encode("os") + encode("system") + b"\x93" + call + b"R"),
        "INST": Raw(b"(" + touch + b"ios\nsystem\n"),
        "OBJ": Raw(b"(cos\nsystem\n" + touch + b"o"),
        "POP": Raw(hooks),
        "getattr": Raw(
            b"cbuiltins\ngetattr\n(cos\n_wrap_close\n" + encode("__init__") + b"tR0" + evaluate
        ),
    }


@pytest.mark.skipif(sys.platform == "win32", reason="the attacks speak POSIX")
@pytest.mark.parametrize("attack", attacks(Path("flag")))
@pytest.mark.parametrize("container", [checkpoint, stream])
def test_executes_nothing(tmp_path, request, attack, container):
    flag = tmp_path / "flag"
    opcodes = attacks(flag)[attack]
    if attack.startswith("EXT"):
        copyreg.add_extension("os", "system", 0xF0)
        request.addfinalizer(lambda: copyreg.remove_extension("os", "system", 0xF0))
    pickle.loads(dumps(opcodes))
    assert flag.exists(), "the attack is live"
    flag.unlink()
    refusal(tmp_path, container({"w": tensor(), "x": opcodes}))
    assert not flag.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "builtins eval",
        "builtins getattr",
        "builtins set",
        "torch load",
        "torch.serialization load",
        "torch._utils _rebuild_sparse_tensor",
        "torch._utils _rebuild_qtensor",
        "torch._utils _rebuild_wrapper_subclass",
        "torch ComplexFloatStorage",
        "torch.cuda FloatStorage",
        "torch.jit _Anything",
        "numpy.core.multiarray _reconstruct",
        "argparse Namespace",
        "collections OrderedDict.fromkeys",
    ],
)
def test_refuses_every_other_global(tmp_path, name):
    message = refusal(tmp_path, checkpoint({"x": Global(*name.split(" ")), "w": tensor()}))
    assert f"the global '{name.replace(' ', '.')}'" in message


ONE = encode(1)
CLASS = encode(Global("collections", "OrderedDict"))


@pytest.mark.parametrize(
    ("opcode", "opcodes"),
    {
        "INST": b"(icollections\nOrderedDict\n",
        "OBJ": b"(" + CLASS + b"o",
        "NEWOBJ": CLASS + b")\x81",
        "NEWOBJ_EX": CLASS + b")}\x92",
        "EXT1": b"\x82\x01",
        "EXT2": b"\x83\x01\x01",
        "EXT4": b"\x84\x01\x01\x01\x01",
        "PERSID": b"P0\n",
        "BYTEARRAY8": b"\x96" + bytes(8),
        "NEXT_BUFFER": b"\x97",
        "BINBYTES": b"B" + bytes(4),
        "EMPTY_SET": b"\x8f",
        "DUP": ONE + b"2",
        "BUILD": ONE + b"}b",
        "BINPUT": b"Nq\xff",
        "LONG_BINPUT": b"Nr\xff\xff\xff\x7f",  # an array-backed memo would take 16 GiB
    }.items(),
)
def test_refuses_opcode(tmp_path, opcode, opcodes):
    assert f"opcode {opcode}," in refusal(tmp_path, checkpoint(Raw(opcodes)))


def test_refuses_build_on_a_tensor(tmp_path):
    edited = Build(tensor(), {"offset": -1})
    assert "opcode BUILD" in refusal(tmp_path, checkpoint({"w": edited}))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"",
        b"R",
        b"Nb",
        b"t",
        b"N\x86",
        b"}(Nu",
        b"}Ns",
        b"NNa",
        b"NNNs",
        b"h\x00",
        b"Q",
        b"(((",
        b"NN\x93",
        b"\xff",
        b"X\xff\xff\xff\xffa",
        b"\x8b\xff\xff\xff\x7f",
        b"cos",
        b"I1",
        b"})Ns",
        b"](Ne" + encode(0) + b"Ns",
        b"}N)s",
        b"}" + ONE + b"\x85Ns",
        b"}\x8a\x10" + b"\x7f" * 16 + b"Ns",
    ],
)
def test_refuses_malformed(tmp_path, opcodes):
    assert "malformed pickle" in refusal(tmp_path, checkpoint(Raw(opcodes)))


def test_a_deep_tuple_is_no_key(tmp_path):
    deep = b"}(" + b")" + b"\x85" * 200_000 + b"Nu"  # its hash would overflow the C stack
    assert "dict key" in refusal(tmp_path, checkpoint(Raw(deep)))


def test_a_long_string_is_no_key(tmp_path):
    assert "dict key" in refusal(tmp_path, checkpoint({"w" * 1001: tensor()}))


def test_a_wide_tuple_is_never_printed(tmp_path):
    wide = b")" + b"q\0h\0\x86" * 60  # its repr has 2**60 parts
    for opcodes in (wide, wide + b"Q", wide + b")R", wide + wide + b"\x93"):
        refusal(tmp_path, checkpoint(Raw(opcodes)))


def test_a_storage_key_is_never_printed(tmp_path):
    wide = Raw(b")" + b"q\0h\0\x86" * 60)
    refusal(tmp_path, stream({"w": tensor()}, (wide, 6, FLOATS.tobytes())))


def test_a_dict_may_hold_itself(tmp_path):
    refusal(tmp_path, checkpoint(Raw(b"}q\0" + encode("model") + b"h\0s")))


@pytest.mark.parametrize(
    "id",
    [
        "0",
        (),
        ("module", ORDERED_DICT, "f.py", "source"),
        ("storage", "FloatStorage", "0", "cpu", 6),
        ("storage", Global("torch", "Size"), "0", "cpu", 6),
        ("storage", Global("torch", "FloatStorage"), 0, "cpu", 6),
        ("storage", Global("torch", "FloatStorage"), "0" * 1001, "cpu", 6),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", -1),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", 2**100_000),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", 6, ("0", 0, 6)),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", 6, None, None),
    ],
)
def test_refuses_persistent_id(tmp_path, id):
    assert "persistent id" in refusal(tmp_path, checkpoint({"w": tensor(Persistent(id))}))


def test_refuses_a_storage_of_two_types(tmp_path):
    value = {"w": tensor(), "v": tensor(storage("IntStorage"))}
    assert "persistent id" in refusal(tmp_path, checkpoint(value))


@pytest.mark.parametrize(
    "call",
    [
        Call(Global("torch", "FloatStorage"), ()),
        Call(Global("torch", "float32"), ()),
        Call(Global("collections", "OrderedDict"), ([("w", 1)],)),
        Call(Global("torch", "Size"), (6,)),
        Call(Global("torch._utils", "_rebuild_parameter"), (1, True, None)),
        Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage(), 0)),
        Call("os.system", ("true",)),
        tensor(1),
        tensor(None, 0, (2, 3), (3, 1), {"conj": True}),
        typed("Size", 6, 24),
    ],
)
def test_refuses_call(tmp_path, call):
    assert "a call of" in refusal(tmp_path, checkpoint({"w": call}))


# What is refused: the tensors.


@pytest.mark.parametrize(
    "view",
    {
        "negative offset": tensor(None, -1, (1,), (1,)),
        "offset of no int": tensor(None, "0", (1,), (1,)),
        "huge offset": tensor(None, 2**5000, (1,), (1,)),
        "negative stride": tensor(None, 5, (2,), (-1,)),
        "huge stride": tensor(None, 0, (1,), (2**62,)),
        "negative shape": tensor(None, 0, (-2, -3), (3, 1)),
        "shape above int32": tensor(None, 0, (2**31,), (0,)),
        "empty but huge": tensor(None, 0, (0, 2**62), (0, 0)),
        "empty but huge in all": tensor(None, 0, (0, 2**30, 2**30), (0, 0, 0)),
        "shape of bools": tensor(None, 0, (True, 0), (0, 0)),
        "shape of no ints": tensor(None, 0, ("2",), (1,)),
        "shape of no tuple": tensor(None, 0, 6, 1),
        "shape and stride differ": tensor(None, 0, (2, 3), (1,)),
        "33 dimensions": tensor(None, 0, (1,) * 33, (0,) * 33),
    }.values(),
)
def test_refuses_impossible_view(tmp_path, view):
    assert "impossible" in refusal(tmp_path, checkpoint({"w": view}))


@pytest.mark.parametrize(
    "view",
    [
        tensor(None, 0, (7,), (1,)),
        tensor(None, 6, (), ()),
        tensor(None, 1, (2, 3), (3, 1)),
        tensor(None, 0, (2, 3), (4, 1)),
        tensor(storage(numel=0), 0, (1,), (0,)),
        tensor(None, 2**40, (1,), (1,)),
    ],
)
def test_refuses_elements_outside_the_storage(tmp_path, view):
    assert "outside its storage" in refusal(tmp_path, checkpoint({"w": view}))


def test_refuses_a_missing_storage(tmp_path):
    view = tensor(storage(key="1"))
    assert "storage" in refusal(tmp_path, checkpoint({"w": view}))


def test_a_storage_key_is_no_path(tmp_path):
    view = tensor(storage(key="../../etc/passwd"))
    assert "storage" in refusal(tmp_path, checkpoint({"w": view}))


def test_refuses_a_short_storage(tmp_path):
    assert "short storage" in refusal(tmp_path, checkpoint({"w": tensor()}, bytes(23)))


def test_refuses_a_tensor_expanded_beyond_measure(tmp_path):
    view = tensor(None, 0, (10**6, 10**6), (0, 0))
    assert "larger than the file" in refusal(tmp_path, checkpoint({"w": view}))


def test_refuses_many_expanded_tensors(tmp_path):
    views = {str(i): tensor(None, 0, (10**6,), (0,)) for i in range(20)}
    assert "larger than the file" in refusal(tmp_path, checkpoint(views))


@pytest.mark.parametrize(
    "view",
    [
        tensor(None, 0, (2, 2), (1, 1)),
        tensor(None, 0, (2, 2), (2, 2)),
        tensor(None, 0, (3, 2), (1, 2)),
        tensor(storage(numel=2**28), 0, (2,) * 26, (2**21,) * 26),  # halving it would take days
    ],
)
def test_refuses_elements_that_overlap(tmp_path, view):
    numel = view.arguments[0].id[-1]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(stream({"w": view}, ("0", numel, b"")))
    os.truncate(path, path.stat().st_size + 4 * numel)
    with pytest.raises(DriftError, match=r"elements that overlap.*contiguous\(\)"):
        read_torch_checkpoint(path)


def test_refuses_many_views_over_all_of_the_file(tmp_path):
    source = storage(numel=2**22)  # 16 MiB; reading two elements costs no time, but many would
    views = {str(i): tensor(source, 0, (2,), (2**22 - 1,)) for i in range(9)}
    assert "larger than the file" in refusal(tmp_path, checkpoint(views, bytes(2**24)))
    assert len(read(tmp_path, checkpoint(dict(list(views.items())[:8]), bytes(2**24)))) == 8


@pytest.mark.parametrize("dtype", ["e4m3fnuz", "e5m2fnuz", "e8m0fnu"])
def test_refuses_other_float8_by_name(tmp_path, dtype):
    message = refusal(tmp_path, checkpoint({"w": typed(f"float8_{dtype}", 24, 24)}))
    assert f"'w' with dtype F8_{dtype.upper().removesuffix('FNU')}" in message
    assert "dequantize" in message


@pytest.mark.parametrize("value", [tensor(), [tensor()], {}, {"w": 1}, {1: tensor()}, None])
def test_refuses_what_is_no_state_dict(tmp_path, value):
    assert "no tensors by name" in refusal(tmp_path, checkpoint(value))


# In a process of their own: without PyTorch, and in little time and memory.

MEASURE = """
import json, pathlib, resource, sys, time
sys.modules["torch"] = None  # an import raises
from mlx_drift.convert.read.torch_pickle import read_torch_checkpoint
from mlx_drift.errors import DriftError
for path in map(pathlib.Path, sys.argv[1:]):
    start = time.process_time()
    try:
        found = repr({name: t.whole().tolist() for name, t in read_torch_checkpoint(path).items()})
    except DriftError as error:
        found = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([found, time.process_time() - start, peak]))
assert not [name for name in sys.modules if name.startswith("torch.")]
"""


def measured(*paths: Path) -> list[tuple[str, float, int]]:
    """What came of each file, the seconds of work, the most bytes of memory so far."""
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    unit = 1 if sys.platform == "darwin" else 1024
    return [(f, s, unit * peak) for f, s, peak in map(json.loads, result.stdout.splitlines())]


N = inert_pickle._MAX_OPCODES
LARGE = 16 << 20
BOMBS = {
    "opcodes": lambda: checkpoint(Raw(b"]" * (2 * N))),
    "globals": lambda: checkpoint(Raw(encode(ORDERED_DICT.function) * (2 * N))),
    "memo": lambda: checkpoint(Raw(b"N" + b"\x94" * (N - 1000))),
    "nested dicts": lambda: checkpoint({"model": Raw(b"}" + b"K\1}" * (N // 4) + b"s" * (N // 4))}),
    "nested tuples": lambda: checkpoint({"model": Raw(b"N" + b"\x85" * (N - 1000))}),
    "doubled tuples": lambda: checkpoint({"model": Raw(b")" + b"q\0h\0\x86" * (N // 4))}),
    "long integer": lambda: checkpoint(Raw(b"\x8b" + struct.pack("<i", LARGE) + bytes(LARGE))),
    "long decimal": lambda: checkpoint(Raw(b"L" + b"9" * LARGE + b"L\n")),
    "long keys": lambda: checkpoint(
        Raw(b"}" + (encode("w" * (LARGE // 2)) + b"q\0Ns") * 2 + b"h\0Ns" * (N // 4))
    ),
    "many names": lambda: checkpoint(
        Raw(
            (b"}" + encode("w") + encode(tensor(None, 0, (), ())) + b"q\0s")
            + b"".join(encode(str(i)) + b"h\0s" for i in range(N // 3 - 100))
        )
    ),
    "two long pickles": lambda: stream(
        {}, magic=Raw(b"]" * (N - 1000) + encode(MAGIC)), version=Raw(b"]" * (2 * N))
    ),
    "many members": lambda: zip_archive({f"a/data/{i:x}": b"" for i in range(70_000)}),
    "long directory": lambda: zip_archive(MEMBERS, 0, *[entry(b"a", 0, 0)] * 10**6),
}


def test_needs_no_torch_and_survives_bombs(tmp_path):
    files = [tmp_path / "good.bin"]
    files[0].write_bytes(zip_archive(MEMBERS))
    for name, bomb in BOMBS.items():
        files.append(tmp_path / f"{name}.bin")
        files[-1].write_bytes(bomb())
    good, *bombs = measured(*files)
    assert good[0] == "{'w': [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]}"
    for name, (found, seconds, memory) in zip(BOMBS, bombs, strict=True):
        assert ": found " in found, name
        assert seconds < 5, name
        assert memory < 2 * 10**9, name


# Fuzz: damage of any kind is a DriftError or harmless.

GOOD = [
    checkpoint({"model": {"w": tensor(), "v": tensor(None, 1, (2,), (2,))}}),
    stream({"w": tensor()}, ("0", 6, FLOATS.tobytes())),
]
FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_or_refuse(tmp_path: Path, data: bytes) -> None:
    try:
        mx.eval(read(tmp_path, data))
    except DriftError:
        return


@FUZZ
@given(
    good=st.sampled_from(GOOD),
    flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    length=st.integers(0, 2000),
)
def test_fuzz_flipped_and_truncated(tmp_path, good, flips, length):
    data = bytearray(good)
    for position, byte in flips:
        data[position % len(data)] = byte
    read_or_refuse(tmp_path, bytes(data[:length] if length % 3 == 0 else data))


FRAGMENTS = [bytes([code]) for code in b"(.NtaesubRQ}]0)\x85\x86\x87\x88\x93\x94\x81"] + [
    encode(value)
    for value in (
        *(0, -1, 6, 2**40, "w", "0", "model", "storage", (2, 3), storage(), tensor()),
        *(Global("torch", "Size"), Global("torch", "FloatStorage"), ORDERED_DICT.function),
        Global("torch._utils", "_rebuild_tensor_v2"),
    )
]


@FUZZ
@given(opcodes=st.lists(st.sampled_from(FRAGMENTS), max_size=30))
def test_fuzz_opcodes(tmp_path, opcodes):
    read_or_refuse(tmp_path, checkpoint(Raw(b"".join(opcodes))))


@FUZZ
@given(
    offset=st.integers(-2, 8) | st.integers(),
    view=st.lists(
        st.tuples(st.integers(-1, 4) | st.integers(), st.integers(-1, 4) | st.integers()),
        max_size=4,
    ),
)
def test_fuzz_views_agree_with_the_definition(tmp_path, offset, view):
    shape, stride = tuple(n for n, _ in view), tuple(s for _, s in view)
    try:
        array = read(tmp_path, checkpoint({"w": tensor(None, offset, shape, stride)}))["w"]
    except DriftError:
        return
    assert array.shape == shape
    if 0 not in shape:
        strides = [4 * step if size > 1 else 0 for size, step in view]
        expected = np.lib.stride_tricks.as_strided(FLOATS[offset:], shape, strides)
        np.testing.assert_array_equal(np.array(array), expected)


# Against PyTorch.


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


NATIVE = ["bfloat16", "float16", "float32", "bool", "uint8", "uint16", "uint32", "uint64"]
NATIVE += ["int8", "int16", "int32", "int64"]


def saved(torch: Any, value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def assert_same(torch: Any, array: mx.array, source: Any) -> None:
    """Bit for bit; float8 as what PyTorch makes of it in bfloat16."""
    source = source.detach().clone(memory_format=torch.contiguous_format)
    if str(source.dtype).startswith("torch.float8"):
        source = source.to(torch.bfloat16)
    assert str(array.dtype).removeprefix("mlx.core.") == str(source.dtype).removeprefix("torch.")
    assert array.shape == tuple(source.shape)
    expected = source.reshape(-1).view(torch.uint8).numpy().tobytes() if source.numel() else b""
    assert bits(array) == expected


CONTAINERS = pytest.mark.parametrize(
    "options",
    [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}],
    ids=["zip", "zip protocol 4", "stream"],
)


@pytest.mark.torch
@CONTAINERS
@pytest.mark.parametrize("dtype", [*NATIVE, "float8_e4m3fn", "float8_e5m2"])
def test_torch_dtype_bit_for_bit(tmp_path, torch, dtype, options):
    raw = torch.cat([torch.arange(256), torch.randint(256, (512,))]).to(torch.uint8)
    source = raw.bool() if dtype == "bool" else raw.view(getattr(torch, dtype))
    array = read(tmp_path, saved(torch, {"w": source.reshape(3, -1)}, **options))["w"]
    assert_same(torch, array, source.reshape(3, -1))


def views(torch: Any) -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    return {
        "base": base,
        "shared": base,
        "slice": base[1:3, 2:5],
        "step": base[::2, ::3],
        "transposed": base.T,
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(3.5),
        "offset scalar": base[2, 2],
        "empty": torch.empty(0, 3),
        "empty slice": base[4:],
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "odd byte": torch.arange(3, dtype=torch.uint8),
        "after it": torch.arange(3),
    }


@pytest.mark.torch
@CONTAINERS
@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_torch_views(tmp_path, torch, container, options):
    sources = views(torch)
    tensors = opened(tmp_path, saved(torch, container(sources), **options))
    assert list(tensors) == list(sources)
    for name, source in sources.items():
        assert_same(torch, tensors[name].whole(), source)
        for row in range(source.shape[0] if source.dim() else 0):
            rows = to_mlx(tensors[name].read(row, row + 1), tensors[name].dtype)
            assert_same(torch, rows, source[row : row + 1])


@pytest.mark.torch
@CONTAINERS
def test_torch_module_and_optimizer(tmp_path, torch, options):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    value = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": 7}
    arrays = read(tmp_path, saved(torch, value, **options))
    assert list(arrays) == list(module.state_dict())
    for name, source in module.state_dict().items():
        assert_same(torch, arrays[name], source)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e5m2fnuz", "complex64"])
def test_torch_refuses_dtype(tmp_path, torch, dtype):
    source = torch.zeros(4, dtype=torch.float32).to(getattr(torch, dtype))
    refusal(tmp_path, saved(torch, {"w": source}))


@pytest.mark.torch
def test_torch_refuses_a_whole_module(tmp_path, torch):
    assert "the global" in refusal(tmp_path, saved(torch, torch.nn.Linear(2, 2)))


@pytest.mark.torch
def test_torch_refuses_the_negative_bit(tmp_path, torch):
    view = torch.ones(2, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    assert "a call of" in refusal(tmp_path, saved(torch, {"w": view}))
