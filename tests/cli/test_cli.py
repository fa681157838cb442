"""The command line: results on stdout, everything else on stderr, one clear line for bad input."""

import io
import json
import os
import pickle
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import typer
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from checkpoints import specforge_config, specforge_tensors, write_checkpoint
from demo_text import expected_text
from mlx_drift import load_demo, stream_generate
from mlx_drift.cli import app
from mlx_drift.demo import DEMO, QUESTION, TARGET
from mlx_drift.errors import DriftError

# --- generate ---------------------------------------------------------------------------------


def test_with_nothing_given_the_embedded_pair_answers(cli):
    code, out, err = cli("generate", "--max-tokens", 24)
    assert code == 0
    assert out == expected_text(24) + "\n"
    for figure in ("prompt", "generation", "rounds", "acceptance_length", "tokens_per_round"):
        assert figure in err
    for figure in ("conditional acceptance", "against plain", "peak memory"):
        assert figure in err


def test_json(cli):
    code, out, _ = cli("generate", "--max-tokens", 24, "--json", "--num-draft-tokens", 4)
    report = json.loads(out)
    assert code == 0
    assert report["text"] == expected_text(24)
    assert report["generation_tokens"] <= 24
    assert report["statistics"]["rounds"] < report["generation_tokens"]
    assert len(report["statistics"]["conditional_acceptance"]) <= 4
    assert report["statistics"]["speedup_over_plain"] > 0


@pytest.mark.parametrize("drafter", ["eagle3", "eagle3.1"])
def test_both_embedded_drafters_give_the_same_text(cli, drafter):
    assert cli("generate", "--drafter", drafter, "-m", 16)[1] == expected_text(16) + "\n"


def test_prompt_from_argument_option_file_and_stdin(cli, tmp_path, monkeypatch):
    question = "What is `bisect.insort` for?"
    expected = expected_text(8, question) + "\n"
    (tmp_path / "prompt.txt").write_text(question)
    assert cli("generate", question, "-m", 8)[1] == expected
    assert cli("generate", "--prompt", question, "-m", 8)[1] == expected
    assert cli("generate", "--prompt-file", tmp_path / "prompt.txt", "-m", 8)[1] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(question.encode())))
    assert cli("generate", "-", "-m", 8)[1] == expected


def test_explicit_model_and_drafter(cli):
    given = ("--model", TARGET, "--drafter", DEMO / "eagle3.1", "-p", QUESTION, "-m", 12)
    assert cli("generate", *given)[1] == expected_text(12) + "\n"
    assert cli("generate", *given, "--no-draft")[1] == expected_text(12) + "\n"


def test_lora_adapters(cli, tmp_path):
    """Layers that mlx-lm replaced by LoRA layers are tapped all the same."""
    model, _ = mlx_lm.load(str(TARGET))
    lora = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    mx.random.seed(0)
    linear_to_lora_layers(model, 4, lora)
    adapters = {
        name: mx.random.normal(value.shape) * 0.05
        for name, value in tree_flatten(model.parameters())
        if "lora" in name
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), adapters)
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": lora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    code, out, _ = cli("generate", "--adapter-path", tmp_path, "-m", 16)
    assert code == 0
    assert out != expected_text(16) + "\n"
    assert out == cli("generate", "--adapter-path", tmp_path, "-m", 16, "--no-draft")[1]


def test_no_draft_shows_no_rounds(cli):
    code, out, err = cli("generate", "--no-draft", "-m", 8, "--json")
    assert code == 0
    assert json.loads(out)["statistics"] is None
    assert "acceptance" not in err


def test_template_options_change_the_prompt(cli):
    def prompt_tokens(*options):
        return json.loads(cli("generate", *options, "-m", 1, "--json")[1])["prompt_tokens"]

    plain = prompt_tokens()
    assert prompt_tokens("--system-prompt", "Be concise.") > plain
    assert prompt_tokens("--prefill-response", "Remove any") > plain
    assert prompt_tokens("--ignore-chat-template") < plain
    assert prompt_tokens("--chat-template-config", '{"add_generation_prompt": false}') < plain


def test_extra_eos_token_ends_the_text(cli):
    tokenizer = load_demo()[1]
    text = expected_text(40)
    stop = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))[10]
    code, out, _ = cli("generate", "-m", 40, "--json", "--extra-eos-token", stop)
    report = json.loads(out)
    assert code == 0
    assert report["finish_reason"] == "stop"
    assert report["generation_tokens"] <= 11
    assert text.startswith(report["text"])


def test_ctrl_c_ends_cleanly(cli, monkeypatch):
    """The text so far stays, the statistics come, the exit code is the shell's."""

    def interrupted_after_five(*arguments, **keywords):
        for count, response in enumerate(stream_generate(*arguments, **keywords)):
            if count == 5:
                raise KeyboardInterrupt
            yield response

    command = sys.modules["mlx_drift.cli.generate"]  # the name is the command's, too
    monkeypatch.setattr(command, "stream_generate", interrupted_after_five)
    code, out, err = cli("generate", "-m", 40)
    assert code == 130
    assert out.strip()
    assert expected_text(40).startswith(out.removesuffix("\n"))
    assert "5 tokens" in err
    assert "(interrupted)" in err


# --- bad input --------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "source", specforge_tensors())


def test_refuses_an_end_token_the_tokenizer_lacks(refuses):
    refuses("has no such token", "generate", "--extra-eos-token", "<|no such|>")


@pytest.mark.parametrize("k", [0, -1, 10_000])
def test_refuses_a_k_out_of_range(refuses, k):
    refuses(f"--num-draft-tokens is {k}; expected 1 to 64", "generate", "--num-draft-tokens", k)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tree", -2], "error: --tree is -2; expected 2 to 65 rows"),
        (["--max-tokens", 0], "error: --max-tokens is 0; expected"),
        (
            ["--kv-bits", 8, "--quantized-kv-start", -1],
            "error: --quantized-kv-start is -1 and --kv-group-size 64; expected",
        ),
    ],
)
def test_refusals_name_flags(refuses, arguments, line):
    assert refuses("", "generate", *arguments).startswith(line)


def test_refusals_name_what_a_file_has_as_the_file_does(refuses, monkeypatch):
    def refused(*args, **kwargs):
        raise DriftError("temp is 7.0 and top_k 9; expected less: temp is a temperature")

    monkeypatch.setattr(import_module("mlx_drift.cli.generate"), "stream_generate", refused)
    end = "; expected less: temp is a temperature"
    for given in ([], ["--temp", 8], ["--seed", 9]):
        refuses("error: temp is 7.0 and top_k 9" + end, "generate", *given)
    for given in (["--temp", 7], ["--top-k", 9]):
        refuses("error: --temp is 7.0 and --top-k 9" + end, "generate", *given)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_refuses_an_empty_prompt(refuses, prompt):
    refuses("the prompt is empty", "generate", "--prompt", prompt)


def test_refuses_a_missing_model(refuses, tmp_path):
    missing = tmp_path / "nowhere"
    refuses(f"{missing}: no such folder", "generate", "--model", missing, "--no-draft", "-p", "x")


def test_refuses_a_missing_drafter(refuses, tmp_path):
    missing = tmp_path / "nowhere"
    arguments = ("--model", TARGET, "--drafter", missing, "-p", "x")
    refuses(f"{missing}: no such folder", "generate", *arguments)


def test_refuses_a_model_without_a_drafter(refuses):
    refuses("no drafter given", "generate", "--model", TARGET, "-p", "x")


def test_refuses_template_options_the_template_refuses(refuses):
    refuses("is not valid JSON", "generate", "--chat-template-config", "{")
    refuses("expected an object", "generate", "--chat-template-config", "[]")
    refuses("chat template refuses", "generate", "--chat-template-config", '{"messages": 1}')


def test_refuses_an_unconverted_drafter(refuses, checkpoint):
    arguments = ("--model", TARGET, "--drafter", checkpoint, "-p", "x")
    refuses("mlx-drift convert", "generate", *arguments)


def test_refuses_a_drafter_for_another_hidden_size(cli, refuses, checkpoint, tmp_path):
    assert cli("convert", checkpoint, "--mlx-path", tmp_path / "out")[0] == 0
    arguments = ("--model", TARGET, "--drafter", tmp_path / "out", "-p", "x")
    refuses("hidden size is 32, but this target's is 256", "generate", *arguments)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 4097, "vocabulary size is 4097, but this target's is 4096"),
        ("num_layers", 9, "number of layers is 9, but this target's is 8"),
    ],
)
def test_refuses_a_drafter_for_another_target(refuses, tmp_path, key, value, message):
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    for file in (DEMO / "eagle3.1").iterdir():
        (drafter / file.name).write_bytes(file.read_bytes())
    config = json.loads((drafter / "config.json").read_text())
    config["target"][key] = value
    (drafter / "config.json").write_text(json.dumps(config))
    refuses(message, "generate", "--model", TARGET, "--drafter", drafter, "-p", "x")


def test_a_target_with_sliding_windows_says_the_same_with_a_drafter(cli, tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 4
    config = json.loads((TARGET / "config.json").read_text())
    config |= {"layer_types": kinds, "sliding_window": 16}
    target = tmp_path / "target"
    target.mkdir()
    for file in TARGET.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "config.json").write_text(json.dumps(config))
    arguments = ("generate", "--model", target, "-p", QUESTION, "-m", "48")
    code, plain, _ = cli(*arguments, "--no-draft")
    assert code == 0
    code, drafted, _ = cli(*arguments, "--drafter", DEMO / "eagle3.1")
    assert code == 0
    assert drafted == plain


@pytest.mark.parametrize("keep", [0, 4, 1000])
def test_refuses_truncated_safetensors(refuses, checkpoint, tmp_path, keep):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refuses("cannot be read as safetensors", "convert", checkpoint, "--mlx-path", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_corrupt_safetensors(refuses, checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])  # a header of 2⁶⁴ bytes
    refuses("cannot be read as safetensors", "convert", checkpoint, "--mlx-path", tmp_path / "out")


def test_refuses_a_truncated_converted_drafter(refuses, tmp_path):
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    for file in (DEMO / "eagle3.1").iterdir():
        (drafter / file.name).write_bytes(file.read_bytes()[:100_000])
    arguments = ("--model", TARGET, "--drafter", drafter, "-p", "x")
    refuses("cannot be read as safetensors", "generate", *arguments)


class Bomb:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_refuses_a_malicious_pickle(refuses, checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    touched = tmp_path / "touched"
    with zipfile.ZipFile(checkpoint / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Bomb(f"touch {touched}")}))
        archive.writestr("archive/byteorder", "little")
    refuses("system", "convert", checkpoint, "--mlx-path", tmp_path / "out")
    assert not touched.exists()
    assert not (tmp_path / "out").exists()


def test_refuses_an_unknown_tensor(refuses, tmp_path):
    tensors = specforge_tensors()
    tensors["midlayer.gate.weight"] = tensors["norm.weight"]
    source = write_checkpoint(tmp_path / "source", tensors)
    refuses("layers.0.gate.weight", "convert", source, "--mlx-path", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_a_folder_that_exists(refuses, checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    refuses("exists already", "convert", checkpoint, "--mlx-path", tmp_path / "out")


def test_refuses_an_unwritable_folder(refuses, checkpoint, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refuses("cannot be written", "convert", checkpoint, "--mlx-path", tmp_path / "file" / "out")


def test_refuses_a_folder_without_permission(refuses, checkpoint, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", denied)  # root, as in CI, may write anywhere
    refuses("(Permission denied)", "convert", checkpoint, "--mlx-path", tmp_path / "out")


def test_a_failed_write_leaves_nothing(refuses, checkpoint, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    refuses("cannot be written", "convert", checkpoint, "--mlx-path", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refuses_a_damaged_model(refuses, tmp_path):
    (tmp_path / "config.json").write_text("{")
    refuses("mlx-lm cannot load it", "generate", "--model", tmp_path, "--no-draft", "-p", "x")


def test_more_than_one_prompt_is_a_usage_error(cli):
    code, _, err = cli("generate", "one", "--prompt", "two")
    assert code == 2
    assert "PROMPT" in err


# --- convert ----------------------------------------------------------------------------------


def test_convert_prints_what_it_decided(cli, checkpoint, tmp_path):
    code, out, err = cli("convert", checkpoint, "--mlx-path", tmp_path / "out")
    assert code == 0
    assert out == ""
    for word in ("SpecForge", "taps", "[2, 3, 4]", "feedback", "post"):
        assert word in err


def test_convert_json(cli, checkpoint, tmp_path):
    code, out, _ = cli("convert", checkpoint, "--mlx-path", tmp_path / "out", "--json")
    assert code == 0
    report, config = json.loads(out), json.loads((tmp_path / "out" / "config.json").read_text())
    assert report | config == report
    assert report["dialect"] == "SpecForge"


def test_convert_warns_of_config_keys_nobody_reads(cli, tmp_path):
    config = specforge_config(gated_attention=True)
    source = write_checkpoint(tmp_path / "source", specforge_tensors(), config)
    code, _, err = cli("convert", source, "--mlx-path", tmp_path / "out")
    assert code == 0
    assert "gated_attention" in err


@pytest.mark.parametrize("command", typer.main.get_command(app).commands)
def test_help_is_there_and_a_usage_error_is_told(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f" {command} " in out
    code, _, err = cli(command, "--no-such-option")
    assert code == 2
    assert "no-such-option" in err
