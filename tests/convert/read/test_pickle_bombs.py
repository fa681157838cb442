"""`read_torch_checkpoint` under bombs and fuzz: little time and memory, a refusal or no harm."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_drift.convert.read import inert_pickle
from mlx_drift.errors import DriftError
from torch_checkpoints import FLOATS, MEMBERS, checkpoint, read
from torch_files import (
    MAGIC,
    ORDERED_DICT,
    Global,
    Raw,
    encode,
    entry,
    storage,
    stream,
    tensor,
    zip_archive,
)

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
