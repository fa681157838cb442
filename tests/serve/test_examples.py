"""The clients of examples/clients run, and the settings on their page can be read."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mlx_drift.serve.api.tables import CHAT
from serving import PATIENCE

CLIENTS = Path(__file__).parents[2] / "examples" / "clients"


@pytest.mark.parametrize("name", ["curl.sh", "with_openai.py", "with_anthropic.py"])
def test_it_runs(scripted, name):
    program = ["sh"] if name.endswith(".sh") else [sys.executable]
    ran = subprocess.run(
        [*program, CLIENTS / name],
        env=os.environ | {"BASE": scripted.root, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if name == "curl.sh":
        assert ran.stdout.count("--- /") == 8
        assert "data: [DONE]" in ran.stdout
    else:
        assert "tools:" in ran.stdout


def test_its_settings_can_be_read():
    page = (CLIENTS / "README.md").read_text()
    blocks = re.findall(r"```(json|toml)\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["toml", "json", "json"]
    for kind, text in blocks:
        assert (json.loads if kind == "json" else tomllib.loads)(text)
    for file in re.findall(r"\]\((\w+\.\w+)\)", page):
        assert (CLIENTS / file).exists()


def test_what_they_send_is_known():
    """The AI SDK's client of OpenAI-compatible servers, which OpenCode uses, and Zed's."""
    sent = """model messages tools tool_choice stream stream_options max_tokens temperature top_p
    frequency_penalty presence_penalty response_format stop seed reasoning_effort user
    max_completion_tokens parallel_tool_calls prompt_cache_key"""
    assert {*sent.split()} <= CHAT.honoured.keys() | CHAT.accepted.keys()
