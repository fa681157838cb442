"""The chain of an MTP head: teacher-forced as decoded, and what its block is seen to attend to."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from families import VOCAB, build
from mlx_drift import convert_drafter
from mlx_drift.drafters.load import load_converted, load_network
from mlx_drift.measure.inside.drift import Settings, drift
from mlx_drift.watch.observe import Observed
from mtp_heads import FAMILIES, config_of, head, write_repository, written
from tiny import NoText

KINDS = ["speculators llama", "qwen3_5_moe", "deepseek_v3", "mimo"]
"""Plain, gated and latent attention, and biases."""

ROWS, STEPS = 9, 4


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads each family's head once, bound to its target."""
    home, loaded = tmp_path_factory.mktemp("heads"), {}

    def loader(name):
        if name not in loaded:
            source = home / name / "source"
            write_repository(source, config_of(name), written(name, head_of(name)))
            convert_drafter(str(source), home / name / "out", mtp=True)
            loaded[name] = load_converted(home / name / "out", build(FAMILIES[name].target))
        return loaded[name]

    return loader


def head_of(name):
    """A lively one: its attention is far from even."""
    return {n: v * 8 if v.ndim > 1 else v for n, v in head(name).items()}


def conversation(drafter):
    mx.random.seed(2)
    tokens = mx.random.randint(0, VOCAB, (ROWS + STEPS + 1,))
    return tokens, mx.random.normal((ROWS, 1, drafter.config.hidden_size))


def decoded(drafter, row, tokens, taps):
    """Runs the chain that leaves the text at a row, fed the true tokens, as rounds do."""
    cache = drafter.make_cache()
    drafter.ingest(tokens[1 : row + 2], taps[: row + 1], cache)
    logits, state = [cache.draft_logits], cache.recycled
    for step in range(1, STEPS):
        embedding = drafter._embed(tokens[row + 1 + step : row + 2 + step])
        normed, state = drafter.network(embedding, state, cache.layers)
        logits.append(drafter._head(normed))
    return mx.concatenate(logits)


@pytest.mark.parametrize("name", KINDS)
def test_the_teacher_forced_chain_is_the_decoded_one(name, load):
    drafter = load(name)
    tokens, taps = conversation(drafter)
    forced, _ = drafter.train_time_test(tokens[: ROWS + 1], taps, 1)
    whole, _ = drafter.train_time_test(tokens[: ROWS + 1], taps, STEPS)
    assert mx.allclose(forced[0], whole[0], atol=1e-5).item()
    for row in (0, 4, ROWS - STEPS):
        expected = decoded(drafter, row, tokens, taps)
        assert mx.allclose(whole[:, row], expected, atol=2e-4).item()


def told(monkeypatch, drafter):
    """Notes queries, keys, values and outputs of the block's attention."""
    module = sys.modules[type(drafter.network.layers[0].self_attn).__module__]
    attend, calls = module.scaled_dot_product_attention, []

    def note(queries, keys, values, cache, scale, mask):
        output = attend(queries, keys, values, cache=cache, scale=scale, mask=mask)
        calls.append((values, output))
        return output

    monkeypatch.setattr(module, "scaled_dot_product_attention", note)
    return calls


@pytest.mark.parametrize("name", KINDS)
def test_the_weights_that_are_told_are_those_it_attends_with(name, load, monkeypatch):
    drafter = load(name)
    calls = told(monkeypatch, drafter)
    tokens, taps = conversation(drafter)
    seen = Observed(drafter.network, 1000)
    watched = drafter.through(seen)
    cache = watched.make_cache()
    watched.ingest(tokens[1 : ROWS + 1], taps, cache)
    proposed = watched.propose(STEPS, cache).tokens.tolist()
    chain = seen.take_last()
    assert len(calls) == len(chain.steps) == STEPS
    for (values, output), step in zip(calls, chain.steps, strict=True):
        (weights,) = step.weights
        assert mx.allclose(weights.sum(axis=-1), mx.array(1.0), atol=1e-6).item()
        values = mx.repeat(values[0], weights.shape[0] // values.shape[1], axis=0)
        assert mx.allclose(weights @ values, output[0], atol=1e-4, rtol=1e-4).item()

    unwatched = drafter.make_cache()
    drafter.ingest(tokens[1 : ROWS + 1], taps, unwatched)
    assert drafter.propose(STEPS, unwatched).tokens.tolist() == proposed


@pytest.mark.parametrize("name", KINDS)
def test_the_teacher_forced_chain_attends_as_the_decoded_one(name, load):
    drafter = load(name)
    tokens, taps = conversation(drafter)
    forced = Observed(drafter.network, ROWS)
    for _ in drafter.through(forced).train_time_test_steps(tokens[: ROWS + 1], taps, STEPS):
        pass
    of_all = forced.take_last()
    row = ROWS - STEPS
    seen = Observed(drafter.network, 1)
    decoded(drafter.through(seen), row, tokens, taps)
    of_one = seen.take_last()
    for step, (all_rows, one) in enumerate(zip(of_all.steps, of_one.steps, strict=True)):
        weights = np.array(all_rows.weights[0])[:, row]  # [heads, L + step]
        kept = np.concatenate([weights[:, : row + 1], weights[:, ROWS : ROWS + step]], axis=1)
        assert np.allclose(kept, np.array(one.weights[0])[:, 0], atol=2e-4)


def test_beyond_a_window_the_gap_is_unseen(load):
    drafter = load("speculators llama").windowed(3, sinks=1)
    tokens, taps = conversation(drafter)
    seen = Observed(drafter.network, 1)
    watched = drafter.through(seen)
    cache = watched.make_cache()
    watched.ingest(tokens[1 : ROWS + 1], taps, cache)
    watched.propose(STEPS, cache)
    for number, step in enumerate(seen.take_last().steps):
        weights = np.array(step.weights[0])[:, 0]
        assert weights.shape[1] == ROWS + number
        assert (weights[:, 1:-3] == 0).all()
        assert np.allclose(weights.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_5", "glm4_moe_lite"])
def test_drift_is_measured(name, load):
    drafter = load(name)
    prompts = [[5, 9, 2, 44, 17, 3, 60, 11], [25, 8, 30]]
    settings = Settings(steps=3, max_tokens=8)
    found = drift(drafter.model, NoText(), {name: drafter}, prompts, settings, ["pin"])
    for arm in found.arms:
        for figures in (arm.free_running, arm.teacher_forced):
            shares = [sum(share[k].value for share in figures.attention.values()) for k in range(3)]
            assert np.allclose(shares, 1, atol=1e-6)


@pytest.mark.parametrize("name", ["mimo", "qwen3_5"])
def test_folded_into_the_projection_the_gains_do_the_same(name, load):
    folded = load(name)
    assert "hidden_norm" not in folded.network
    plain = load_network(folded.config, head_of(name), Path("x"))
    tokens, taps = conversation(folded)
    expected = folded.through(plain).train_time_test(tokens[: ROWS + 1], taps, 2)
    found = folded.train_time_test(tokens[: ROWS + 1], taps, 2)
    for ours, theirs in zip(found, expected, strict=True):
        assert mx.allclose(ours, theirs, atol=1e-4, rtol=1e-4).item()
