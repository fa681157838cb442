"""What is refused before a model is cut, and what two of one folder's copies may differ in."""

import re

import mlx.core as mx
import pytest

import families
from mlx_drift.errors import DriftError
from mlx_drift.ranks.cut import _uneven, fingerprints, shard
from mlx_drift.ranks.world import ALONE, Ranks, world


class Group:
    """Stands for MLX's group in what is lazy."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


def test_heads_that_do_not_divide_are_told():
    with pytest.raises(DriftError, match=r"llama\) cannot be cut over 3 ranks"):
        shard(families.build("llama"), Ranks(Group(0, 3)))


def test_a_number_that_was_rounded_down_is_found():
    heads, width = ("layers.0.self_attn", "n_heads"), ("", "vocab_size")
    assert _uneven({heads: 6, width: 9}, {heads: 1, width: 9}, 4) == ("n_heads", 6)
    assert _uneven({heads: 8, width: 9}, {heads: 2, width: 9}, 4) is None
    assert _uneven({heads: 2}, {heads: 0}, 4) == ("n_heads", 2)
    assert _uneven({heads: 2}, {heads: 1}, 4) is None  # repeated by the model file


def test_a_family_that_mlx_lm_does_not_cut_is_told():
    with pytest.raises(DriftError, match=r"gemma2\) over ranks by its width; run it on one"):
        shard(families.build("gemma2"), Ranks(Group(0, 2)))


@pytest.mark.parametrize("size", [1, 1 << 16, 3_000_017])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_changed_byte_at_an_end_is_seen(tmp_path, size, where):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(size))
    before = fingerprints(tmp_path)
    content = bytearray(size)
    content[0 if where == "first" else -1] = 1
    file.write_bytes(content)
    assert fingerprints(tmp_path) != before


def test_a_launcher_of_one_starts_one_process(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("\n")
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    assert world.__wrapped__() is ALONE


@pytest.mark.parametrize(
    ("rank", "hosts", "told"),
    [
        ("x", '[["a:1"], ["b:1"]]', "MLX_RANK is 'x'; expected a number below 2"),
        ("-1", None, "MLX_RANK is '-1'; expected a number; start with mlx.launch"),
        ("2", '[["a:1"], ["b:1"]]', "expected a number below 2, of MLX_HOSTFILE's hosts"),
        ("9" * 5000, None, "MLX_RANK is '99"),
        ("0", "{}", r"holds \{\}; expected a list with \["),
        ("0", '["a:1"]', "expected a list with"),
        ("0", '[["a"]]', "expected a list with"),
        ("0", "[[]]", "expected a list with"),
        ("0", "[" * 100_000, "cannot be read as JSON"),
        ("0", "host", "cannot be read as JSON"),
    ],
)
def test_what_no_launcher_says_is_refused_in_one_line(
    tmp_path, monkeypatch, cli, rank, hosts, told
):
    monkeypatch.setenv("MLX_RANK", rank)
    if hosts:
        (tmp_path / "hosts").write_text(hosts)
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    code, out, err = cli("generate", "-p", "hi")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(told, err)


def test_mpi_is_refused(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(DriftError, match=r"under MPI: use mlx.launch with --backend ring"):
        world.__wrapped__()


def test_one_process_alone_needs_no_others():
    assert ALONE.exchange("x") == ["x"]
    assert ALONE.read(mx.array([2, 7])) == [2, 7]
    ALONE.finish()
    ALONE.fail("no matter")
