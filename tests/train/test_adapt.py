"""Adapting a head: what it learns from, that it goes on exactly, what it refuses."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from adapting import (
    ASKING,
    KINDS,
    RECIPE,
    SPOKEN,
    adapt,
    tiny_pair,
    write_data,
    write_tiny_head,
)

from mlx_drift import Asking, DriftError, Recipe, load_demo, load_drafter, stream_generate
from mlx_drift.decode.fingerprint import fingerprint
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.target.model import Target
from mlx_drift.train.adapt import Adaptation, Stopped
from mlx_drift.train.head import load_trainable
from mlx_drift.train.scratch import scratch_config, write_scratch_head
from tiny import NoText, plain_greedy, tiny_llama

CHILD = Path(__file__).with_name("adapting.py")


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapt")
    write_tiny_head(folder / "head", pair[0])
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(pair, folder):
    """The result of a run that nothing disturbed."""
    return adapt(folder, folder / "unbroken", *pair)


def weights(path: Path) -> dict[str, bytes]:
    return {name: bytes(memoryview(a)) for name, a in read_safetensors(path).items()}


def assert_lossless(model, head: Path):
    """The target says what it says alone."""
    prompt = [3, 1, 4, 1, 5]
    drafter = load_drafter(str(head), model)
    said = stream_generate(model, NoText(), prompt, 24, drafter=drafter, num_draft_tokens=3)
    assert [response.token for response in said] == plain_greedy(model, prompt, 24)


def same_result(out: Path, other: Path) -> bool:
    """Whether two runs came to the same weights, in training and in what was written."""
    files = "model.safetensors", "../{}.run/checkpoint.safetensors"
    return all(
        weights(out / file.format(out.name)) == weights(other / file.format(other.name))
        for file in files
    )


def test_a_random_head_learns(pair, folder, unbroken):
    history = unbroken.progress.history
    assert [one["step"] for one in history] == [0, 8, 16, 24]
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    before, after, _ = unbroken.measured[0].acceptance.values()
    assert after["all"].acceptance_length.value > before["all"].acceptance_length.value
    report = json.loads((unbroken.path / "adapted.json").read_text())
    assert report["best_step"] == unbroken.progress.best_step > 0
    card = (unbroken.path / "README.md").read_text()
    assert "| before | after | after ÷ before | prompt lookup |" in card
    lengths = [one["all"].acceptance_length.value for one in (before, after)]
    assert "| held out (1) | {:.2f} | {:.2f} |".format(*lengths) in card
    assert_lossless(pair[0], unbroken.path)


def test_stopped_after_any_step_it_goes_on(pair, folder, unbroken):
    out, asked = folder / "stopped", random.Random(5)
    while not out.exists():
        left = asked.randrange(1, 12)

        def stop():
            nonlocal left
            left -= 1
            return left < 0

        with suppress(Stopped):
            adapt(folder, out, *pair, stop=stop)
    assert same_result(out, unbroken.path)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_goes_on(folder, unbroken, kills):
    out, drawn = folder / f"killed-{kills}", random.Random(kills)
    killed = 0
    while not out.exists():
        child = subprocess.Popen(
            [sys.executable, str(CHILD), str(folder), str(out)],
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        if killed < kills:
            for _ in range(drawn.randrange(1, 60 // kills + 2)):
                child.stdout.readline()
            time.sleep(drawn.random() * 0.05)
            child.kill()
        child.communicate()
        killed += child.returncode == -signal.SIGKILL
        assert child.returncode in (0, -signal.SIGKILL)
    assert killed == kills
    assert same_result(out, unbroken.path)


def test_a_run_goes_on_as_it_was_begun_or_not_at_all(pair, folder, unbroken):
    again = folder / "again"
    with pytest.raises(Stopped):
        adapt(folder, again, *pair, stop=lambda: True)
    with pytest.raises(DriftError, match=r"with another learning_rate was begun in it, 0\.01"):
        adapt(folder, again, *pair, recipe={"learning_rate": 1e-3})
    run = folder / "again.run"
    for name in ("checkpoint.safetensors", "run.json"):
        (run / name).write_text("junk")
        with pytest.raises(DriftError, match=rf"again\.run/{name}: damaged.* begin.? anew"):
            adapt(folder, again, *pair)
    with pytest.raises(DriftError, match="exists already"):
        adapt(folder, unbroken.path, *pair)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_best_head_that_is_damaged_is_told(file, pair, folder, unbroken, tmp_path):
    shutil.copytree(folder / "unbroken.run", tmp_path / "out.run")
    (tmp_path / "out.run" / "best" / file).write_text("junk")
    with pytest.raises(DriftError, match=r"out\.run/best: damaged.*remove .*/checkpoint\.safetens"):
        adapt(folder, tmp_path / "out", *pair)


def test_low_rank_factors_are_merged(pair, folder):
    before = fingerprint(pair[0])
    done = adapt(folder, folder / "low rank", *pair, recipe={"rank": 4, "learning_rate": 1e-2})
    assert done.progress.best_step > 0
    old, new = (
        read_safetensors(path / "model.safetensors") for path in (folder / "head", done.path)
    )
    assert old.keys() == new.keys()
    changed = {name for name in old if not mx.array_equal(old[name], new[name])}
    assert changed == {name for name in old if old[name].ndim == 2}
    difference = np.array(new["fc.weight"] - old["fc.weight"])
    assert np.linalg.matrix_rank(difference, tol=1e-4) <= 4
    assert fingerprint(pair[0]) == before


def test_a_loss_that_is_no_number_stops(pair, folder, tmp_path):
    spoilt = tmp_path / "head"
    shutil.copytree(folder / "head", spoilt)
    weights = read_safetensors(spoilt / "model.safetensors")
    weights["fc.weight"] = mx.full(weights["fc.weight"].shape, 1e38)
    mx.eval(weights)
    mx.save_safetensors(str(spoilt / "model.safetensors"), weights)
    shutil.copy(folder / "questions.jsonl", tmp_path)
    with pytest.raises(DriftError, match=r"of step 1 is not a finite number; the best head so far"):
        adapt(tmp_path, tmp_path / "out", *pair)
    assert not (tmp_path / "out").exists()
    load_drafter(str(tmp_path / "out.run" / "best"), pair[0])


def test_what_does_not_fit_is_refused_before_it_begins(pair, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_drift.train.memory.machine_memory", lambda: 1 << 20)
    with pytest.raises(DriftError, match=r"would take about 0\.0 GB \(target 0\.0, head.*has 0\.0"):
        adapt(folder, tmp_path / "out", *pair)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["eagle3", *KINDS])
def test_the_other_kinds(kind, pair, folder, tmp_path):
    write_tiny_head(tmp_path / "head", pair[0], kind)
    shutil.copy(folder / "questions.jsonl", tmp_path)
    recipe = {"iters": 8, "steps_per_eval": 8}
    done = adapt(tmp_path, tmp_path / "out", *pair, limit=4, recipe=recipe)
    start, end = done.progress.history
    assert end["val_loss"] < start["val_loss"]
    assert done.progress.best_step == 8
    assert_lossless(pair[0], done.path)
    before, after = (
        read_safetensors(f / "model.safetensors") for f in (tmp_path / "head", done.path)
    )
    unchanged = {name for name in before if mx.array_equal(before[name], after[name])}
    assert unchanged <= {"d2t"}


def test_from_nothing_on_questions_of_its_own(tmp_path):
    model, tokenizer, _ = load_demo()
    done = adapt(
        tmp_path,
        tmp_path / "out",
        model,
        tokenizer,
        drafter=None,
        data=None,
        limit=4,
        from_scratch="eagle3.1",
        draft_vocab_size=64,
        asking={"num_draft_tokens": 0},
        recipe={"iters": 4, "steps_per_eval": 4, "learning_rate": 1e-3},
    )
    start, end = done.progress.history
    assert end["val_loss"] < start["val_loss"]
    config = json.loads((tmp_path / "out.run" / "start" / "config.json").read_text())
    assert (config["taps"], config["draft_vocab_size"]) == ([2, 4, 5], 64)
    assert (config["feedback"], config["fc_norm"], config["own_head"]) == ("post", True, True)
    assert_lossless(model, tmp_path / "out")
    with pytest.raises(DriftError, match="a head to adapt, or a kind to train from scratch"):
        Adaptation(model, tokenizer, None, "x")


def test_from_nothing_without_its_norms(folder, tmp_path):
    pair = tiny_pair(num_hidden_layers=7)
    shutil.copy(folder / "questions.jsonl", tmp_path)
    done = adapt(
        tmp_path,
        tmp_path / "out",
        *pair,
        drafter=None,
        from_scratch="eagle3",
        draft_vocab_size=SPOKEN,
        recipe={"iters": 16},
    )
    start, *_, end = done.progress.history
    assert end["val_loss"] < start["val_loss"]
    assert done.progress.best_step > 0
    config = json.loads((done.path / "config.json").read_text())
    assert (config["taps"], config["feedback"], config["fc_norm"]) == ([2, 3, 4], "pre", False)
    assert_lossless(pair[0], done.path)
    with pytest.raises(DriftError, match="the target has 6 layers; a head from scratch taps 2, n"):
        scratch_config("eagle3", Target(tiny_llama(num_hidden_layers=6)), None, 64)


def test_a_head_from_nothing_is_a_logit_lens(tmp_path):
    """What it says first is what the target's head makes of the deepest tap."""
    model, _, _ = load_demo()
    target = Target(model)
    config = scratch_config("eagle3", target, None, 64)
    folder = write_scratch_head(tmp_path / "head", config, target, [], 0)
    drafter = load_trainable(folder, model)
    target = Target(model, drafter.taps)
    tokens = mx.array([3, 1, 4, 1, 5, 9], dtype=mx.int32)
    _, taps = target(tokens, target.make_cache())
    logits, _ = next(drafter.train_time_test_steps(tokens, taps[:-1].astype(mx.float32), 1))
    norm = model.model.norm
    expected = target.head(norm(taps[:-1, -1])).astype(mx.float32)
    np.testing.assert_allclose(logits, expected, rtol=0.02, atol=0.05 * np.abs(expected).max())
    assert mx.array_equal(mx.argmax(logits, -1), mx.argmax(expected, -1))


def test_a_plan_computes_little_and_writes_nothing(pair, folder, tmp_path):
    recipe, asking = Recipe(**RECIPE), Asking(**ASKING)
    head, data = str(folder / "head"), str(folder / "questions.jsonl")
    plan = Adaptation(*pair, head, data, recipe=recipe, asking=asking).plan()
    assert plan.conversations == {"train": 11, "valid": 1, "test": 0, "control": 0}
    assert plan.memory.total == sum(plan.memory.terms.values()) < plan.memory.device
    assert plan.seconds > RECIPE["iters"] * plan.step_seconds > 0


def test_the_command(cli, tmp_path, monkeypatch):
    """The embedded pair, every turn of what is written, what is told to whom, and a picture."""
    told_wandb, started = [], {}
    wandb = SimpleNamespace(
        init=lambda **settings: started.update(settings),
        log=lambda told, step: told_wandb.append(told),
    )
    monkeypatch.setattr("mlx_lm.tuner.callbacks.wandb", wandb)
    data = tmp_path / "train.jsonl"
    chat = [("user", "What is json?"), ("assistant", "A format."), ("user", "And csv?")]
    chat.append(("assistant", "Another one."))
    line = json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]})
    data.write_text("\n".join([line, line.replace("json", "toml")]))
    out, picture = tmp_path / "out", tmp_path / "picture.png"
    arguments = ["adapt", "--data", tmp_path, "--mlx-path", out, "--answers", "given"]
    arguments += ["--iters", 2, "--batch-size", 1, "--steps", 2, "--max-tokens", 16, "--json"]
    code, told, err = cli(*arguments, "--plot", picture, "--report-to", "wandb")
    assert code == 0, err
    report = json.loads(told)
    assert report["step"] == 2
    assert report["conditions"][0]["condition"] == "held out"
    assert [*report["conditions"][0]["drafters"]] == ["before", "after", "prompt lookup"]
    assert report["distinct_4_grams"]["all"] > 0
    assert "step 2 of 2: loss" in err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert started["dir"] == str(tmp_path / "out.run")
    losses = [("val_loss" in one, one["iteration"]) for one in told_wandb]
    assert losses == [(True, 0), (False, 2), (True, 2)]
    code, told, err = cli("adapt", "--data", tmp_path, "--mlx-path", out)
    assert (code, told) == (1, "")
    assert err == f"error: {out} exists already; choose another --mlx-path, or remove it first\n"
