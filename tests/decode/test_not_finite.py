"""A drafter whose states leave the range of its dtype: told by name, and nothing is lost by it."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kinds import KINDS, random_head
from mlx_drift import DraftModelDrafter, DriftWarning, Statistics, stream_generate
from tiny import NoText, plain_greedy, tiny_drafter, tiny_llama

PROMPT, COUNT = [3, 1, 4, 1, 5], 24


def overflowing(model, factor, **config):
    """A head whose MLP adds so much to the residual stream; the rest is as it was."""
    drafter = tiny_drafter(model, **config)
    drafter.network.set_dtype(drafter._embed(mx.array([0])).dtype)
    mlp = drafter.network.layers[0].mlp
    mlp.down_proj.weight = mlp.down_proj.weight * factor
    return drafter


def say(model, drafter, **keywords):
    """The tokens, the statistics, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        responses = list(
            stream_generate(model, NoText(), PROMPT, COUNT, drafter=drafter, **keywords)
        )
    told = [str(one.message) for one in caught if issubclass(one.category, DriftWarning)]
    return [r.token for r in responses], responses[-1].statistics, told


@pytest.mark.parametrize("feedback", ["pre", "post"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_states_beyond_float16_are_told_at_the_first_round(feedback, k):
    model = tiny_llama(mx.float16)
    drafter = overflowing(model, 1e7, feedback=feedback)
    tokens, statistics, told = say(model, drafter, num_draft_tokens=k)
    assert tokens == plain_greedy(model, PROMPT, COUNT)
    assert statistics.not_finite == statistics.rounds - 1  # the last token needs no draft
    assert statistics.to_dict()["not_finite_rounds"] == statistics.not_finite
    (warning,) = told  # and not that the conventions may be wrong
    assert warning.startswith("the drafter's states are not finite")
    assert "leave the range of float16" in warning
    assert "--dtype bfloat16" in warning


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_the_same_head_in_a_wider_range(dtype):
    model = tiny_llama(dtype)
    _, statistics, told = say(model, overflowing(model, 1e7), num_draft_tokens=3)
    assert statistics.not_finite == 0
    assert not [warning for warning in told if "not finite" in warning]


def test_states_that_only_the_chain_lets_grow():
    """The first draft is sound; the fed-back state leaves the range some steps later."""
    model = tiny_llama(mx.float16)
    drafter = overflowing(model, 1e4, feedback="pre", norm_before_residual=False)
    cache = drafter.make_cache()
    drafter.ingest(mx.array([1, 2]), mx.ones((2, 2, 32), mx.float16), cache)
    cache.recycled = mx.full((1, 32), 6.5e4, mx.float16)  # the largest number is 65504
    finite = [drafter.propose(k, cache).finite.item() for k in range(1, 16)]
    assert finite[0] is True
    assert finite[-1] is False
    assert finite == sorted(finite, reverse=True)  # once it is gone it stays gone


def test_weights_that_are_nan_in_any_dtype():
    model = tiny_llama()
    tokens, statistics, told = say(model, overflowing(model, float("nan")), num_draft_tokens=3)
    assert tokens == plain_greedy(model, PROMPT, COUNT)
    assert statistics.not_finite == statistics.rounds - 1
    (warning,) = told
    assert "its weights may hold NaN" in warning


@pytest.mark.parametrize("kind", ["draft model", *KINDS])
def test_drafters_of_other_kinds(kind):
    """A draft model, and heads that draft a block; a chain's is above."""
    model = tiny_llama()
    if kind == "draft model":
        draft_model = tiny_llama()
        draft_model.layers[0].mlp.down_proj.weight *= float("nan")
        drafter = DraftModelDrafter(draft_model, model)
    else:
        drafter = random_head(kind, model)
        name, weight = tree_flatten(drafter.network.parameters())[0]
        drafter.network.load_weights([(name, weight * float("nan"))], strict=False)
    tokens, statistics, told = say(model, drafter, num_draft_tokens=3)
    assert tokens == plain_greedy(model, PROMPT, COUNT)
    assert statistics.not_finite == statistics.rounds - 1  # the last token needs no draft
    (warning,) = told
    assert warning.startswith("the drafter's states are not finite")
    _, statistics, told = say(model, sound(kind, model), num_draft_tokens=3)
    assert statistics.not_finite == 0
    assert not [warning for warning in told if "not finite" in warning]


def sound(kind, model):
    return (
        DraftModelDrafter(tiny_llama(), model)
        if kind == "draft model"
        else random_head(kind, model)
    )


def test_sampling_keeps_the_target_s_distribution():
    """With NaN for the draft's probabilities every draft is rejected, and p is drawn from."""
    model = tiny_llama(mx.float16)
    drafter = overflowing(model, 1e7)
    counts = np.zeros(64)
    for seed in range(150):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = (
                r.token
                for r in stream_generate(
                    model, NoText(), PROMPT, 2, drafter=drafter, temp=1.0, top_k=4, seed=seed
                )
            )
        assert 0 <= second < 64
        counts[first] += 1
    logits = model(mx.array([PROMPT]))[0, -1].astype(mx.float32)
    likely = np.argsort(-np.array(logits))[:4]
    expected = np.array(mx.softmax(logits[mx.array(likely)])) * 150
    assert counts[likely].sum() == 150
    statistic = float(((counts[likely] - expected) ** 2 / expected).sum())
    assert statistic < 16.3  # chi-square of 3 degrees of freedom, 0.1 %


def test_statistics_add_up():
    both = Statistics(rounds=2, not_finite=1)
    both.add(Statistics(rounds=3, not_finite=2))
    assert (both.rounds, both.not_finite) == (5, 3)
