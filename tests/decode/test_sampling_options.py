"""Logits processors see what mlx-lm's own see; seeds, refusals, and what a response tells."""

import math
from threading import Thread

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from test_sampling import log_softmax

from backend import ON_GPU, assert_same
from mlx_drift import DriftError, stream_generate
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.speculate import every, prefill, speculate
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.target.model import Target
from tiny import VOCAB, NoText, Oracle, plain_greedy, tiny_drafter, tiny_llama

# Logits processors.


BIT_FOR_BIT = "bit for bit where rows do not see each other's rounding"
TEXT_PROMPT = [5, 9, 2, 44, 17, 3, 60]
PROCESSORS = {
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 1.0, "presence_context_size": 8},
    "frequency": {"frequency_penalty": 0.7},
    "bias": {"logit_bias": {3: 4.0, 44: -2.0}},
    "all": {
        "logit_bias": {3: 2.0},
        "repetition_penalty": 1.2,
        "repetition_context_size": 5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
    },
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def drafter(model):
    """One whose drafts are hardly ever right."""
    return tiny_drafter(model)


@pytest.fixture(scope="module")
def greedy(model):
    return plain_greedy(model, TEXT_PROMPT, 64)


def rounds_of(model, drafter, k, count, sampling, key=None):
    """Decodes after the prompt, directly through `speculate`."""
    target, prompt = Target(model, drafter.taps), mx.array(TEXT_PROMPT)
    cache, drafter_cache = target.make_cache(), drafter.make_cache()
    for _ in prefill(target, drafter, prompt, cache, drafter_cache, cut=every(4)):
        pass
    return speculate(
        target,
        drafter,
        prompt[-1:],
        cache,
        drafter_cache,
        num_draft_tokens=k,
        max_tokens=count,
        stop_tokens=frozenset(),
        sampling=sampling,
        key=key,
        history=TEXT_PROMPT,
    )


def tokens_of(rounds):
    return [token for round in rounds for token in round.tokens]


@pytest.mark.skipif(ON_GPU, reason=BIT_FOR_BIT)
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_give_mlx_lms_tokens(model, drafter, greedy, name):
    processors = make_logits_processors(**PROCESSORS[name])
    steps = generate_step(mx.array(TEXT_PROMPT), model, max_tokens=64, logits_processors=processors)
    expected = [int(token) for token, _ in steps]
    assert expected != greedy  # the processors matter
    sampling = Sampling(logits_processors=tuple(processors))
    for k in (1, 4):
        oracle = Oracle(TEXT_PROMPT + expected, [set(), {0}, {2}, {1, 3}], taps=(1, 2))
        rounds = list(rounds_of(model, oracle, k, 64, sampling))
        assert tokens_of(rounds) == expected
        assert len(rounds) < 64
        # One that chooses its drafts with the processors too.
        assert tokens_of(rounds_of(model, drafter, k, 8, sampling)) == expected[:8]


@pytest.mark.parametrize("temp", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_every_position_sees_its_history(model, drafter, monkeypatch, temp, k):
    seen, proposed = [], []

    def recording(tokens, logits):
        assert logits.shape == (1, VOCAB)
        seen.append(tokens)
        return logits

    recording.stateless = True  # else it would be asked about committed positions alone
    propose = ChainDrafter.propose

    def recorded(self, *arguments):
        proposed.append(propose(self, *arguments))
        return proposed[-1]

    monkeypatch.setattr(ChainDrafter, "propose", recorded)
    sampling = Sampling(temp=temp, logits_processors=(recording,))
    rounds = rounds_of(model, drafter, k, 20, sampling, mx.random.key(1))
    committed, expected = list(TEXT_PROMPT), []
    for round in rounds:
        drafts = proposed[-1].tokens.tolist()
        histories = [committed + drafts[:step] for step in range(len(drafts) + 1)]
        expected += histories[:-1]  # the drafter's
        expected += histories  # the target's, the bonus token's included
        committed += round.tokens
    assert [tokens.tolist() for tokens in seen] == expected
    assert len(committed) == len(TEXT_PROMPT) + 20


# Seeds, refusals, and what a response tells.


SAMPLED = {"temp": 0.9, "top_p": 0.95, "xtc_probability": 0.3, "xtc_threshold": 0.05}


def say(model, drafter, **keywords):
    return list(stream_generate(model, NoText(), TEXT_PROMPT, 12, drafter=drafter, **keywords))


def said(*arguments, **keywords):
    return [response.token for response in say(*arguments, **keywords)]


def test_seeds(model, drafter):
    first = said(model, drafter, seed=1, **SAMPLED)
    assert said(model, drafter, seed=1, **SAMPLED) == first
    assert said(model, drafter, seed=2, **SAMPLED) != first
    mx.random.seed(5)
    unseeded = [said(model, drafter, **SAMPLED) for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    mx.random.seed(5)
    assert [said(model, drafter, **SAMPLED) for _ in range(2)] == unseeded
    opaque = [said(model, drafter, seed=1, sampler=make_sampler(1.0)) for _ in range(2)]
    assert opaque[0] == opaque[1]


def test_a_top_k_of_the_whole_vocabulary_keeps_it_all(model, drafter):
    """mlx-lm raises then, in a compiled function, and leaves its random state broken."""
    expected = said(model, drafter, seed=1, temp=1.0)
    assert said(model, drafter, seed=1, temp=1.0, top_k=VOCAB) == expected
    assert said(model, drafter, seed=1, temp=1.0, min_p=0.9, min_tokens_to_keep=VOCAB) == expected
    said(model, None, temp=1.0, top_k=VOCAB)
    said(model, drafter, temp=1.0)


@pytest.mark.parametrize("special", [VOCAB, 99_999_999, -1])
def test_special_tokens_that_are_none_are_refused(model, drafter, special):
    for drafts_with in (drafter, None):
        with pytest.raises(DriftError, match=f"xtc_special_tokens .* is {special}: outside"):
            said(model, drafts_with, xtc_probability=0.9, xtc_special_tokens=[5, special])


def test_a_worker_thread_draws_the_same(model, drafter):
    got = []

    def work():
        got.append(said(model, drafter, seed=1, **SAMPLED))

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert got == [said(model, drafter, seed=1, **SAMPLED)]
    assert 0 <= mx.random.uniform().item() < 1  # mlx's own random state is this thread's still


@pytest.mark.parametrize("with_drafter", [True, False])
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temp": -0.1}, "temp is -0.1; expected from 0 to 100000"),
        ({"temp": math.nan}, "temp is nan"),
        ({"temp": 1, "top_p": 1.1}, "top_p is 1.1; expected from 0 to 1"),
        ({"temp": 1, "min_p": -1}, "min_p is -1; expected from 0 to 1"),
        (
            {"temp": 1, "min_tokens_to_keep": 0},
            "min_tokens_to_keep is 0; expected a whole",
        ),
        ({"temp": 1, "top_k": -1}, "top_k is -1; expected a whole number from 0"),
        ({"temp": 1, "xtc_probability": 2}, "xtc_probability is 2; expected from 0 to 1"),
        ({"temp": 1, "xtc_threshold": 0.6}, "xtc_threshold is 0.6; expected from 0 to 0.5"),
        ({"temp": 1, "top_k": 2.5}, "top_k is 2.5; expected a whole number"),
        ({"temp": math.inf}, "temp is inf"),
        ({"temp": 1e-40}, "temp is 1e-40; expected 0, or at least 0.0001"),
        ({"temp": "warm"}, "temp is 'warm'; expected a number"),
        ({"seed": -1}, "seed is -1; expected a whole number"),
        ({"temp": 1, "sampler": make_sampler(1.0)}, "both temp and sampler are given"),
        ({"min_p": 0.5, "sampler": make_sampler(1.0)}, "both min_p and sampler are given"),
    ],
)
def test_values_out_of_range_are_refused(model, drafter, keywords, message, with_drafter):
    with pytest.raises(DriftError) as refused:
        say(model, drafter if with_drafter else None, **keywords)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("processors", [{}, PROCESSORS["all"]])
def test_logprobs_are_the_targets(model, drafter, processors):
    """Of the raw distribution, before temperature and filters, as mlx-lm's are."""
    processors = make_logits_processors(**processors)
    responses = say(model, drafter, seed=3, logits_processors=processors, **SAMPLED)
    fed = mx.array(TEXT_PROMPT + [response.token for response in responses])
    target = Target(model, (1,))
    cache = target.make_cache()
    target(fed[: len(TEXT_PROMPT) - 1], cache)
    for at, response in enumerate(responses, start=len(TEXT_PROMPT)):
        logits, _ = target(fed[at - 1 : at], cache)
        for processor in processors:
            logits = processor(fed[:at], logits)
        assert_same(response.logprobs, log_softmax(logits)[0])
        assert response.logprobs[response.token].item() > -math.inf


@pytest.mark.skipif(ON_GPU, reason=BIT_FOR_BIT)
def test_greedy_is_temperature_0(model, drafter, greedy):
    expected = greedy[:12]
    assert said(model, drafter) == expected
    assert said(model, drafter, temp=0.0, top_p=0.5, top_k=3, xtc_probability=0.5) == expected
    # Nearly 0 comes to the same, through the acceptance of probabilities.
    assert said(model, drafter, temp=1e-4, seed=1) == expected
