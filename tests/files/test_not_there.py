"""Files that are not there: Git LFS pointers in their place, or a cache with a part of them."""

import json
import shutil

import pytest
from huggingface_hub import constants, utils

from checkpoints import specforge_tensors, write_checkpoint
from hub_stub import StubHub, set_endpoint, settle
from mlx_drift import DriftError, convert_drafter, doctor, inspect_drafter, load_drafter
from mlx_drift.cli import main
from mlx_drift.convert.mtp.source import read_mtp_checkpoint
from mlx_drift.demo import TARGET
from mlx_drift.files.hub import find_hub_folder
from mlx_drift.files.json_file import read_json
from mtp_heads import config_of, head, write_repository, written
from tiny import tiny_llama

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)
SAID = "a Git LFS pointer and not the file that it stands for: run `git lfs pull`"
REPO = "someone/some-head"


def refused(call, *arguments, **keywords):
    with pytest.raises(DriftError) as caught:
        call(*arguments, **keywords)
    (line,) = str(caught.value).splitlines()
    return line


def as_pointer(path, length=None):
    path.write_text(POINTER[:length])
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_checkpoint_of_pointers(name, tmp_path):
    source = write_checkpoint(tmp_path / "source", specforge_tensors())
    if name.endswith(".bin"):
        (source / "model.safetensors").unlink()
    as_pointer(source / name)
    for said in (
        refused(convert_drafter, str(source), tmp_path / "out"),
        refused(inspect_drafter, str(source)),
    ):
        assert said.startswith(f"{source / name}: {SAID}")


def test_an_index_and_its_shards(tmp_path):
    source = write_checkpoint(tmp_path / "source", specforge_tensors())
    (source / "model.safetensors").rename(source / "a.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": "a.safetensors"}}))
    as_pointer(source / "a.safetensors")
    assert f"a.safetensors: {SAID}" in refused(convert_drafter, str(source), tmp_path / "out")
    as_pointer(index)
    assert f"index.json: {SAID}" in refused(convert_drafter, str(source), tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_converted_drafter_of_pointers(name, tmp_path):
    source = write_checkpoint(tmp_path / "source", specforge_tensors())
    convert_drafter(str(source), tmp_path / "out")
    as_pointer(tmp_path / "out" / name)
    said = refused(load_drafter, str(tmp_path / "out"), tiny_llama())
    assert said.startswith(f"{tmp_path / 'out' / name}: {SAID}")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_target_of_pointers(name, tmp_path, capsys):
    target = tmp_path / "target"
    shutil.copytree(TARGET, target)
    as_pointer(target / name)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", str(target), "--drafter", "prompt-lookup", "--prompt", "x"])
    out, error = capsys.readouterr()
    assert (ended.value.code, out) == (1, "")
    assert f"{name}: {SAID}" in " ".join(error.split())
    if name == "config.json":
        assert SAID in refused(doctor, str(target))


def test_a_tokenizer_that_is_a_pointer_is_not_compared(tmp_path):
    source = write_checkpoint(tmp_path / "source", specforge_tensors())
    target = tmp_path / "target"
    target.mkdir()
    sizes = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 4}
    (target / "config.json").write_text(json.dumps(sizes))
    (target / "tokenizer.json").write_text("{}")
    as_pointer(source / "tokenizer.json")
    (check,) = [c for c in inspect_drafter(str(source), str(target)).checks if c.passed is None]
    assert (check.name, SAID in check.detail) == ("tokenizer", True)


@pytest.mark.parametrize("length", [0, 4, 8, 20])
def test_what_only_begins_as_one_is_damaged(length, tmp_path):
    source = write_checkpoint(tmp_path / "source", specforge_tensors())
    as_pointer(source / "model.safetensors", length)
    said = refused(convert_drafter, str(source), tmp_path / "out")
    assert "cannot be read as safetensors" in said
    assert "not valid JSON" in refused(read_json, as_pointer(tmp_path / "x.json", length))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    settle(monkeypatch, tmp_path)
    write_checkpoint(tmp_path / "repo", specforge_tensors())
    with StubHub(tmp_path / "repo", REPO).serve() as hub:
        set_endpoint(monkeypatch, hub.endpoint)
        yield hub
    utils.close_session()


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "unreachable"])
def test_weights_that_were_never_downloaded(how, hub, tmp_path, monkeypatch):
    find_hub_folder(REPO, None, "drafter").path("config.json")
    if how == "unreachable":
        set_endpoint(monkeypatch, "http://127.0.0.1:9")
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = f"{REPO}: its weights were never downloaded, and the Hub cannot be asked for it now"
    for said in (
        refused(convert_drafter, REPO, tmp_path / "out"),
        refused(inspect_drafter, REPO),
        refused(load_drafter, REPO, tiny_llama()),
    ):
        assert said.startswith(expected)
        assert "online" in said


def test_a_config_that_was_never_downloaded(hub, tmp_path, monkeypatch):
    find_hub_folder(REPO, None, "drafter").path("model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused(convert_drafter, REPO, tmp_path / "out")
    assert said.startswith(f"{REPO}: its config.json was never downloaded")


def test_online_a_folder_without_weights_has_none(hub, tmp_path):
    (tmp_path / "repo" / "model.safetensors").unlink()
    assert "holds no weights" in refused(convert_drafter, REPO, tmp_path / "out")


def test_shards_and_sidecars_that_were_never_downloaded(hub, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "repo")
    config, tensors = config_of("qwen3_5"), written("qwen3_5", head("qwen3_5"))
    write_repository(tmp_path / "repo", config, tensors, shards=2, others=1)
    folder = find_hub_folder(REPO, None, "drafter")
    for name in ("config.json", "model.safetensors.index.json"):
        folder.path(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused(read_mtp_checkpoint, REPO)
    assert said.startswith(f"{REPO}: its shard 'model-0000")
    assert "was never downloaded" in said


def test_an_mtp_head_is_converted_offline_once_it_is_cached(hub, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "repo")
    write_repository(
        tmp_path / "repo", config_of("qwen3_5"), written("qwen3_5", head("qwen3_5")), shards=2
    )
    convert_drafter(REPO, tmp_path / "online", mtp=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert_drafter(REPO, tmp_path / "offline", mtp=True)
    weights = [tmp_path / place / "model.safetensors" for place in ("online", "offline")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_target_s_weights_that_were_never_downloaded(tmp_path, monkeypatch, capsys):
    settle(monkeypatch, tmp_path)
    shutil.copytree(TARGET, tmp_path / "repo")
    with StubHub(tmp_path / "repo", REPO).serve() as hub:
        set_endpoint(monkeypatch, hub.endpoint)
        folder = find_hub_folder(REPO, None, "model")
        for name in folder.files:
            if name.endswith(".json"):
                folder.path(name)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(SystemExit) as ended:
            main(["generate", "--model", REPO, "--drafter", "prompt-lookup", "--prompt", "x"])
    utils.close_session()
    out, error = capsys.readouterr()
    assert (ended.value.code, out) == (1, "")
    assert f"{REPO}: its weights were never downloaded" in " ".join(error.split())
