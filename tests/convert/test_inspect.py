"""`inspect`: every compatibility fact against a target, from headers alone."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import write_checkpoint
from dialects import HIDDEN, LAYERS, PLAIN, Head, head, specforge, speculators, with_t2d
from mlx_drift import DriftError, inspect_drafter
from mlx_drift.cli import main
from tiny import VOCAB


def target(folder, tokenizer=None, **changes):
    folder.mkdir()
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS} | changes
    (folder / "config.json").write_text(json.dumps(sizes))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


@pytest.fixture
def source(tmp_path):
    specforge(PLAIN, tmp_path / "head")
    return tmp_path / "head"


def checks(source, target=None):
    found = inspect_drafter(str(source), target)
    return {check.name: check.passed for check in found.checks}


def test_a_head_that_fits(source, tmp_path):
    found = inspect_drafter(str(source), target(tmp_path / "target"))
    assert found.passed
    assert found.dialect == "SpecForge"
    assert found.parameters == sum(t.size for n, t in PLAIN.tensors.items() if n != "d2t")
    assert found.size == sum(t.nbytes for t in with_t2d(PLAIN.tensors).values())
    assert found.values["taps"] == [2, 6, 9]
    assert found.provenance["taps"].startswith("file; rule: output of layer")
    assert ("fc.weight", (HIDDEN, 3 * HIDDEN), "F16") in found.tensors


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"hidden_size": 64}, ["hidden size"]),
        ({"vocab_size": 2 * VOCAB}, ["vocabulary"]),
        ({"num_hidden_layers": 7}, ["conventions and tensors", "taps"]),
        (
            {"text_config": {"hidden_size": 8, "vocab_size": 9, "num_hidden_layers": 2}},
            ["conventions and tensors", "hidden size", "vocabulary", "taps"],
        ),
    ],
)
def test_a_target_that_does_not_fit(source, tmp_path, changes, failed):
    found = checks(source, target(tmp_path / "target", **changes))
    assert [name for name, passed in found.items() if passed is False] == failed


def test_a_damaged_map_of_the_draft_vocabulary(tmp_path):
    tensors = PLAIN.tensors | {"d2t": PLAIN.tensors["d2t"][::-1].copy()}
    specforge(Head(tensors), tmp_path / "head", t2d=False)
    assert checks(tmp_path / "head") == {"conventions and tensors": True, "d2t": False}


def test_a_map_that_leaves_the_vocabulary(tmp_path):
    tensors = PLAIN.tensors | {"d2t": PLAIN.tensors["d2t"] + VOCAB}
    specforge(Head(tensors), tmp_path / "head", t2d=False)
    assert checks(tmp_path / "head")["d2t"] is False


def test_a_map_that_is_missing(tmp_path):
    tensors = {name: t for name, t in PLAIN.tensors.items() if name != "d2t"}
    specforge(Head(tensors), tmp_path / "head")
    assert checks(tmp_path / "head")["d2t"] is False


def test_tokenizers(source, tmp_path):
    tokens = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<eos>"}]}
    other = tokens | {"model": {"vocab": {"a": 1, "b": 0}}}
    assert checks(source, target(tmp_path / "none"))["tokenizer"] is None
    (source / "tokenizer.json").write_text(json.dumps(tokens))
    assert checks(source, target(tmp_path / "same", tokens))["tokenizer"] is True
    assert checks(source, target(tmp_path / "other", other))["tokenizer"] is False


def test_reads_no_weights(source):
    """The data of the weights may be anything, even past the end of the file's own pages."""
    path = source / "model.safetensors"
    expected = inspect_drafter(str(source))
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    begin, end = header["midlayer.mlp.gate_proj.weight"]["data_offsets"]
    data[start + begin : start + end] = bytes(end - begin)
    path.write_bytes(data)
    assert inspect_drafter(str(source)) == expected


def test_the_command(source, tmp_path, capsys):
    arguments = ["inspect", str(source), "--target", target(tmp_path / "target")]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    out, error = capsys.readouterr()
    assert "SpecForge" in out
    assert "rule: output of layer" in " ".join(out.split())
    assert error == ""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["values"]["taps"] == [2, 6, 9]


def test_the_command_fails_where_a_check_fails(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(source), "--target", target(tmp_path / "t", hidden_size=64), "--json"])
    assert ended.value.code == 1
    out, error = capsys.readouterr()
    assert json.loads(out)["passed"] is False
    assert error.splitlines()[-1].endswith("failed: hidden size: made for 32, the target has 64")


def test_it_names_the_tensor_that_has_no_place(source, capsys):
    tensors = load_file(source / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"][:5]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(source), "--json"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {source}/model.safetensors: failed: conventions and tensors: ")
    assert line.endswith("norm.weight has shape (5,), its config asks for (32,)")


def test_overrides_are_shown(tmp_path, capsys):
    nested = {"eagle_aux_hidden_state_layer_ids": [3, 5, 8]}
    specforge(PLAIN, tmp_path / "head", eagle_config=nested)
    flags = ["--taps", "input", "--feedback", "post", "--rope-theta", "5e5", "--window", "32"]
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "head"), *flags, "--json"])
    report = json.loads(capsys.readouterr().out)
    values, origin = report["values"], report["provenance"]
    assert (values["taps"], values["feedback"]) == ([3, 5, 8], "post")
    assert (values["rope_theta"], values["sliding_window"]) == (5e5, 32)
    assert origin["feedback"] == origin["rope_theta"] == origin["sliding_window"] == "override"


def test_what_is_no_drafter(tmp_path):
    write_checkpoint(tmp_path / "x", {"weight": np.ones((2, 2))}, {"model_type": "bert"})
    with pytest.raises(DriftError, match="not a drafter of a layout this version reads"):
        inspect_drafter(str(tmp_path / "x"))


def test_the_sliding_window_of_layers_that_differ(tmp_path):
    made = head(layers=2)
    speculators(made, tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    config = json.loads(path.read_text())
    kinds = ["full_attention", "sliding_attention"]
    config["transformer_layer_config"] |= {"sliding_window": 16, "layer_types": kinds}
    path.write_text(json.dumps(config))
    values = inspect_drafter(str(tmp_path / "head")).values
    assert (values["sliding_window"], values["full_attention_layers"]) == (16, [0])
