"""Drafters from the Hub: downloads, revisions, offline use and what cannot be had."""

import json
import os
import subprocess
import sys

import pytest

from checkpoints import specforge_tensors, write_checkpoint
from hub_stub import COMMIT, hub

REPO = "someone/tiny-eagle3"


@pytest.fixture
def run(tmp_path):
    """Runs the command line in a process of its own, whose Hub is the given endpoint."""

    def run(endpoint, *arguments, offline=False):
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", "from mlx_drift.cli import main; main()", *arguments]
        return subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture
def folder(tmp_path):
    folder = write_checkpoint(tmp_path / "repo", specforge_tensors())
    (folder / "modeling.py").write_text("raise SystemExit('code from a checkpoint was run')")
    return folder


def test_downloads_converts_and_works_offline_afterwards(run, folder, tmp_path):
    with hub(folder, REPO, revisions=("main", "v2")) as (endpoint, asked):
        done = run(endpoint, "convert", REPO, "--mlx-path", tmp_path / "a", "--revision", "v2")
        assert done.returncode == 0, done.stderr
        assert f"/api/models/{REPO}/revision/v2" in asked
        assert not any("modeling.py" in path for path in asked)  # code is never fetched
    source = json.loads((tmp_path / "a" / "config.json").read_text())["source"]
    assert source["repo"] == REPO
    assert source["revision"] == COMMIT

    arguments = ("convert", REPO, "--mlx-path", tmp_path / "b", "--revision", "v2")
    offline = run("http://127.0.0.1:9", *arguments, offline=True)
    assert offline.returncode == 0, offline.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_repository_that_is_not_there(run, folder, tmp_path):
    with hub(folder, REPO) as (endpoint, _):
        done = run(endpoint, "convert", "someone/else", "--mlx-path", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: someone/else: no such folder here and no such repository")
    assert len(done.stderr.splitlines()) == 1


def test_offline_and_not_in_the_cache(run, tmp_path):
    arguments = ("convert", REPO, "--mlx-path", tmp_path / "out")
    done = run("http://127.0.0.1:9", *arguments, offline=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {REPO}: ")
    assert len(done.stderr.splitlines()) == 1
