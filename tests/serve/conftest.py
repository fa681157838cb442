"""One server of the scripted checkpoint for the tests of every dialect."""

import pytest
from scripts import SCRIPTS

from scripted import scripted_checkpoint
from serving import server


@pytest.fixture(scope="session")
def scripted(tmp_path_factory):
    folder = scripted_checkpoint(tmp_path_factory.mktemp("model") / "scripted", SCRIPTS)
    flags = ["--any-model-name", "claude-*", "--keepalive", "0.05"]
    with server("--model", folder, "--drafter", "prompt-lookup", *flags) as process:
        yield process
    assert process.returncode == 0, process.err
    assert "Traceback" not in process.err
