"""The study of `examples/attention_drift`: what is trained there is what the package runs, what is
measured is what the package measures, and what the report says follows from the figures.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_drift import convert_drafter, load_demo, load_drafter
from mlx_drift.measure.acceptance.asking import Settings, answer
from mlx_drift.measure.inside.drift import Settings as DriftSettings
from mlx_drift.measure.inside.drift import drift
from mlx_drift.target.model import Target, TargetShape
from tiny import HIDDEN, VOCAB, tiny_llama

STUDY = Path(__file__).parents[2] / "examples" / "attention_drift"
LAYERS, LENGTH, STEPS = 8, 24, 3
ARMS = "neither norm_output fc_norm both norm_before_residual gated_attention".split()


@pytest.fixture(autouse=True)
def _study_on_path(monkeypatch):
    """Makes the examples importable."""
    monkeypatch.setattr(sys, "path", [str(STUDY.parent), *sys.path])


@pytest.fixture
def target():
    """A random target in PyTorch."""
    import torch

    from recipe.target import Llama, LlamaConfig

    torch.manual_seed(0)
    return Llama(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            head_dim=8,
        )
    )


def drafter_of(target, arm):
    """A random drafter of one arm, gains and all."""
    import torch

    from attention_drift.arms import ARMS as SWITCHES
    from recipe.drafter import Eagle3, Switches

    drafter = Eagle3(target.config, torch.arange(1, VOCAB, 2), Switches(**SWITCHES[arm]))
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return drafter


def test_cut_short_it_is_balanced():
    from attention_drift.arms import ARMS as SWITCHES
    from attention_drift.arms import runs

    order = list(runs())
    assert list(SWITCHES) == ARMS
    assert len({run.name for run in order}) == len(order)
    eagle, mtp = order[:30], order[30:]  # MTP heads came later
    assert [run.seed for run in eagle] == [0] * 12 + [1] * 12 + [2] * 6
    assert [run.seed for run in mtp] == [0, 0, 1, 1, 2, 2]


@pytest.mark.torch
@pytest.mark.parametrize("arm", ARMS)
def test_a_trained_drafter_is_the_same_in_the_package(target, arm, tmp_path):
    import torch

    drafter = drafter_of(target, arm)
    drafter.save(tmp_path / "torch", torch.float32, also_bin=False)
    shape = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
    convert_drafter(str(tmp_path / "torch"), tmp_path / "mlx", target=shape, strict=True)
    model = tiny_llama(num_hidden_layers=LAYERS)
    model.model.embed_tokens.weight = mx.array(target.model.embed_tokens.weight.detach().numpy())
    ours = load_drafter(str(tmp_path / "mlx"), model)

    tokens = torch.randint(0, VOCAB, (LENGTH + 1,))
    taps = torch.randn(LENGTH, 3, HIDDEN)
    reads = torch.cat([tokens, torch.zeros(STEPS, dtype=torch.long)])
    with torch.no_grad():
        chain = drafter.unroll(
            [tap[None] for tap in taps.unbind(1)],
            lambda step, _: target.model.embed_tokens(reads[1 + step :][:LENGTH])[None],
            STEPS,
        )
        theirs = [(drafter.lm_head(normed)[0], state[0]) for normed, state in chain]
    logits, states = ours.train_time_test(mx.array(tokens.numpy()), mx.array(taps.numpy()), STEPS)
    for step, expected in enumerate(theirs):
        valid = slice(LENGTH - step)
        for got, wanted in zip((logits[step], states[step]), expected, strict=True):
            np.testing.assert_allclose(np.array(got)[valid], wanted[valid], rtol=0, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("arm", ARMS)
def test_saved_and_loaded_it_is_the_same(target, arm, tmp_path):
    import torch

    from recipe.drafter import Eagle3

    drafter = drafter_of(target, arm)
    drafter.save(tmp_path, torch.float32, also_bin=False)
    loaded = Eagle3.load(tmp_path, target.config)
    assert loaded.switches == drafter.switches
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.torch
@pytest.mark.parametrize("arm", ["both", "gated_attention"])
def test_following_only_the_chains_that_count_changes_no_loss(target, arm):
    import torch

    from recipe.features import read
    from recipe.loss import chain_losses

    drafter = drafter_of(target, arm)
    ids = torch.randint(0, VOCAB, (1, LENGTH))
    said = torch.arange(LENGTH)[None] % 12 > 6
    row = read(target, ids, said)[0]
    found = chain_losses(drafter, target, row, STEPS)
    logits = target(ids)[0].detach()
    wanted = logits[:, drafter.draft_ids].softmax(-1)
    counted = said[0, 1:] & drafter.t2d[logits[:-1].argmax(-1)]
    every = drafter.unroll(
        row.taps,
        lambda step, _: target.model.embed_tokens(ids.roll(-1 - step, dims=1)),
        STEPS,
    )
    for step, (normed, _) in enumerate(every):
        rows = counted[1 + step :]
        told = drafter.lm_head(normed[0, : len(rows)][rows])
        loss = torch.nn.functional.cross_entropy(told, wanted[1 + step : -1][rows], reduction="sum")
        assert found.rows[step] == rows.sum()
        assert torch.allclose(found.losses[step], loss, atol=1e-5)


QUESTIONS = [
    "Show me the source of `calendar.monthrange`.",
    "What does `shlex.quote` return?",
]
ROOM, DRAFTS = 20, 5


@pytest.fixture(scope="module")
def demo():
    return load_demo("eagle3")


@pytest.fixture(scope="module")
def said(demo):
    """What the embedded target says, with its states."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(STUDY.parent), *sys.path])
        from attention_drift import texts
        from attention_drift.settings import EMBEDDED

        model, tokenizer, _ = demo
        target = Target(model, EMBEDDED.taps)
        regular = EMBEDDED.wordings[0]
        prompts = [regular.encode(tokenizer, [question]) for question in QUESTIONS]
        stop = tokenizer.eos_token_ids
        return [texts.answer(target, prompt, 2, ROOM, stop) for prompt in prompts]


@pytest.mark.parametrize("k", [1, DRAFTS])
def test_rounds_are_those_of_generating(demo, said, k):
    from attention_drift.replay import replay, rounds, unroll

    model, tokenizer, drafter = demo
    for text in said:
        prompt = text.tokens[: text.prompt]
        _, found = answer(model, tokenizer, {"": drafter}, prompt, Settings(k, ROOM))
        wanted = list(found[""].rounds)
        assert rounds(unroll(drafter, text, k)[0], text, k)[0] == wanted
        assert list(replay(drafter, text, k)) == wanted


def test_windows_are_those_of_generating(demo, said):
    from attention_drift.replay import replay

    model, tokenizer, drafter = demo
    view = drafter.windowed(6, 1)
    for text in said:
        prompt = text.tokens[: text.prompt]
        _, found = answer(model, tokenizer, {"": view}, prompt, Settings(DRAFTS, ROOM))
        assert list(replay(view, text, DRAFTS)) == list(found[""].rounds)


def test_an_answer_that_ends_early_is_cut_where_generating_cuts_it(demo, said):
    """As if the end-of-text token had come after so many tokens: nothing after it is wanted."""
    from dataclasses import replace

    from attention_drift.replay import replay, rounds, unroll

    _, _, drafter = demo
    for length in range(1, 6):
        end = said[0].prompt + length
        text = replace(said[0], tokens=said[0].tokens[:end], states=said[0].states[: end - 1])
        found = rounds(unroll(drafter, text, DRAFTS)[0], text, DRAFTS)[0]
        assert found == list(replay(drafter, text, DRAFTS))
        assert sum(accepted for _, accepted in found) + len(found) in (length, length + 1)
        assert all(tested <= length for tested, _ in found)


def test_drift_is_that_of_the_command(demo, said, monkeypatch):
    from attention_drift import measure_all
    from attention_drift.findings import Arm, share

    model, tokenizer, drafter = demo
    monkeypatch.setattr(measure_all, "DEEP", DRAFTS)
    told = json.loads(json.dumps(measure_all.drift(drafter, said)))
    prompts = [text.tokens[: text.prompt] for text in said]
    settings = DriftSettings(DRAFTS, ROOM)
    wanted = drift(model, tokenizer, {"": drafter}, prompts, settings).arms[0].free_running
    arm = Arm("", 0, {0: {"drift": told}})
    for names in ("rms",), ("cosine",), ("update",), ("entropy",), ("attention", "drafts"):
        expected = wanted.attention[names[1]] if names[1:] else getattr(wanted, names[0])
        found = share(arm.drift(*names))
        np.testing.assert_allclose(
            [one.value for one in found], [one.value for one in expected], rtol=0.01, atol=1e-3
        )


def test_the_teacher_forced_chain_begins_where_free_running_ones_do(demo, said):
    """Its first step drafts what a round drafts first."""
    from attention_drift import measure_all
    from attention_drift.replay import unroll

    text, drafter = said[0], demo[2]
    rows = measure_all.forced_rows(text)
    _, right = measure_all.forced_means(drafter, text, rows)
    drafts, _ = unroll(drafter, text, 1)
    wanted = np.array(text.tokens[2:])[rows]
    assert right[0] == (drafts[rows, 0] == wanted).mean()
    assert len(rows) == len(text.tokens) - text.prompt - measure_all.DEEP + 1


def a_drafter(arm, seed, accepted, tested=10, rms=(1.0, 2.0)):
    """What was measured of a drafter, on two prompts that are alike."""
    counts = {"rounds": [10, 10], "tested": [[tested]] * 2, "accepted": [[accepted]] * 2}
    drift = {"chains": [2, 4], "rms": [list(rms)] * 2}
    return {
        "arm": arm,
        "depth": 4,
        "seed": seed,
        "acceptance": {"held out": counts},
        "drift": {"free_running": drift},
    }


def write_study(folder, *drafters):
    from attention_drift.findings import TEXTS, Study
    from attention_drift.settings import EMBEDDED

    (folder / TEXTS).write_text("{}")
    for one in drafters:
        name = f"{one['arm']}-ttt{one['depth']}-seed{one['seed']}"
        (folder / f"{name}.json").write_text(json.dumps(one))
    return Study(folder, EMBEDDED)


def test_figures_of_seeds_are_ratios_of_sums(tmp_path):
    from attention_drift.findings import share

    arm = write_study(tmp_path, a_drafter("a", 0, 5), a_drafter("a", 1, 10, rms=(3.0, 8.0))).arm(
        "a", 4
    )
    assert share(arm.acceptance("held out"))[0] == (0.75, 0.75, 0.75)
    assert share(arm.conditional("held out"))[0].value == 0.75
    assert [one.value for one in share(arm.drift("rms"))] == [2.0, 5.0]
    assert share(arm.of([1]).drift("rms"))[1].value == 8.0


@pytest.mark.parametrize(
    ("accepted", "direction", "is_one"),
    [((6, 7), 1, False), ((4, 3), -1, False), ((9, 4), 0, False), ((5, 5), 0, True)],
)
def test_a_difference_is_told_only_if_every_seed_tells_it(tmp_path, accepted, direction, is_one):
    from attention_drift.claims import length
    from attention_drift.findings import compare, ratio

    theirs = [a_drafter("b", seed, 5) for seed in (0, 1, 2)]  # a has no seed 2
    ours = [a_drafter("a", seed, n) for seed, n in enumerate(accepted)]
    study = write_study(tmp_path, *ours, *theirs)
    figure = ratio(lambda arm: length("held out", arm))
    found = compare(figure, study.arm("a", 4), study.arm("b", 4))
    assert found.seeds == pytest.approx([n / 5 for n in accepted])
    assert found.all.value == pytest.approx(sum(accepted) / 10)
    assert (found.direction, found.is_one) == (direction, is_one)


def test_an_interval_is_of_prompts(tmp_path):
    from attention_drift.claims import length
    from attention_drift.findings import compare

    unlike = a_drafter("a", 0, 0)
    unlike["acceptance"]["held out"]["accepted"] = [[0], [30]]
    found = compare(lambda arm: length("held out", arm), write_study(tmp_path, unlike).arm("a", 4))
    assert found.all == pytest.approx((1.5, 0, 3))
    assert found.direction == 0


def test_effects_of_two_switches(tmp_path):
    from attention_drift.claims import length
    from attention_drift.findings import compare
    from attention_drift.sections import effect

    accepted = {"none": 2, "first": 4, "second": 6, "both": 24}
    study = write_study(tmp_path, *(a_drafter(arm, 0, n) for arm, n in accepted.items()))
    arms = [study.arm(name, 4) for name in accepted]
    for signs, wanted in (
        ((-1, 1, -1, 1), (2 * 4) ** 0.5),
        ((-1, -1, 1, 1), (3 * 6) ** 0.5),
        ((1, -1, -1, 1), 2**0.5),
    ):
        found = compare(effect(lambda arm: length("held out", arm), *signs), *arms)
        assert found.all.value == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("value", "expected", "verdict"),
    [
        (1.5, 1, "replicates"),
        (0.5, 1, "the opposite"),
        (0.5, -1, "replicates"),
        (1.0, 0, "replicates"),
        (1.0, 1, "no difference"),
        (1.5, 0, "a difference"),
    ],
)
def test_verdicts(value, expected, verdict):
    from attention_drift.claims import Claim
    from attention_drift.findings import Compared
    from mlx_drift.measure.bootstrap import Interval

    found = Compared(Interval(value, value, value), (value,))
    assert Claim("", "", found, expected).verdict == verdict


@pytest.mark.parametrize(
    ("low", "high", "seeds", "prompts"),
    [
        (1.0, 1.4, (1.2, 1.2), 100),  # ±0.2 of 100 prompts, 0.2 off
        (0.8, 1.6, (1.2, 1.2), 400),
        (0.9, 1.1, (1.05, 0.95), 100),  # seeds disagree, but all are close
        (0.7, 1.3, (1.05, 0.95), 900),
        (0.9, 1.1, (1.2, 0.8), None),
    ],
)
def test_how_many_prompts_would_settle_it(low, high, seeds, prompts):
    from attention_drift.findings import Compared
    from mlx_drift.measure.bootstrap import Interval

    found = Compared(Interval((low + high) / 2, low, high), seeds, 100)
    assert found.prompts_to_settle == pytest.approx(prompts, abs=1)


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    from dataclasses import replace

    from attention_drift import measure_all
    from attention_drift.arms import Run
    from attention_drift.settings import EMBEDDED

    asked = []

    def rounds_of(drafter, text):
        asked.append(text)
        return [(2, 1), (0, 0)]

    run = Run("both", 4, 0)
    (tmp_path / run.name).mkdir()
    trained = {"arm": "both", "depth": 4, "seed": 0, "losses": [[2.0, 3.0]] * 60}
    (tmp_path / run.name / "train.json").write_text(json.dumps(trained))
    monkeypatch.setattr(measure_all, "drift", lambda drafter, said: {"rms": 1})
    monkeypatch.setattr(measure_all, "load_converted", lambda folder, model: None)
    monkeypatch.setattr(measure_all.texts, "recorded", lambda folder, setting: {"held out": []})
    conditions = [("one", [1, 2], rounds_of, 3)]
    monkeypatch.setattr(measure_all, "conditions", lambda said, run, setting: conditions)
    results = tmp_path / "results"
    results.mkdir()
    setting = replace(EMBEDDED, results=results)
    measure_all.measure(run, tmp_path, setting)
    conditions.append(("two", [3], rounds_of, 3))
    for _ in range(2):
        measure_all.measure(run, tmp_path, setting)
    assert asked == [1, 2, 3]
    told = json.loads((results / f"{run.name}.json").read_text())
    assert told["loss"] == [2.0, 3.0]
    assert told["acceptance"]["one"] == {
        "rounds": [2, 2],
        "tested": [[1, 1, 0]] * 2,
        "accepted": [[1, 0, 0]] * 2,
    }
    assert [path.name for path in results.iterdir()] == [f"{run.name}.json"]


def test_the_report_is_what_the_figures_say(tmp_path):
    """As committed, word for word, with every picture it shows."""
    import re

    from attention_drift.report import write
    from attention_drift.settings import RESULTS

    path = write(RESULTS, tmp_path)
    report = path.read_text()
    assert report == (STUDY / "REPORT.md").read_text()
    for picture in re.findall(r"\(figures/(.+?)\)", report):
        assert (tmp_path / "figures" / picture).stat().st_size > 0
        assert (STUDY / "figures" / picture).exists()


def test_all_drafters_are_measured():
    from attention_drift.arms import ARMS, runs
    from attention_drift.settings import RESULTS

    measured = {path.stem for path in RESULTS.glob("*-seed*.json")}
    assert measured >= {run.name for run in runs() if run.arm in ARMS}
    assert sum(path.stat().st_size for path in RESULTS.rglob("*.json")) < 2.5e6
