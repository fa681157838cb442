"""Drafters converted on first use: kept, found again, whole whatever happens meanwhile."""

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from time import sleep, time

import numpy as np
import pytest
from huggingface_hub import constants, utils

from checkpoints import embedded_checkpoint, specforge_config, specforge_tensors, write_checkpoint
from hub_stub import COMMIT, StubHub, set_endpoint, settle
from mlx_drift import DriftError, convert_drafter, load_drafter
from mlx_drift.demo import DEMO, QUESTION, TARGET
from mlx_drift.errors import DriftWarning
from mlx_drift.loading import drafter_cache
from mlx_drift.target.model import Target
from tiny import HIDDEN, tiny_llama

REPO = "someone/tiny-eagle3"
WIDE = 100_000  # makes a checkpoint of 19 MB, so that converting it takes a while
KILLS = 10


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    settle(monkeypatch, tmp_path)
    monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path / "converted"))
    yield
    utils.close_session()


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def serve(monkeypatch):
    """Serves a folder as the repository until the test ends."""
    with ExitStack() as stack:

        def serve(folder):
            hub = stack.enter_context(StubHub(folder, REPO).serve())
            set_endpoint(monkeypatch, hub.endpoint)
            return hub

        yield serve


@pytest.fixture
def hub(serve, tmp_path):
    return serve(write_checkpoint(tmp_path / "repo", specforge_tensors()))


def entries(hidden=False):
    """The folders of the cache; or what was left unfinished there."""
    home = drafter_cache() / REPO.replace("/", "--")
    return sorted(path for path in home.glob("*/") if path.name.startswith(".") == hidden)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights_asked(hub):
    return [path for path in hub.asked if path.endswith(".safetensors")]


def refusal(call, *arguments, **keywords):
    with pytest.raises(DriftError) as caught:
        call(*arguments, **keywords)
    (line,) = str(caught.value).splitlines()
    return line


def test_converts_once_and_is_found_again(hub, model, offline, tmp_path):
    converted = []
    with pytest.warns(DriftWarning, match="norm_output is true"):
        load_drafter(REPO, model, on_convert=converted.append)
    (entry,) = entries()
    assert converted == [entry]
    assert entry.name.startswith(f"{COMMIT}-")
    assert not entries(hidden=True)
    first, made = contents(entry), entry.stat().st_mtime_ns
    assert weights_asked(hub)

    hub.asked.clear()
    load_drafter(REPO, model, on_convert=converted.append)
    assert not weights_asked(hub)
    offline()
    load_drafter(REPO, model, on_convert=converted.append)
    load_drafter(REPO, model, revision=COMMIT, on_convert=converted.append)
    assert entries() == [entry]
    assert (contents(entry), entry.stat().st_mtime_ns) == (first, made)
    assert len(converted) == 1

    convert_drafter(REPO, tmp_path / entry.name, target=Target(model).shape)
    assert contents(tmp_path / entry.name) == first


def test_commit_options_target_and_subfolder_make_an_entry_each(hub, model):
    other_target = tiny_llama(num_hidden_layers=6)
    for folder in ("a/b", "a--b", "a-"):
        write_checkpoint(hub.folder / folder, specforge_tensors())
    calls = [
        (REPO, model, {}),
        (REPO, model, {"quantize": True, "q_group_size": 32}),
        (REPO, model, {"taps": "input"}),
        (REPO, other_target, {}),
        *((f"{REPO}/{folder}", model, {}) for folder in ("a/b", "a--b", "a-")),
    ]
    for _ in range(2):
        for repo, target, options in calls:
            load_drafter(repo, target, **options)
        assert len(entries()) == len(calls)
    hub.commit = COMMIT[::-1]  # main has moved on
    load_drafter(REPO, model)
    assert len(entries()) == len(calls) + 1
    assert load_drafter(REPO, model, taps="input").config.taps == (1, 2, 3)
    assert load_drafter(REPO, model).config.taps == (2, 3, 4)


def test_tells_of_config_keys_that_nothing_reads(serve, model, tmp_path):
    config = specforge_config(gated_attention=True)
    serve(write_checkpoint(tmp_path / "repo", specforge_tensors(), config))
    with pytest.warns(DriftWarning, match="config keys that nothing reads: gated_attention"):
        load_drafter(REPO, model)


def test_generate_converts_and_another_process_finds_it_offline(cli, serve, tmp_path):
    hub = serve(embedded_checkpoint(tmp_path / "repo"))
    arguments = ["generate", "--model", str(TARGET), "-p", QUESTION, "-m", "16", "--json"]
    arguments += ["--num-draft-tokens", "3"]  # auto depends on time

    def told(out):
        report = json.loads(out)
        return report["text"], report["statistics"]["conditional_acceptance"]

    code, out, err = cli(*arguments, "--drafter", REPO)
    assert code == 0, err
    assert "warning: norm_output is true" in err
    expected = told(cli(*arguments, "--drafter", DEMO / "eagle3.1")[1])
    assert told(out) == expected
    (entry,) = entries()

    hub.asked.clear()
    quick = "import sys; sys.modules['torch'] = None"
    main = "from mlx_drift.cli import main; main()"
    environment = {"HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"{quick}; {main}", *arguments, "--drafter", REPO],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert told(done.stdout) == expected
    assert entries() == [entry]
    assert not hub.asked


def test_a_repository_of_a_converted_drafter_is_used_as_it_is(cli, serve):
    hub = serve(DEMO / "eagle3.1")
    arguments = ("generate", "--model", TARGET, "--drafter", REPO, "-p", "x", "-m", 8)
    for _ in range(2):
        code, _, err = cli(*arguments)
        assert code == 0, err
        assert not drafter_cache().exists()
    assert len(set(weights_asked(hub))) == 1
    line = refusal(load_drafter, REPO, None, quantize=True)
    assert line.startswith(f"{REPO} is converted already, so quantize has nothing to say")


def test_what_cannot_be_converted_leaves_nothing(serve, model, tmp_path):
    tensors = specforge_tensors()
    tensors["midlayer.gate.weight"] = tensors["norm.weight"]
    hub = serve(write_checkpoint(tmp_path / "repo", tensors))
    assert "layers.0.gate.weight" in refusal(load_drafter, REPO, model)
    assert not entries()
    assert not entries(hidden=True)
    write_checkpoint(hub.folder, specforge_tensors())
    hub.commit = COMMIT[::-1]
    load_drafter(REPO, model)


def test_a_cache_that_cannot_be_written(hub, model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where the cache should be")
    monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path / "file"))
    line = refusal(load_drafter, REPO, model)
    assert "cannot be written" in line
    assert "MLX_DRIFT_CACHE" in line


# --- several processes ------------------------------------------------------------------------


class Child:
    """A process of `converting_child`."""

    def __init__(self, endpoint):
        script = Path(__file__).with_name("converting_child.py")
        environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_CACHE": constants.HF_HUB_CACHE,
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, script, REPO],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self):
        assert self.process.stdout.readline() == "ready\n"

    def order(self, cache, mlx_path=None, at=0.0):
        order = {"cache": str(cache), "mlx_path": mlx_path and str(mlx_path), "at": at}
        print(json.dumps(order), file=self.process.stdin, flush=True)

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def children():
    """Starts processes and sees to their end."""
    started = []

    def start(endpoint):
        started.append(Child(endpoint))
        return started[-1]

    yield start
    for child in started:
        child.kill()


@pytest.fixture
def big(serve, model, tmp_path, monkeypatch):
    """The Hub of a big checkpoint, with which to compare: the contents of its conversions."""
    rng = np.random.default_rng(0)
    tensors = specforge_tensors()
    for name, shape in (("gate", (WIDE, HIDDEN)), ("up", (WIDE, HIDDEN)), ("down", (HIDDEN, WIDE))):
        bits = rng.integers(0, 0x3C00, shape, np.uint16)  # as float16: from 0 up to 1
        tensors[f"midlayer.mlp.{name}_proj.weight"] = bits.view(np.float16)
    config = specforge_config(intermediate_size=WIDE)
    hub = serve(write_checkpoint(tmp_path / "repo", tensors, config))
    load_drafter(REPO, model)
    (entry,) = entries()
    convert_drafter(REPO, tmp_path / "out")
    return hub, contents(entry), contents(tmp_path / "out")


def test_two_processes_convert_at_once(big, children, tmp_path, monkeypatch):
    hub, expected, _ = big
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))  # both download, too
    both = [children(hub.endpoint) for _ in range(2)]
    for child in both:
        child.wait_until_ready()
    for i in range(5):
        monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path / str(i)))
        for child in both:
            child.order(tmp_path / str(i), at=time() + 0.1)
        answers = [child.answer() for child in both]
        assert sorted(answer["converted"] for answer in answers) == [False, True]
        (entry,) = entries()
        assert {answer["folder"] for answer in answers} == {str(entry)}
        assert contents(entry) == expected
        assert not entries(hidden=True)


def test_a_killed_process_leaves_all_or_nothing(big, model, children, tmp_path, monkeypatch):
    """Killed at random moments of two conversions, one into the cache and one by the command."""
    hub, expected_entry, expected_out = big
    rng = random.Random(0)
    waiting = [children(hub.endpoint), children(hub.endpoint)]
    unfinished = {"entry": 0, "out": 0}
    for i in range(KILLS):
        child = waiting.pop(0)
        child.wait_until_ready()
        rehearsal, place = tmp_path / f"rehearsal-{i}", tmp_path / f"place-{i}"
        for run in ("first", "second"):  # the first takes twice the time
            child.order(rehearsal / run, rehearsal / run / "out")
            seconds = child.answer()["seconds"]
        if i < KILLS - 2:
            waiting.append(children(hub.endpoint))  # it starts meanwhile

        begin, moment = time() + 0.05, seconds * (i + rng.random()) / KILLS
        child.order(place, place / "out", at=begin)
        sleep(begin + moment - time())
        child.kill()

        monkeypatch.setenv("MLX_DRIFT_CACHE", str(place))
        for entry in entries():
            assert contents(entry) == expected_entry
        out = place / "out"
        if out.exists():
            assert contents(out) == expected_out
        unfinished["entry"] += len(entries(hidden=True))
        unfinished["out"] += len(list(place.glob(".out.*")))

        load_drafter(REPO, model)
        (entry,) = entries()
        assert contents(entry) == expected_entry
        assert not entries(hidden=True)
        if not out.exists():
            convert_drafter(REPO, out)
            assert contents(out) == expected_out
        shutil.rmtree(rehearsal)
        shutil.rmtree(place)
    assert min(unfinished.values()) > 0  # or the kills came too early or too late
