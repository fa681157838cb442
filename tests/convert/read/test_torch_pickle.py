"""`read_torch_checkpoint` against hand-made files, and (marked torch) against `torch.save`."""

import io
import math
import os
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_drift.convert.read import inert_pickle, torch_pickle
from mlx_drift.convert.read.stored import file_reader, to_mlx
from mlx_drift.convert.read.torch_pickle import read_torch_checkpoint
from mlx_drift.errors import DriftError
from torch_checkpoints import FLOATS, MEMBERS, bits, checkpoint, opened, read, refusal
from torch_files import (
    ORDERED_DICT,
    Build,
    Persistent,
    Raw,
    encode,
    storage,
    stream,
    tensor,
    typed,
    zip_archive,
)

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
