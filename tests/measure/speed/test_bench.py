"""`bench`: its arithmetic, and small runs of it."""

import json
from itertools import pairwise

import mlx.core as mx
import pytest

from mlx_drift.decode.trees import prepare_trees
from mlx_drift.demo import TARGET, load_demo
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.errors import DriftError
from mlx_drift.measure.speed.arithmetic import break_even, quartiles, tokens_per_round
from mlx_drift.measure.speed.arms import Way, answer
from mlx_drift.measure.speed.bench import bench
from mlx_drift.measure.speed.rounds import ROUNDS, Plan, Swayed, round_costs
from mlx_drift.target.model import Target
from tiny import VOCAB, NoText, plain_greedy, tiny_drafter, tiny_llama


@pytest.mark.parametrize(
    ("k", "cost", "acceptance"),
    [(1, 1.0, 0.0), (1, 1.6, 0.6), (1, 2.0, 1.0), (2, 1.75, 0.5), (3, 4.0, 1.0), (2, 3.1, None)],
)
def test_break_even(k, cost, acceptance):
    found = break_even(k, cost)
    assert found is acceptance if acceptance is None else found == pytest.approx(acceptance)
    if acceptance is not None:
        assert tokens_per_round(k, acceptance) == pytest.approx(cost)


def test_quartiles():
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_every_arm_answers_every_prompt(temp):
    model = tiny_llama()
    drafter = tiny_drafter(model)
    told = []
    found = bench(
        model,
        NoText(),
        drafter,
        [[1, 2, 3], [4, 5]],
        lengths=(1, 3, "auto"),
        quantized=(4, tiny_drafter(model)),
        draft_model=tiny_llama(num_hidden_layers=2),
        max_tokens=6,
        repeats=1,
        temp=temp,
        turns=1,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (40, 40)  # nine arms, two prompts, twice; two turns for each drafter
    assert [arm.name for arm in found.arms] == [
        "plain",
        *("K=1", "K=1, 4 bits", "K=3", "K=3, 4 bits", "auto", "auto, 4 bits"),
        *("mlx-lm K=1", "mlx-lm K=3"),
    ]
    plain, *drafting = found.arms
    assert plain.speedup == (1.0, 1.0, 1.0)
    for arm in found.arms:
        low, middle, high = arm.speedup
        assert 0 < low <= middle <= high
        assert [len(speeds) for speeds in arm.speeds] == [2]
    for arm in drafting:
        k = 64 if arm.num_draft_tokens == "auto" else arm.num_draft_tokens
        assert len(arm.conditional_acceptance) <= k
        assert (arm.draft_length is not None) == (arm.num_draft_tokens == "auto")
        is_timed = not arm.name.startswith(("auto", "mlx-lm"))
        assert (arm.efficiency is not None) == is_timed
        if is_timed:
            assert arm.host_seconds > 0
            assert min(arm.efficiency) > 0
            assert min(arm.choosing) > 0
            assert (arm.greedy.plan.temp, arm.sampled.plan.temp) == (0.0, temp or 0.7)
    assert json.loads(json.dumps(found.to_dict()))["prompts"] == 2


@pytest.mark.parametrize("max_tokens", [1, 7, 8, 9])
@pytest.mark.parametrize("prompt", [[1, 2, 3], [4]])
def test_the_loop_of_mlx_lm_is_counted_right(prompt, max_tokens):
    model = tiny_llama()
    way = Way(3, draft_model=tiny_llama())  # which is always right
    found = answer(way, model, NoText(), prompt, max_tokens=max_tokens, temp=0.0, seed=0)
    rounds, rest = divmod(max_tokens, 4)  # of a cut round mlx-lm yields drafts alone
    assert found.statistics.rounds == rounds + (rest > 0)
    assert sum(found.statistics.accepted) == max_tokens - rounds
    assert set(found.statistics.conditional_acceptance) <= {1.0}


@pytest.mark.parametrize("accepted", [0, 2, 3])
@pytest.mark.parametrize(("temp", "tree"), [(0.0, False), (0.7, False), (0.0, True)])
def test_a_swayed_target_accepts_as_told(accepted, temp, tree, monkeypatch):
    model = tiny_llama()
    committed = []
    sound = Swayed.verify

    def verify(self, tokens, cache, tree):
        committed.append(cache[0].offset)
        return sound(self, tokens, cache, tree)

    monkeypatch.setattr(Swayed, "verify", verify)
    plan, drafter = Plan(16 if tree else 3, accepted, temp, tree=tree), tiny_drafter(model)
    if tree:
        prepare_trees(drafter, Target(model, drafter.taps))
    (cost,), plain = round_costs(model, drafter, [1, 2, 3], [plan], turns=1)
    steps = [b - a for a, b in pairwise(committed)]
    assert len(committed) == 2 * (ROUNDS + 1)
    assert max(steps) == accepted + 1
    assert tree or set(steps) == {accepted + 1}  # but for a tree that is less deep
    assert plain > 0
    parts = cost.draft_seconds, cost.verify_seconds, cost.ingest_seconds
    assert min(parts) > 0
    assert cost.efficiency == pytest.approx(sum(parts) / cost.seconds)


def test_timing_passes_alone_leaves_the_conversation_as_it_is():
    model = tiny_llama()
    drafter = tiny_drafter(model)
    seen = []
    sound = drafter.ingest
    drafter.ingest = lambda tokens, taps, cache: (
        seen.append((cache.layers[0].offset, tokens.tolist())),
        sound(tokens, taps, cache),
    )
    round_costs(model, drafter, [1, 2, 3], [Plan(2, 1)], turns=1)
    rows = {}
    for offset, tokens in seen:
        for row, token in enumerate(tokens, offset):
            assert rows.setdefault(row, token) == token
    assert sorted(rows) == list(range(len(rows)))


def test_a_drafter_that_finds_nothing_is_timed_too():
    model = tiny_llama()
    (cost,), _ = round_costs(model, PromptLookupDrafter(model), [1, 2, 3], [Plan(2, 1)], turns=1)
    assert cost.seconds > 0


def test_swaying_keeps_what_is_said_in_other_rows():
    model = tiny_llama()
    target = Swayed(Target(model), 0)
    tokens = mx.array([1, 2, 3])
    swayed, _ = target.verify(tokens, target.make_cache())
    plain = model(tokens[None])[0]
    assert mx.argmin(swayed[0]).item() == 2  # the first draft is refused
    swayed[0, 2] = plain[0, 2]
    assert mx.allclose(swayed, plain, atol=1e-5)
    assert plain_greedy(model, [1], 1)[0] < VOCAB


def test_a_baseline_needs_caches_that_go_back():
    model = tiny_llama()
    model.make_cache = lambda: [object.__new__(type("Odd", (), {"is_trimmable": lambda s: False}))]
    with pytest.raises(DriftError, match="from the target's caches"):
        bench(model, NoText(), tiny_drafter(tiny_llama()), [[1, 2]], draft_model=tiny_llama())


def test_trees_are_arms_too():
    model = tiny_llama()
    found = bench(
        *(model, NoText(), tiny_drafter(model), [[1, 2, 3]]),
        lengths=(2,),
        trees=(3, "auto"),
        max_tokens=6,
        repeats=1,
        turns=1,
    )
    assert [arm.name for arm in found.arms] == ["plain", "K=2", "tree of 3", "auto, trees"]
    assert all(arm.speedup[0] > 0 for arm in found.arms)


def test_the_command(cli, monkeypatch):
    monkeypatch.setattr("mlx_drift.cli.bench.TURNS", 1)
    arguments = ("bench", "-m", 6, "--repeats", 1, "-p", "def quote", "--num-draft-tokens", 2)
    code, out, err = cli(*arguments, "--drafter-bits", 8, "--baseline-draft-model", TARGET)
    assert (code, err) == (0, "")
    assert "pays at" in out
    assert "K=2, 8 bits" in out
    assert " → " in out
    assert max(map(len, out.splitlines())) <= 100
    told = json.loads(cli(*arguments, "--dequantize", "--json")[1])
    assert [arm["num_draft_tokens"] for arm in told["arms"]] == [None, 2]
    assert told["dtype"] == "float32"


def test_bad_input(refuses, tmp_path):
    refuses("--num-draft-tokens is 0", "bench", "--num-draft-tokens", 0)
    refuses("--num-draft-tokens is all", "bench", "--num-draft-tokens", "all")
    refuses("repeats is 0", "bench", "--repeats", 0)
    refuses("--layers goes with --shape", "bench", "--layers", 2)
    refuses("--prompt does not go with --shape", "bench", "--shape", "Qwen3-8B", "-p", "hello")
    refuses("is for trained heads", "bench", "--drafter-bits", 4, "--draft-model", TARGET)
    refuses("no such", "bench", "--baseline-draft-model", tmp_path / "none")


def test_a_baseline_of_another_tokenizer(refuses, monkeypatch):
    model, _, _ = load_demo()
    other = type("Other", (), {"get_vocab": lambda self: {"a": 0}})()
    monkeypatch.setattr("mlx_drift.cli.bench.load_model", lambda *args: (model, other))
    refuses("has another tokenizer than the target", "bench", "--baseline-draft-model", "x")
