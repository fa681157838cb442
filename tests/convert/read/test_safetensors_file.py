"""The header reader against the reference parser: the same tensors, the same refusals."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dialects import NORMALIZED, Head, specforge
from mlx_drift.convert.read.safetensors_file import read_safetensors_file
from mlx_drift.convert.read.stored import file_reader
from mlx_drift.errors import DriftError


def opened(path):
    return read_safetensors_file(file_reader(path), path.stat().st_size, str(path))


def written(path: Path, header, data=bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(begin=0, end=64, shape=(4, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_was_saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(NORMALIZED.tensors, path)
    found = opened(path)
    assert found.keys() == NORMALIZED.tensors.keys()
    for name, expected in NORMALIZED.tensors.items():
        assert np.array_equal(np.array(found[name].whole()), expected)
        assert np.array_equal(np.concatenate(list(found[name].blocks())), expected)
        assert np.array_equal(found[name].read(1, 3), expected[1:3])


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor()},
        {"a": tensor(0, 32, (8,)), "b": tensor(32, 64, (8,))},
        {"b": tensor(32, 64, (8,)), "a": tensor(0, 32, (8,))},
        {"a": tensor(), "empty": tensor(64, 64, (0, 3))},
        {"a": tensor(0, 64, (32,), "BF16"), "__metadata__": {"format": "pt"}},
    ],
    ids=str,
)
def test_accepts_what_the_reference_parser_accepts(tmp_path, header):
    path = written(tmp_path / "a.safetensors", header)
    with safe_open(path, framework="numpy") as reference:
        assert set(reference.keys()) == opened(path).keys()


HOSTILE = {
    "a gap": {"a": tensor(4, 64, (15,))},
    "an overlap": {"a": tensor(0, 32, (8,)), "b": tensor(16, 64, (12,))},
    "the same bytes twice": {"a": tensor(), "b": tensor()},
    "bytes to spare": {"a": tensor(0, 32, (8,))},
    "past the end": {"a": tensor(0, 128, (32,))},
    "backwards": {"a": tensor(64, 0, (16,))},
    "negative": {"a": tensor(-64, 0, (16,))},
    "another shape": {"a": tensor(0, 64, (5, 4))},
    "2^63": {"a": tensor(0, 64, (2**63,))},
    "2^64": {"a": tensor(0, 64, (2**64,))},
    "sizes that overflow to 16": {"a": tensor(0, 64, (2**62 + 4, 4))},
    "a fraction": {"a": tensor(0, 64, (4.0, 4))},
    "true": {"a": tensor(0, 64, (True, 16))},
    "no dtype": {"a": {"shape": [16], "data_offsets": [0, 64]}},
    "a dtype of its own": {"a": tensor(dtype="F31")},
    "three offsets": {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64, 64]}},
    "a list": [1, 2],
    "a number": 7,
    "not JSON": b"{",
    "not UTF-8": b'{"\xff": 1}',
    "nested": b"[" * 100_000,
    "long numbers": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_what_the_reference_parser_refuses(tmp_path, name):
    path = written(tmp_path / "a.safetensors", HOSTILE[name])
    with pytest.raises(DriftError, match=r"a\.safetensors: ") as refused:
        opened(path)
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(SafetensorError), safe_open(path, framework="numpy"):
        pass


@pytest.mark.parametrize("length", [0, 1, 57, 2**40, 2**64 - 1])
def test_refuses_absurd_headers(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(54))
    with pytest.raises(DriftError, match=f"a header of {length} bytes in a file of 64"):
        opened(path)


def test_mutated_headers_are_judged_alike(tmp_path):
    """Never laxer than the reference parser, on a few thousand broken files."""
    rng = random.Random(0)
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.float16)}, path)
    whole, accepted = path.read_bytes(), 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at] = rng.choice(b'0123456789[]{}:,"FBx') if at > 8 else rng.randrange(256)
        path.write_bytes(data)
        try:
            opened(path)
        except DriftError:
            continue
        accepted += 1
        with safe_open(path, framework="numpy"):
            pass
    assert 0 < accepted < 2000


CONVERT = """
import resource, sys
from mlx_drift import convert_drafter
unit = 1024 if sys.platform == "linux" else 1
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
_, small, large, out = sys.argv
convert_drafter(small, out + "/warm", quantize=True, q_group_size=32)
before = peak()
convert_drafter(large, out + "/plain")
convert_drafter(large, out + "/small", quantize=True, q_group_size=32)
print(peak() - before)
"""


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_conversion_holds_no_whole_tensor(tmp_path, form):
    """Tensors of 64 MB go through in blocks; the whole of one never lies in memory."""
    specforge(NORMALIZED, tmp_path / "small", form=form)
    inner = 2**20
    wide = {
        name: np.resize(tensor, (inner, 32) if tensor.shape[1] == 32 else (32, inner))
        for name, tensor in NORMALIZED.tensors.items()
        if ".mlp." in name
    }
    assert {tensor.nbytes for tensor in wide.values()} == {64 << 20}
    large = Head(NORMALIZED.tensors | wide, NORMALIZED.taps, NORMALIZED.values)
    specforge(large, tmp_path / "large", form=form, intermediate_size=inner)
    arguments = [tmp_path / "small", tmp_path / "large", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 48 << 20
