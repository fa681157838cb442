"""Small `.bin` checkpoints, and what becomes of them: read, or refused in one line."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_drift.convert.read.stored import StoredTensor
from mlx_drift.convert.read.torch_pickle import read_torch_checkpoint
from mlx_drift.errors import DriftError
from torch_files import (
    dumps,
    tensor,
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
