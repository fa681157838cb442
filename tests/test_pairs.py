"""Which head is picked for which target, and what is said where none can be."""

import json
import re
from pathlib import Path

import pytest

from hub_stub import settle
from mlx_drift import DriftError
from mlx_drift.cli import _imported
from mlx_drift.demo import QUESTION
from mlx_drift.files.hub import split_repository
from mlx_drift.pairs import PAIRS, find_pair

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.target)
def test_every_entry_is_well_formed(pair):
    for name in (pair.target, pair.drafter, *(other for _, other in pair.others)):
        assert split_repository(name) == (name, "")
    assert {kind for kind, _ in pair.others} <= {"DFlash", "DSpark", "P-EAGLE", "Medusa", "EAGLE-4"}
    if pair.sizes is not None:
        model_type, *sizes = pair.sizes
        assert re.fullmatch(r"[a-z0-9_]+", model_type)
        assert all(size > 0 for size in sizes)
    assert "\n" not in pair.needs


def test_targets_and_drafters_are_named_once():
    assert len({pair.target for pair in PAIRS}) == len(PAIRS)
    heads = [
        head for pair in PAIRS for head in (pair.drafter, *(other for _, other in pair.others))
    ]
    assert len(set(heads)) == len(heads)


NAMES = {
    "Qwen/Qwen3-8B": """
        Qwen/Qwen3-8B mlx-community/Qwen3-8B-4bit mlx-community/Qwen3-8B-bf16 Qwen3-8B
        mlx-community/Qwen3-8B-4bit-DWQ mlx-community/Qwen3-8B-4bit-DWQ-053125 ./Qwen3-8B-MLX-8bit/
        lmstudio-community/Qwen3-8B-MLX-4bit Qwen/Qwen3-8B-MLX-bf16 /models/qwen3-8b-mxfp4
        someone/Qwen3-8B-4bit-gs32 someone/Qwen3-8B-6-bit someone/Qwen3-8B_q5 Qwen3-8B-4bit-AWQ
    """,
    "Qwen/Qwen3-4B": "mlx-community/Qwen3-4B-4bit Qwen/Qwen3-4B qwen3-4b-fp16",
    "openai/gpt-oss-20b": "openai/gpt-oss-20b mlx-community/gpt-oss-20b-MXFP4-Q8",
    "Qwen/Qwen3-30B-A3B": "mlx-community/Qwen3-30B-A3B-8bit",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "mlx-community/Qwen3-30B-A3B-Instruct-2507-4bit-DWQ",
    "meta-llama/Llama-3.1-8B-Instruct": """
        mlx-community/Meta-Llama-3.1-8B-Instruct-4bit mlx-community/Llama-3.1-8B-Instruct-bf16
    """,
}


@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for target in NAMES for name in NAMES[target].split()]
)
def test_known_by_name(name, target):
    pair, why = find_pair(name, {})
    assert pair.target == target
    assert why == f"the name {name}"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.target)
def test_each_is_known_by_its_own_name_in_any_quantization(pair):
    base = pair.target.rpartition("/")[2]
    for name in (pair.target, f"mlx-community/{base}-4bit", f"mlx-community/{base}-MLX-bf16"):
        assert find_pair(name, {})[0] is pair


OTHERS = """
    Qwen/Qwen3-8 Qwen3-8B-Base Qwen3-8B-hi Qwen3-8B-g2 Qwen3-8B-v4 Qwen3-8B-q99 Qwen3-8B-32bit
    Qwen3-8B-abliterated-4bit Qwen3 4bit mlx-community/4bit -4bit / . Llama-3.1-8B-4bit
    Qwen3-8B-4bit-finetune Qwen3-4B-Instruct-2507-4bit
"""


@pytest.mark.parametrize("name", [*OTHERS.split(), ""])
def test_other_names_are_not_taken_for_a_known_one(name):
    with pytest.raises(DriftError, match="no drafter is known for it"):
        find_pair(name, {"model_type": "qwen3", "hidden_size": 1, "num_hidden_layers": 1})


@pytest.mark.parametrize(
    "config",
    [
        QWEN3_8B,
        {"model_type": "outer", "text_config": QWEN3_8B},
        {"model_type": "qwen3", "text_config": QWEN3_8B | {"model_type": "inner"}},
    ],
)
def test_known_by_its_sizes(config):
    pair, why = find_pair("my/fine-tune", config)
    assert pair.drafter == "RedHatAI/Qwen3-8B-speculator.eagle3"
    assert why == "its sizes, those of Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    "config",
    [
        {},
        QWEN3_8B | {"model_type": "qwen2"},
        QWEN3_8B | {"num_hidden_layers": 35},
        QWEN3_8B | {"hidden_size": None},
        QWEN3_8B | {"vocab_size": 32000},
        {"model_type": [], "hidden_size": {}, "num_hidden_layers": [], "text_config": 1},
    ],
)
def test_sizes_nobody_knows(config):
    with pytest.raises(DriftError, match=r"^my/own: no drafter is known for it"):
        find_pair("my/own", config)


def test_sizes_of_several():
    with pytest.raises(DriftError) as caught:
        find_pair("my/own", LLAMA_8B)
    (line,) = str(caught.value).splitlines()
    alike = "meta-llama/Llama-3.1-8B-Instruct or deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert line.startswith(f"my/own: by its sizes this could be {alike}. `mlx-drift pairs` lists")
    assert "--drafter owner/name" in line
    assert "--no-draft" in line


# --- the command line -------------------------------------------------------------------------


def test_pairs_lists_them_with_whole_names(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, err = cli("pairs")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    expected = []
    for pair in PAIRS:
        expected.append([pair.target, pair.drafter])
        expected += [[other, f"({kind})"] for kind, other in pair.others]
    assert [line.split() for line in lines[: len(expected)]] == expected
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in out
    assert any("Qwen/Qwen3-32B" in x and "need enable_thinking=false" in x for x in lines)


def test_pairs_json(cli):
    code, out, err = cli("pairs", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["pairs"] == json.loads(json.dumps([vars(p) for p in PAIRS]))
    assert (Path(found["in_this_package"]["drafter"]) / "config.json").is_file()


@pytest.fixture
def loads_nothing(monkeypatch, tmp_path):
    """No Hub, and an error if a target is loaded."""
    settle(monkeypatch, tmp_path)

    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("mlx_lm.load", load)


def target_folder(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "own"}, "no drafter is known for it"),
        ({"model_type": "glm4_moe"}, "have an MTP head of their own, which `mlx-drift convert"),
        (LLAMA_8B, "by its sizes this could be meta-llama/Llama-3.1-8B-Instruct or deepseek-ai/"),
    ],
)
def test_auto_says_what_it_does_not_know_before_anything_is_loaded(
    refuses, tmp_path, config, message
):
    folder = target_folder(tmp_path / "target", config)
    refuses(message, "generate", "--model", folder, "--drafter", "auto", "-p", "x")
    refuses(message, "generate", "--model", f"{folder}/", "--drafter", "auto", "-p", "x")


WITH_A_HEAD = {
    "generate": ("-p", "x"),
    "serve": (),
    "cache-prompt": ("x", "--prompt-cache-file", "x.safetensors"),
    "bench": (),
    "tune": (),
    "drift": (),
    "measure": ("--questions", "q.jsonl"),
    "adapt": ("--questions", "self", "--mlx-path", "x"),
}
"""Commands that must be told a head, and what else they must be told."""


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize("drafter", [(), ("--drafter", "auto")])
@pytest.mark.parametrize("command", WITH_A_HEAD)
def test_a_command_advises_options_that_it_has(command, drafter, refuses, tmp_path, monkeypatch):
    folder = target_folder(tmp_path / "target", {"model_type": "own"})
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.chdir(tmp_path)
    line = refuses("no drafter", command, *WITH_A_HEAD[command], "--model", folder, *drafter)
    here, _, there = line.partition("mlx-drift generate")
    for name, advice in (command, here), ("generate", there):
        taken = {flag for option in _imported(name).params for flag in option.opts}
        assert set(re.findall(r"--[a-z-]+", advice)) <= taken


@pytest.mark.usefixtures("loads_nothing")
def test_auto_for_a_target_that_is_not_there(refuses, tmp_path):
    for model in (tmp_path / "nowhere", "someone/nothing"):
        refuses(f"{model}: ", "generate", "--model", model, "--drafter", "auto", "-p", "x")


@pytest.mark.usefixtures("loads_nothing")
def test_auto_says_what_it_picked_and_what_that_needs(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    folder = target_folder(tmp_path / "Qwen3-8B-4bit", {})
    code, out, err = cli("generate", "--model", folder, "--drafter", "auto", "-p", "x")
    picked, refused = err.splitlines()  # there is no Hub in this test
    assert picked.startswith(f"drafter: RedHatAI/Qwen3-8B-speculator.eagle3, by the name {folder}.")
    assert "needs enable_thinking=false" in picked
    assert refused.startswith("error: RedHatAI/Qwen3-8B-speculator.eagle3: it is neither here nor")
    assert (code, out) == (1, "")


def test_auto_of_the_embedded_pair_is_its_default_drafter(cli):
    said = []
    for drafter in ((), ("--drafter", "auto"), ("--drafter", "eagle3.1")):
        code, out, err = cli("generate", QUESTION, *drafter, "-m", 8, "--json")
        assert code == 0, err
        report = json.loads(out)
        said.append((report["text"], report["statistics"]["conditional_acceptance"]))
    assert said[0] == said[1] == said[2]
