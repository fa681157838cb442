"""What `read_torch_checkpoint` refuses: damaged, hostile and impossible files, in one line."""

import copyreg
import os
import pickle
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_drift.convert.read import inert_pickle, torch_pickle
from mlx_drift.convert.read.torch_pickle import read_torch_checkpoint
from mlx_drift.errors import DriftError
from torch_checkpoints import FLOATS, MEMBERS, checkpoint, read, refusal
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

# What is refused: the container.


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "neither a zip"),
        (b"\x80", "malformed pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
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
