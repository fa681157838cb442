"""`mlx-drift adapt` says in one line what is wrong with what it is given, and leaves nothing."""

import json
import os
import shutil
import signal
from dataclasses import asdict

import numpy as np
import pytest
from adapting import tiny_pair, write_tiny_head

from mlx_drift import Asking, DriftError, Recipe
from mlx_drift.cli.adapt import stopping
from mlx_drift.demo import TARGET

QUESTION, OTHER = {"turns": ["What is json?"]}, {"turns": ["How?"]}
TWO = [QUESTION, OTHER]


def write(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        ([], [], "there are no conversations in it"),
        ([QUESTION], [], "one conversation; expected at least two"),
        ([QUESTION, {"what": 1}], [], "line 2: none of the fields"),
        (
            TWO,
            ["--answers", "given"],
            "there is no assistant's message to learn from; let the target answer with --answers",
        ),
        (
            [{"text": "Some."}, {"text": "More."}],
            [],
            "data, conversation 2: a text, so there is nothing to answer; learn from what it says",
        ),
        (
            [{"messages": [{"role": "assistant", "content": text}]} for text in ("A", "B")],
            [],
            "data, conversation 2: no message of the user's, so there is nothing to answer",
        ),
        (
            TWO,
            ["--max-seq-length", 5000],
            "5000; expected at most 4096, as max_position",
        ),
        (
            TWO,
            ["--chat-template", os.devnull],
            "null: the chat template lays out nothing of a conversation",
        ),
        (TWO, ["--data", "data/none.jsonl"], "data/none.jsonl: no such file here"),
        (TWO, ["--learning-rate", 0], "--learning-rate is 0.0; expected more than 0"),
        (
            TWO,
            ["--learning-rate", "nan"],
            "--learning-rate is nan; expected more than 0 and at most 1",
        ),
        (
            TWO,
            ["--num-draft-tokens", 65],
            "--num-draft-tokens is 65; expected at least 1 and at most",
        ),
        (TWO, ["--temp", 1e-9], "temp is 1e-09; expected 0, or at least 0.0001"),
        (TWO, ["--questions", "self"], "--data, or --questions self: give one of them"),
        (TWO, ["--draft-vocab-size", 9], "--draft-vocab-size is for --from-scratch"),
        (TWO, ["--chat-template", "no.jinja"], "no.jinja: cannot be read"),
        (TWO, ["--report-to", "paper"], "--report-to paper: paper callback doesn't"),
        (
            TWO,
            ["--from-scratch", "eagle3", "--answer-draft-tokens", 2],
            "without a head there are no drafts to answer with",
        ),
    ],
)
def test_what_is_wrong_is_told(refuses, tmp_path, records, arguments, message):
    data = write(tmp_path / "data.jsonl", *records)
    refuses(message, "adapt", "--data", data, "--mlx-path", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Asking(num_draft_tokens=65), "num_draft_tokens is 65; expected at least 0 and at"),
        (lambda: Asking(max_tokens=1), "max_tokens is 1; expected at least 2"),
        (lambda: Asking(sampled=1.5), "sampled is 1.5; expected at least 0 and at most 1"),
        (lambda: Asking(temp=float("nan")), "temp is nan; expected at least 0"),
        (lambda: Recipe(iters="many"), "iters is 'many'; expected a whole number"),
        (lambda: Recipe(batch_size=1.5), "batch_size is 1.5; expected a whole number"),
        (lambda: Recipe(loss="l2"), "loss is 'l2'; expected one of soft-ce, tv"),
    ],
)
def test_a_number_that_makes_no_sense_in_python(made, message):
    with pytest.raises(DriftError) as refused:
        made()
    assert str(refused.value).startswith(message)


def test_numbers_of_numpy_become_pythons():
    assert json.dumps(asdict(Recipe(iters=np.int64(3), learning_rate=np.float32(0.5))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mlx-path", "there"], "there exists already; choose another --mlx-path"),
        (["--mlx-path", "out", "--upload-repo", "mine"], "mine: expected a Hub repository as own"),
    ],
)
def test_where_it_goes_is_checked_before_anything_is_loaded(
    arguments, message, refuses, tmp_path, monkeypatch
):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    given = "--model", "no/such", "--drafter", "no/such", "--report-to", "wandb"
    refuses(message, "adapt", "--data", "none.jsonl", *given, *arguments)


def test_conversations_that_are_all_too_long(cli, tmp_path):
    data = write(tmp_path / "data.jsonl", *TWO)
    out = tmp_path / "out"
    code, _, err = cli("adapt", "--data", data, "--mlx-path", out, "--max-seq-length", 8)
    assert code == 1
    last = err.splitlines()[-1]
    what = "1 of 1 conversations leave no room for an answer in 8 tokens"
    assert last == f"error: nothing is left to learn from: {what}"


def test_texts_that_are_all_too_short_for_a_draft(cli, tmp_path):
    data = write(tmp_path / "data.jsonl", *({"text": letter} for letter in "abc"))
    out = tmp_path / "out"
    code, _, err = cli("adapt", "--data", data, "--mlx-path", out, "--answers", "given")
    assert code == 1
    what = "2 of 2 conversations say too little for a draft within 2048 tokens"
    assert err.splitlines()[-1] == f"error: nothing is left to learn from: {what}"


def test_a_held_out_text_that_is_too_short_is_left_out(cli, tmp_path):
    write(tmp_path / "train.jsonl", {"text": "What is json? It is a format of data."})
    write(tmp_path / "valid.jsonl", {"text": "a"})
    out = tmp_path / "out"
    code, _, err = cli("adapt", "--data", tmp_path, "--mlx-path", out, "--answers", "given")
    assert code == 1
    what = "1 of 1 conversations say too little for a draft within 2048 tokens"
    assert err.splitlines()[-1] == f"error: nothing is left to measure on: {what}"


def test_ctrl_c_is_waited_for_once():
    before = signal.getsignal(signal.SIGINT)
    with stopping() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_head_of_another_target(refuses, tmp_path):
    head = write_tiny_head(tmp_path / "head", tiny_pair()[0])
    data = write(tmp_path / "data.jsonl", *TWO)
    refuses(
        "the drafter was made for a target whose hidden size is 32, but this target's is 256",
        *("adapt", "--model", TARGET, "--drafter", head, "--data", data),
        *("--mlx-path", tmp_path / "out"),
    )


def test_a_tokenizer_without_a_template(refuses, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(TARGET, target)
    (target / "chat_template.jinja").unlink()
    config = json.loads((target / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    data = write(tmp_path / "data.jsonl", *TWO)
    refuses(
        "the target's tokenizer has no chat template to lay around conversations; give one with",
        *("adapt", "--model", target, "--drafter", TARGET.parent / "eagle3.1", "--data", data),
        *("--mlx-path", tmp_path / "out"),
    )
