"""Several ranks give the answer of one process, and end together whatever happens."""

import json
import shutil
import signal
import subprocess
import time

import mlx.core as mx
import pytest
from clocks import answers_by_clock
from launch import TESTS, mlx_drift, outcome, run, start
from rank_cases import FAMILIES, PROMPT, answers, taps

import families
from backend import assert_same_tokens
from mlx_drift.demo import TARGET

PROGRAMS = "rank_cases.py", "waiting.py", "clocks.py"
CASES, WAITING, CLOCKS = (str(TESTS / "ranks" / name) for name in PROGRAMS)
ROUNDING = 1e-5
"""What another order of sums changes in a state or logit at most, in parts of the largest."""

SECONDS_TO_END = 10
QUESTIONS = str(TESTS.parent / "examples" / "train_demo_pair" / "heldout.jsonl")
GENERATE = "generate", "--json", "-m", "24", "--temp", "0.7", "--seed", "3"
ENDLESS = "generate", "-m", "-1", "--extra-eos-token", "0", "--temp", "2", "-p", "def"


def test_two_ranks_answer_as_one_process(cli, tmp_path):
    _, alone, _ = cli(*GENERATE)
    first, second = mlx_drift(2, tmp_path, *GENERATE)
    assert (first[0], second) == (0, (0, "", "")), first[2]
    together = json.loads(first[1])
    assert together["text"] == json.loads(alone)["text"]
    assert together["ranks"] == 2
    assert together["statistics"]["acceptance_length"] > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "names"), [("shard", FAMILIES), ("pipeline", ["qwen3_moe"])], ids=["shard", "pipeline"]
)
def test_every_drafter_on_two_ranks(tmp_path, way, names):
    out = tmp_path / "out.json"
    told = run(2, tmp_path, CASES, str(out), way, *names)
    assert [code for code, _, _ in told] == [0, 0], told
    near_ties, captured = 0, mx.load(f"{out}.taps.safetensors")
    for family, together in json.loads(out.read_text()).items():
        model = families.build(family)
        largest = mx.abs(taps(model)).max().item()
        assert mx.abs(captured[family] - taps(model)).max().item() < ROUNDING * largest
        for case, alone in answers(family, model).items():
            if together[case] == alone:
                continue
            near_ties += 1
            assert "temp=0.0" in case, f"{family}, {case}: {together[case]} is not {alone}"
            assert_same_tokens(model, PROMPT, together[case], alone, ROUNDING * largest, False)
    print(f"{way}: {near_ties} answers parted from one process's at a near-tie")


@pytest.mark.long
def test_all_ranks_decide_by_one_clock(tmp_path):
    out = tmp_path / "out.json"
    told = run(2, tmp_path, CLOCKS, str(out))
    assert [code for code, _, _ in told] == [0, 0], told
    model = families.build("llama")
    rounding = ROUNDING * mx.abs(taps(model)).max().item()
    alone, lengths = answers_by_clock(model), set()
    for way, (tokens, tested) in json.loads(out.read_text()).items():
        lengths.update(tested)
        if "temp=0.0" in way:  # what is drawn depends on how many drafts there are
            prompt = [*PROMPT, int(way[-1])]
            assert_same_tokens(model, prompt, tokens, alone[way][0], rounding, False)
    assert {0, 1} <= lengths  # it tries both; which pays is the clock's to say


@pytest.mark.hours
def test_bench_on_two_ranks(tmp_path):
    lengths = [word for k in ("2", "auto") for word in ("--num-draft-tokens", k)]
    arguments = "bench", *lengths, "--repeats", "1", "-m", "12", "-p", "def", "--json"
    first, second = mlx_drift(2, tmp_path, *arguments)
    assert (first[0], second) == (0, (0, "", "")), first[2]
    told = json.loads(first[1])
    assert told["ranks"] == 2
    assert [arm["name"] for arm in told["arms"]] == ["plain", "K=2", "auto"]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_ends_a_collective_that_waits_for_it(tmp_path, killed):
    ranks = start(2, tmp_path, WAITING)
    for one in ranks:
        assert one.stdout.readline() == "joined\n"
    check_that_all_end(ranks, killed)


@pytest.mark.parametrize(
    "attempt",
    [pytest.param(i, marks=pytest.mark.long if i < 4 else pytest.mark.hours) for i in range(20)],
)
def test_a_rank_that_dies_ends_an_answer(tmp_path, attempt):
    ranks = start(2, tmp_path, "-m", "mlx_drift", *ENDLESS)
    assert ranks[0].stdout.read(1 + attempt)
    check_that_all_end(ranks, killed=attempt % 2)


def check_that_all_end(ranks: list[subprocess.Popen[str]], killed: int) -> None:
    """Kills one; the others end by themselves, and rank 0 tells why."""
    start = time.monotonic()
    ranks[killed].send_signal(signal.SIGKILL)
    told = outcome(ranks)
    assert time.monotonic() - start < SECONDS_TO_END
    assert told[killed][0] == -signal.SIGKILL
    assert told[1 - killed][0] == 1
    line = "error: rank 1: ended before the answer was whole\n"  # MLX's ring may write around it
    assert [err.count(line) for _, _, err in told] == [killed, 0], told
    assert not any("Traceback" in err or err.count("error: ") > 1 for _, _, err in told), told
    assert told[1][1] == ""


@pytest.mark.long
def test_what_ranks_differ_in_is_told_once(tmp_path):
    for rank in range(2):
        shutil.copytree(TARGET, tmp_path / str(rank) / "target")
    changed = tmp_path / "1" / "target" / "model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\7")
    folders = [tmp_path / "0", tmp_path / "1"]
    command = "-m", "mlx_drift", "generate", "--model", "target", "--no-draft", "hello"
    first, second = outcome(start(2, tmp_path, *command, folders=folders))
    assert (first[0], second) == (1, (1, "", ""))
    assert first[1] == ""
    assert first[2].startswith("error: the target: model.safetensors is ")
    assert first[2].count("\n") == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "arguments", "line"),
    [
        (2, ["bench", "--shape", "qwen3-4b"], "--shape does not go with several ranks"),
        (2, ["generate", "--pipeline"], "leave --pipeline out"),
        (3, ["generate"], "size 256 across 3 devices"),
        (2, ["convert", "x"], "convert runs on one machine, without mlx.launch"),
        (2, ["generate", "--model", "no/such", "--no-draft", "hello"], "no/such"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tmp_path, count, arguments, line):
    told = mlx_drift(count, tmp_path, *arguments)
    assert [code for code, _, _ in told] == [1] * count, told
    assert line in told[0][2]
    assert told[0][2].count("\n") == 1
    assert [out for _, out, _ in told] == [""] * count
    assert [err for _, _, err in told[1:]] == [""] * (count - 1)


@pytest.mark.long
def test_what_is_accepted_on_two_ranks_is_what_one_accepts(cli, tmp_path):
    arguments = "measure", "--questions", QUESTIONS, "--limit", "1", "-m", "12", "--json"
    code, alone, err = cli(*arguments)
    assert code == 0, err
    first, second = mlx_drift(2, tmp_path, *arguments)
    assert (first[0], second) == (0, (0, "", "")), first[2]
    together = json.loads(first[1])
    assert together["ranks"] == 2
    assert together["conditions"] == json.loads(alone)["conditions"]
