"""`load`: a repository's own code, a tokenizer's or a network's, runs on trust alone."""

import io
import json
import shutil
import sys

import pytest

from mlx_drift import doctor, load
from mlx_drift.demo import DEMO, TARGET
from mlx_drift.errors import DriftError

HEAD = DEMO / "eagle3.1"
NETWORK = "from mlx_lm.models.llama import Model, ModelArgs"
TOKENIZER = "from transformers import PreTrainedTokenizerFast as Own"
UNKNOWN = "xverse"  # mlx-lm runs it as a Llama, transformers knows nothing of it


@pytest.fixture(params=["a tokenizer's", "a tokenizer's, in one string", "a network's"])
def target(request, tmp_path):
    """Makes a target that brings code of its own, which leaves a file `ran` where it lies."""
    return bring_code(tmp_path / "target", request.param)


def bring_code(folder, whose):
    shutil.copytree(TARGET, folder)
    code = NETWORK if whose == "a network's" else TOKENIZER
    mark = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
    (folder / "own.py").write_text(f"{mark}{code}\n")
    if whose == "a network's":
        change(folder / "config.json", model_file="own.py")
    else:
        change(folder / "config.json", model_type=UNKNOWN, auto_map={"AutoConfig": "own.Own"})
        own = "own.Own" if "string" in whose else ["own.Own", "own.Own"]
        auto_map = {"AutoTokenizer": own}
        change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map)
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Yes(io.StringIO):
    """Says yes to whatever is asked, and remembers that something was."""

    asked = False

    def readline(self, *args):
        self.asked = True
        return "y\n"


@pytest.fixture
def stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Yes())
    return sys.stdin


def test_code_is_refused_and_nothing_asked(target, stdin):
    with pytest.raises(DriftError, match=r"needs code of its own.*trust_remote_code=True"):
        load(str(target))
    assert not stdin.asked
    assert not (target / "ran").exists()


COMMANDS = {
    "generate": ("generate", "--model", "TARGET", "--no-draft", "Hello"),
    "a pair": ("generate", "--model", "TARGET", "--drafter", HEAD, "Hello"),
    "a draft model": ("generate", "--model", TARGET, "--draft-model", "TARGET", "Hello"),
    "lookup": ("generate", "--model", "TARGET", "--drafter", "prompt-lookup", "Hello"),
    "cache-prompt": (
        *("cache-prompt", "--model", "TARGET", "--drafter", HEAD),
        *("--prompt-cache-file", "OUT", "Hello"),
    ),
    "bench": ("bench", "--model", "TARGET", "--drafter", HEAD),
    "a baseline": (
        *("bench", "--model", TARGET, "--drafter", HEAD),
        *("--baseline-draft-model", "TARGET"),
    ),
    "tune": ("tune", "--model", "TARGET", "--drafter", HEAD),
    "drift": ("drift", "--model", "TARGET", "--drafter", HEAD),
    "measure": (
        *("measure", "--model", "TARGET", "--drafter", HEAD),
        *("--questions", "QUESTIONS"),
    ),
    "convert": ("convert", HEAD, "--target", "TARGET", "--mlx-path", "OUT", "--probe-conventions"),
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_every_command_that_loads_a_target(arguments, refuses, stdin, tmp_path):
    target = bring_code(tmp_path / "target", "a tokenizer's")
    (tmp_path / "questions.txt").write_text("Why?\n")
    places = {
        "TARGET": target,
        "OUT": tmp_path / "out",
        "QUESTIONS": tmp_path / "questions.txt",
    }
    refuses("add --trust-remote-code", *(places.get(str(a), a) for a in arguments))
    assert not stdin.asked
    assert not (target / "ran").exists()


@pytest.mark.parametrize("whose", ["a tokenizer's", "a network's"])
def test_with_the_flag_it_runs(whose, cli, tmp_path, monkeypatch):
    modules = str(tmp_path / "modules")  # where transformers copies code to, and imports it from
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    target = bring_code(tmp_path / "target", whose)
    change(target / "config.json", auto_map={})
    code, out, _ = cli(
        *("generate", "--model", target, "--no-draft", "-m", 2, "--trust-remote-code", "Hello"),
    )
    assert code == 0
    assert out.strip()
    assert (target / "ran").exists()


def test_code_that_is_not_needed_is_not_run(stdin, tmp_path):
    target = bring_code(tmp_path / "target", "a tokenizer's")
    shutil.copy(TARGET / "tokenizer_config.json", target)  # the config's code alone is left
    _, tokenizer, config = load(str(target), return_config=True)
    assert config["auto_map"]
    assert tokenizer.encode("Hello") == load(str(TARGET))[1].encode("Hello")
    assert not stdin.asked
    assert not (target / "ran").exists()


def test_the_tokenizer_alone_may_be_trusted_as_in_mlx_lm(tmp_path):
    target = bring_code(tmp_path / "target", "a network's")
    with pytest.raises(DriftError, match="needs code of its own"):
        load(str(target), tokenizer_config={"trust_remote_code": True})
    assert not (target / "ran").exists()


def test_doctor_builds_a_network_by_its_own_code_on_trust_alone(cli, refuses, tmp_path):
    target = bring_code(tmp_path / "target", "a network's")
    refuses("add --trust-remote-code", "doctor", target)
    assert not (target / "ran").exists()
    assert cli("doctor", target, "--trust-remote-code")[0] == 0
    assert (target / "ran").exists()
    assert doctor(str(target), trust_remote_code=True).family.num_layers == 8


def test_what_else_mlx_lm_refuses_is_raised_as_it_is(tmp_path):
    shutil.copytree(TARGET, tmp_path / "target")
    change(tmp_path / "target" / "config.json", model_type="none-such")
    with pytest.raises(ValueError, match="none-such"):
        load(str(tmp_path / "target"))
