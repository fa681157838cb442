"""A disk that takes no more: one line, and what was there before is whole."""

import resource
from contextlib import contextmanager

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_drift import DriftError
from mlx_drift.demo import DEMO
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from mlx_drift.train.head_file import read_head, write_head
from mlx_drift.train.layout import Text
from mlx_drift.train.text_file import TextFile


@contextmanager
def room_for(size: int):
    """Lets no file grow beyond a size, which a write meets as it does a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_checkpoint_before_is_kept(tmp_path):
    path, before = tmp_path / "checkpoint.safetensors", {"a": mx.arange(10)}
    save_checkpoint(path, before, Progress(step=1))
    with room_for(4096), pytest.raises(DriftError, match=r"checkpoint.* cannot be written"):
        save_checkpoint(path, {"a": mx.zeros(100_000)}, Progress(step=2))
    arrays, progress = load_checkpoint(path, before)
    assert progress.step == 1
    assert mx.array_equal(arrays["a"], before["a"])
    assert [*tmp_path.iterdir()] == [path]


def test_the_best_head_before_is_kept(tmp_path):
    original = DEMO / "eagle3.1"
    weights = dict(tree_flatten(read_head(original).network.parameters()))
    write_head(tmp_path / "best", weights, original)
    before = (tmp_path / "best" / "model.safetensors").read_bytes()
    changed = {name: weight * 2 for name, weight in weights.items()}
    with room_for(4096), pytest.raises(DriftError, match=r"best: cannot be written"):
        write_head(tmp_path / "best", changed, original)
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == before
    assert {*read_safetensors(tmp_path / "best" / "model.safetensors")} >= weights.keys()
    assert {path.name for path in (tmp_path / "best").iterdir()} == {
        "model.safetensors",
        "config.json",
    }


def test_answers_before_are_kept(tmp_path):
    path = tmp_path / "answers.jsonl"
    file = TextFile(path, {}, 8)
    file.add("first", [Text([1, 2, 3], [(1, 3)])])
    with room_for(512), pytest.raises(DriftError, match=r"answers\.jsonl: cannot be read and wri"):
        file.add("second", [Text([7] * 1000, [(1, 1000)])])
    again = TextFile(path, {}, 8)
    assert again.find("first") == [Text([1, 2, 3], [(1, 3)])]
    assert again.find("second") is None
