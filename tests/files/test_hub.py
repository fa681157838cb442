"""Drafters from the Hub, end to end by the command line."""

import json
import math
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants, utils
from rich.console import Console

from checkpoints import (
    EMBEDDED,
    embedded_checkpoint,
    specforge_config,
    specforge_tensors,
    write_checkpoint,
)
from hub_stub import COMMIT, WRITER, StubHub, set_endpoint, settle
from mlx_drift import convert_drafter
from mlx_drift.cli.convert import conversion_bar
from mlx_drift.demo import TARGET

REPO = "someone/tiny-eagle3"
FILES = {
    "": ["config.json", "model.safetensors"],
    "/heads/bin": ["config.json", "pytorch_model.bin"],
    "/heads/shards": [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ],
}
"""The places of the repository, all of which hold the embedded drafter, and what to fetch there."""


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    settle(monkeypatch, tmp_path)
    monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path / "converted"))
    yield
    utils.close_session()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = embedded_checkpoint(tmp_path_factory.mktemp("hub") / "repo")
    (folder / "pytorch_model.bin").write_bytes(b"not to be fetched: there is a safetensors file")
    embedded_checkpoint(folder / "heads" / "shards", shards=2)
    shutil.copytree(EMBEDDED, folder / "heads" / "bin")
    for place in FILES:
        code = Path(f"{folder}{place}") / "modeling.py"
        code.write_text("raise SystemExit('code from a checkpoint was run')")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The bytes of what the embedded checkpoint is converted to."""
    out = tmp_path_factory.mktemp("local") / "out"
    convert_drafter(str(EMBEDDED), out)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture
def hub(folder, monkeypatch):
    with StubHub(folder, REPO, ("main", "v2")).serve() as hub:
        set_endpoint(monkeypatch, hub.endpoint)
        yield hub


def run_process(endpoint, home, *arguments):
    """Runs the command line in a process of its own, set up by the environment alone."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    quick = "import sys, time; sys.modules['torch'] = None; time.sleep = lambda _: None"
    main = "from mlx_drift.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", f"{quick}; {main}", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("place", FILES)
def test_converts_online_and_then_offline(cli, hub, weights, tmp_path, monkeypatch, place):
    def convert(out):
        arguments = ("convert", REPO + place, "--revision", "v2", "--mlx-path", tmp_path / out)
        code, _, err = cli(*arguments)
        assert code == 0, err
        return (tmp_path / out / "model.safetensors").read_bytes()

    assert convert("online") == weights
    source = json.loads((tmp_path / "online" / "config.json").read_text())["source"]
    assert (source["repo"], source["revision"]) == (REPO, COMMIT)
    assert source.get("subfolder", "") == place.removeprefix("/")

    assert f"/api/models/{REPO}/revision/v2" in hub.asked
    fetched = {path for path in hub.asked if not path.startswith("/api/")}
    assert fetched == {f"/{REPO}/resolve/{COMMIT}{place}/{name}" for name in FILES[place]}

    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert convert("offline") == weights
    assert not hub.asked


@pytest.mark.parametrize("place", ["", "/heads/shards"])
def test_inspect_fetches_no_weights(cli, hub, tmp_path, place):
    code, out, err = cli("inspect", REPO + place, "--target", TARGET, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["passed"]
    assert found["size"] > 3_000_000
    assert "agrees with t2d" in next(c["detail"] for c in found["checks"] if c["name"] == "d2t")
    assert hub.sent < 40_000  # of which d2t and t2d are 20 480
    asked = [r for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert asked
    assert all(request.range for request in asked)
    stored = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in stored if "snapshots" in path.parts} == {".json"}
    assert sum(path.stat().st_size for path in stored) < 20_000


def test_names_in_a_checkpoint_are_no_markup_and_steer_no_terminal(cli, tmp_path):
    tensors = specforge_tensors()
    tensors["[/b]x.weight"] = tensors["norm.weight"]
    config = specforge_config(**{"[/red]\x1b[2Jk": 1})
    code, out, err = cli("inspect", write_checkpoint(tmp_path / "hostile", tensors, config))
    assert code == 1
    assert "[/b]x.weight" in out
    assert "warning: config keys that nothing reads: [/red]\\x1b[2Jk" in err
    assert "\x1b" not in out + err


def test_the_bar_of_a_conversion_leaves_the_terminal_to_that_of_the_download():
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with conversion_bar(console, "converting it") as progress:
        assert screen.getvalue() == ""
        progress(1, 4)
        assert "converting it" in screen.getvalue()
        progress(4, 4)
        shown = screen.getvalue()
    assert screen.getvalue() == shown  # it went before what comes next: an upload, the result


def gate(hub, monkeypatch):
    hub.gated = True


def go_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def break_off(hub, monkeypatch):
    hub.breaks = math.inf


def unplug(hub, monkeypatch):
    set_endpoint(monkeypatch, "http://127.0.0.1:9")


@pytest.mark.parametrize("command", ["convert", "generate"])
@pytest.mark.parametrize(
    ("spoil", "repo", "message"),
    [
        (gate, REPO, f"{REPO}/config.json: it is gated: accept the terms at http://127.0.0.1:"),
        (None, "someone/else", "no such folder here and no such repository on the Hub"),
        (None, f"{REPO}/no/such", f"{REPO} has no files in a folder no/such at commit {COMMIT}"),
        (go_offline, REPO, "neither here nor in the local cache, and HF_HUB_OFFLINE is set"),
        (break_off, REPO, f"{REPO}/config.json: the connection to the Hub at http://127.0.0.1:"),
        (unplug, REPO, "neither here nor in the local cache, and the Hub at http://127.0.0.1:9 c"),
    ],
    ids=["gated", "no repository", "no folder", "offline", "interrupted", "unreachable"],
)
def test_what_cannot_be_had(refuses, hub, monkeypatch, tmp_path, command, spoil, repo, message):
    if spoil is not None:
        spoil(hub, monkeypatch)
    arguments = {
        "convert": (repo, "--mlx-path", tmp_path / "out"),
        "generate": ("--model", TARGET, "--drafter", repo, "-p", "x"),
    }
    line = refuses(message, command, *arguments[command])
    assert line.startswith(f"error: {repo}")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "converted").exists()


def test_a_revision_that_is_not_there(refuses, hub, tmp_path):
    arguments = ("convert", REPO, "--mlx-path", tmp_path / "out", "--revision", "v3")
    refuses(f"{REPO}: the Hub has no revision 'v3' of it", *arguments)


def test_an_interrupted_download_says_one_line(hub, tmp_path):
    """Without huggingface_hub's log of its retries, which a process of its own would show."""
    hub.breaks = math.inf
    arguments = ("convert", REPO, "--mlx-path", tmp_path / "out")
    done = run_process(hub.endpoint, tmp_path / "home", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "broke off" in line
    assert "run it again" in line
    assert not (tmp_path / "out").exists()


def test_uploads_what_it_converted(cli, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER.removeprefix("Bearer "))
    out = tmp_path / "out"
    upload = ("--upload-repo", "someone/new", "--quantize")
    code, _, err = cli("convert", REPO, "--mlx-path", out, *upload)
    assert code == 0, err
    assert f"uploaded to {hub.endpoint}/someone/new" in err
    assert hub.committed.keys() == {"README.md", "config.json", "model.safetensors"}
    assert hub.committed == {path.name: path.read_bytes() for path in out.iterdir()}

    card = ModelCard(hub.committed["README.md"].decode())
    assert card.data.library_name == "mlx"
    assert card.data.base_model == REPO
    assert card.data.base_model_relation == "quantized"
    assert {"mlx", "mlx-drift", "eagle3", "speculative-decoding"} <= set(card.data.tags)
    assert "--drafter someone/new" in card.text

    with StubHub(out, "someone/new").serve() as other:  # and what was uploaded is a drafter
        set_endpoint(monkeypatch, other.endpoint)
        arguments = ("--model", TARGET, "--drafter", "someone/new", "-p", "x", "-m", 8)
        code, out, err = cli("generate", *arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["statistics"]["rounds"] > 0


def test_an_upload_that_is_refused(refuses, hub, tmp_path):
    arguments = ("convert", REPO, "--mlx-path", tmp_path / "out", "--upload-repo", "someone/new")
    refuses("does not let you write it (HTTP 401: Invalid username or password.)", *arguments)
    assert not hub.committed
