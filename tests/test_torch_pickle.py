"""`read_torch_checkpoint` against hand-made files, and (marked torch) against `torch.save`."""

import io
import pickle
import struct
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_drift.convert import inert_pickle, torch_pickle
from mlx_drift.convert.torch_pickle import read_torch_checkpoint
from mlx_drift.errors import DriftError

MAGIC = 0x1950A86A20F9469CFC6C


# A pickle assembler, so that every byte of a hostile file is ours and no torch is needed.


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
            data = value.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
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


ORDERED_DICT = Call(Global("collections", "OrderedDict"), ())


def storage(kind: str = "FloatStorage", key: Any = "0", numel: Any = 6) -> Persistent:
    return Persistent(("storage", Global("torch", kind), key, "cpu", numel))


def tensor(
    source: Any = None, offset: Any = 0, shape: Any = (2, 3), stride: Any = (3, 1), *metadata: Any
) -> Call:
    arguments = (source or storage(), offset, shape, stride, False, ORDERED_DICT, *metadata)
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


def zip_archive(members: dict[str, bytes], method: int = 0) -> bytes:
    """A zip as torch writes it: only the *local* extra field pads the data to 64 bytes."""
    body, directory = b"", b""
    for path, data in members.items():
        name, header = path.encode(), len(body)
        pad = -(header + 30 + len(name) + 4) % 64
        extra = b"FB" + struct.pack("<H", pad) + bytes(pad)
        common = struct.pack("<HHHHHIII", 20, 0, method, 0, 0, 0, len(data), len(data))
        body += b"PK\3\4" + common + struct.pack("<HH", len(name), len(extra)) + name + extra + data
        directory += b"PK\1\2" + struct.pack("<H", 20) + common
        directory += struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, header) + name
    count = len(members)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + end


FLOATS = np.arange(6, dtype=np.float32)
MEMBERS = {
    "archive/data.pkl": dumps({"w": tensor()}),
    "archive/byteorder": b"little",
    "archive/data/0": FLOATS.tobytes(),
    "archive/version": b"3\n",
}


def checkpoint(value: Any, data: bytes = FLOATS.tobytes()) -> bytes:
    return zip_archive(MEMBERS | {"archive/data.pkl": dumps(value), "archive/data/0": data})


def stream(value: Any, *storages: tuple[str, int, bytes], **changed: Any) -> bytes:
    header = {"magic": MAGIC, "version": 1001, "info": {"little_endian": True}} | changed
    pickles = (*header.values(), value, [key for key, _, _ in storages])
    tail = (struct.pack("<q", numel) + data for _, numel, data in storages)
    return b"".join(map(dumps, pickles)) + b"".join(tail)


def read(tmp_path: Path, data: bytes) -> dict[str, mx.array]:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data)
    return read_torch_checkpoint(path)


def refusal(tmp_path: Path, data: bytes) -> str:
    """The message of the refusal, behind the name of the file."""
    with pytest.raises(DriftError) as caught:
        read(tmp_path, data)
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
    shape = (2**31 - 1, 0, 2**31 - 1, 2**31 - 1)
    array = read(tmp_path, checkpoint({"w": tensor(None, 0, shape, (0,) * 4)}))["w"]
    assert array.shape == shape
    assert array.size == 0


def test_the_stride_of_a_dimension_of_one_is_free(tmp_path):
    array = read(tmp_path, checkpoint({"w": tensor(None, 2, (1, 2), (2**59, 3))}))["w"]
    assert array.tolist() == [[2, 5]]


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


def test_a_large_file_opens_without_being_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    numel = 200_000_000  # 800 MB, sparse on disk
    path.write_bytes(stream({"w": tensor(storage(numel=numel))}, ("0", numel, b"")))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 4 * numel)
    start = time.perf_counter()
    assert read_torch_checkpoint(path)["w"].shape == (2, 3)
    assert time.perf_counter() - start < 1  # generous: it copies up to 64 MiB for the pickles


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
        (pickle.dumps({"w": 1}, 4), "magic number"),
    ],
)
def test_refuses_container(tmp_path, data, found):
    assert found in refusal(tmp_path, data)


def test_refuses_a_member_named_twice(tmp_path):
    data = zip_archive({"a/data.pkl": b"", "a/data.pk1": b""}).replace(b"data.pk1", b"data.pkl")
    assert "twice" in refusal(tmp_path, data)


def test_refuses_a_member_that_reaches_past_the_end(tmp_path):
    good = zip_archive(MEMBERS)
    entry = good.index(b"PK\1\2")
    data = good[: entry + 20] + struct.pack("<II", 2**31, 2**31) + good[entry + 28 :]
    assert "cut off" in refusal(tmp_path, data)


def test_refuses_a_member_without_a_local_header(tmp_path):
    data = zip_archive(MEMBERS)
    data = data[:64] + data[64:].replace(b"PK\3\4", b"PK\0\0", 1)
    assert "cut off" in refusal(tmp_path, data)


def test_refuses_a_negative_header_offset(tmp_path):
    data = bytearray(zip_archive(MEMBERS))
    end = data.index(b"PK\5\6") + 16
    (directory,) = struct.unpack_from("<I", data, end)
    struct.pack_into("<I", data, end, directory + 4)  # zipfile shifts every offset by -4
    assert "cut off" in refusal(tmp_path, bytes(data))


def test_refuses_a_stored_member_of_two_sizes(tmp_path):
    data = bytearray(zip_archive(MEMBERS))
    struct.pack_into("<I", data, data.index(b"PK\1\2") + 20, 4)
    assert "cut off" in refusal(tmp_path, bytes(data))


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
    ],
    ids=["missing", "short", "other numel", "negative numel", "other key"],
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


def attacks(flag: Path) -> dict[str, Raw]:
    """Pickles that create `flag` when `pickle.loads` runs them."""
    command = f"touch {flag}"
    touch = encode(command)
    code = encode(f"__import__('pathlib').Path({str(flag)!r}).touch()")
    call = encode((command,))
    evaluate = b"cbuiltins\neval\n(" + code + b"tR"
    hooks = encode((1, 2)) + b"0cos\nsystem\n" + call + b"R"
    return {
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
def test_executes_nothing(tmp_path, attack, container):
    flag = tmp_path / "flag"
    opcodes = attacks(flag)[attack]
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


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_refuses_float8_by_name(tmp_path, dtype):
    source = Persistent(("storage", Global("torch.storage", "UntypedStorage"), "0", "cpu", 24))
    arguments = (source, 0, (24,), (1,), False, ORDERED_DICT, Global("torch", dtype))
    value = {"w": Call(Global("torch._utils", "_rebuild_tensor_v3"), arguments)}
    message = refusal(tmp_path, checkpoint(value))
    assert f"'w' with dtype torch.{dtype}" in message
    assert "dequantize" in message


@pytest.mark.parametrize("value", [tensor(), [tensor()], {}, {"w": 1}, {1: tensor()}, None])
def test_refuses_what_is_no_state_dict(tmp_path, value):
    assert "no tensors by name" in refusal(tmp_path, checkpoint(value))


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
        arrays = read(tmp_path, data)
    except DriftError:
        return
    mx.eval(arrays)


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
    for index in np.ndindex(*shape):
        position = offset + sum(i * s for i, s in zip(index, stride, strict=True))
        assert array[index].item() == FLOATS[position]


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
    source = source.detach().contiguous()
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
@pytest.mark.parametrize("dtype", NATIVE)
def test_torch_dtype_bit_for_bit(tmp_path, torch, dtype, options):
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 96, dtype=np.uint8))
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
    arrays = read(tmp_path, saved(torch, container(sources), **options))
    assert list(arrays) == list(sources)
    for name, source in sources.items():
        assert_same(torch, arrays[name], source)


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
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64"])
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
