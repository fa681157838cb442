"""Caches on disk, in this process: whole or not there, of their own model alone, bounded."""

import json

import mlx.core as mx
import pytest

from families import build
from mlx_drift import DriftError
from mlx_drift.serve.disk import DiskStore
from serving import ask, engine, loaded
from tiny import VOCAB, plain_greedy, tiny_drafter, tiny_llama

PROMPT = [i * 7 % VOCAB for i in range(60)]


@pytest.fixture(scope="module")
def llama():
    model = tiny_llama()
    return loaded(model, tiny_drafter(model))


def run(model, folder, prompt=PROMPT, bound=1 << 30, disk_bound=1 << 30):
    """Answers once, with an engine of its own; returns cached tokens and the answer."""
    disk = DiskStore(folder, disk_bound)
    with engine(bound, disk) as running:
        heard, _ = ask(running, model, prompt)
        cached = heard.wait().usage.cached_tokens
        assert heard.tokens == plain_greedy(model.model, prompt, 12)
        running.call(lambda: [None for _ in iter(running.store.save_one, False)]).result()
    disk._lock.close()
    return cached, heard.tokens


def test_what_is_written_is_found_by_the_next_server(llama, tmp_path):
    folder = tmp_path / "caches"
    cached, answer = run(llama, folder)
    assert cached == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    cached, _ = run(llama, folder)
    assert cached == len(PROMPT) - 2
    cached, _ = run(llama, folder, [*PROMPT, *answer, 5])
    assert cached == len(PROMPT) + len(answer) - 1
    model = tiny_llama()
    model.apply(lambda weight: weight * mx.array(1.5, weight.dtype))
    other = loaded(model, tiny_drafter(model))
    assert run(other, folder)[0] == 0  # another model's are not found


def test_states_that_cannot_be_trimmed_are_gone_on_with(tmp_path):
    model = build("qwen3_next")
    hybrid = loaded(model, tiny_drafter(model))
    folder = tmp_path / "caches"
    _, answer = run(hybrid, folder)
    assert run(hybrid, folder, [*PROMPT, *answer, 5])[0] == len(PROMPT) + len(answer) - 1


@pytest.mark.parametrize("damage", ["flip", "cut", "orphan", "half", "about"])
def test_what_is_damaged_is_read_anew_and_cleared_away(llama, tmp_path, damage):
    folder = tmp_path / "caches"
    run(llama, folder)
    (arrays,), (about,) = folder.glob("*.safetensors"), folder.glob("*.json")
    keep = folder / "notes.txt"
    keep.write_text("mine")
    if damage == "flip":
        raw = bytearray(arrays.read_bytes())
        raw[-9] ^= 1
        arrays.write_bytes(raw)
    elif damage == "cut":
        arrays.write_bytes(arrays.read_bytes()[:-1])
    elif damage == "orphan":  # killed between the two files
        about.unlink()
    elif damage == "half":  # killed while the second was written
        about.rename(about.with_name(about.name + ".partial"))
    else:
        about.write_text(json.dumps({"name": about.stem}))
    assert run(llama, folder)[0] == 0
    assert not arrays.exists()
    assert keep.read_text() == "mine"


def test_the_bound_of_the_disk_holds(llama, tmp_path):
    folder = tmp_path / "caches"
    run(llama, folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for i in range(4):
        run(llama, folder, [i, *PROMPT], disk_bound=int(2.5 * size))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 2.5 * size
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_what_leaves_memory_comes_back_from_disk(llama, tmp_path):
    disk = DiskStore(tmp_path / "caches", 1 << 30)
    with engine(2 * llama.footprint.bytes(80), disk) as running:
        for i in range(6):
            ask(running, llama, [i, *PROMPT])[0].wait()
        again, _ = ask(running, llama, [0, *PROMPT])
        assert again.wait().usage.cached_tokens == len(PROMPT) - 1


def test_one_server_a_folder(tmp_path):
    folder = tmp_path / "caches"
    first = DiskStore(folder, 1)
    with pytest.raises(DriftError, match="another server"):
        DiskStore(folder, 1)
    first._lock.close()
    folder.chmod(0o750)
    with pytest.raises(DriftError, match="chmod 700"):
        DiskStore(folder, 1)
