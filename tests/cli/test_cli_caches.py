"""Caches on the command line: prompt cache files, kv options, the drafter's window."""

import json

import pytest

from demo_text import expected_text
from mlx_drift.demo import QUESTION, TARGET

START, REST = QUESTION[:22], QUESTION[22:]


@pytest.fixture
def file(cli, tmp_path):
    path = tmp_path / "start.safetensors"
    code, out, err = cli("cache-prompt", "--prompt-cache-file", path, "--prompt", START)
    assert (code, err) == (0, "")
    assert out.startswith(f"{path}: ")
    return path


def test_a_prompt_goes_on_from_a_file(cli, file):
    written = file.read_bytes()
    for _ in range(2):
        code, out, err = cli("generate", "--prompt-cache-file", file, REST, "-m", 24)
        assert code == 0
        assert out == expected_text(24) + "\n"
        assert "of them known" in err
    told = json.loads(cli("generate", "--prompt-cache-file", file, REST, "-m", 8, "--json")[1])
    assert told["statistics"]["reuse"] == "extended"
    assert told["statistics"]["reused_tokens"] > 0
    assert file.read_bytes() == written


def test_a_file_is_told_in_json(cli, tmp_path):
    arguments = ("--prompt-cache-file", tmp_path / "c", "--prompt", START, "--json")
    told = json.loads(cli("cache-prompt", *arguments)[1])
    assert told["bytes"] == (tmp_path / "c").stat().st_size
    assert told["prompt_tokens"] > 3


def test_a_file_settles_what_it_was_made_with(refuses, file, tmp_path):
    given = ("generate", "--prompt-cache-file", file, REST)
    refuses("--kv-bits is settled by", *given, "--kv-bits", 8)
    refuses("--max-kv-size is settled by", *given, "--max-kv-size", 80)
    refuses("--system-prompt is settled by", *given, "--system-prompt", "Be brief.")
    refuses("--no-draft is settled by", *given, "--no-draft")
    refuses("another drafter", *given, "--drafter", "eagle3")
    refuses("No such file", "generate", "--prompt-cache-file", tmp_path / "none", REST)
    refuses("is not a prompt cache", *given[:2], TARGET / "model.safetensors", REST)
    refuses("no prompt", "cache-prompt", "--prompt-cache-file", tmp_path / "x")
    refuses("cannot be written", "cache-prompt", "--prompt-cache-file", "/proc/x/y", "-p", "a")


def test_keys_and_values_may_be_quantized(cli, refuses):
    arguments = ("generate", "-m", 24, "--json", "--kv-bits", 8, "--quantized-kv-start", 20)
    with_drafts, alone = (json.loads(cli(*arguments, *o)[1]) for o in ((), ("--no-draft",)))
    assert with_drafts["text"] == alone["text"]
    refuses("--kv-group-size = 48", "generate", "--kv-bits", 8, "--kv-group-size", 48)


def test_a_model_that_makes_its_own_caches_says_so(cli):
    code, out, err = cli("generate", "-m", 8, "--max-kv-size", 64)
    assert (code, out) == (0, expected_text(8) + "\n")
    assert "warning: max_kv_size changes nothing" in err


def test_prompts_are_read_in_steps(cli):
    assert cli("generate", "-m", 8, "--prefill-step-size", 3)[1] == expected_text(8) + "\n"


@pytest.mark.parametrize(
    "flags",
    [
        ("--drafter-window", 4),
        ("--drafter-window", 0),
        ("--drafter-window", 4, "--drafter-sinks", 2),
        ("--drafter-window", 4, "--drafter-sinks", "system"),
    ],
)
def test_the_drafters_window_leaves_the_text_alone(cli, flags):
    assert cli("generate", "-m", 24, *flags)[1] == expected_text(24) + "\n"


def test_a_wrong_number_of_sinks_is_refused(refuses):
    refuses("--drafter-confidence is for DSpark", "generate", "--drafter-confidence", 0.5)
    refuses("--drafter-sinks is some; expected a number", "generate", "--drafter-sinks", "some")
