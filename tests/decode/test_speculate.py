"""The round: greedy equality, caches, ends, and one synchronisation, for every accept pattern."""

import random
import weakref

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors

from backend import assert_same, assert_same_rows, assert_same_tokens
from mlx_drift.decode.chooser import Chooser
from mlx_drift.decode.plain import time_plain_steps
from mlx_drift.decode.sampling import GREEDY, Sampling
from mlx_drift.decode.speculate import every, prefill, speculate
from mlx_drift.target.model import Target
from tiny import Oracle, plain_greedy, tiny_drafter, tiny_llama

PROMPT = [5, 9, 2, 44, 17, 3, 60]
LENGTH = 24


def spoilt_rounds(seed: int) -> list[set[int]]:
    """Random accept patterns, all-right and all-wrong rounds among them."""
    rng = random.Random(seed)
    return [set(), {0}] + [{i for i in range(8) if rng.random() < 0.3} for _ in range(20)]


def run(model, text, k, *, seed=0, count=LENGTH, stop=frozenset(), step_size=4, after_round=None):
    drafter = Oracle(text, spoilt_rounds(seed))
    target = Target(model, drafter.taps)
    target_cache, drafter_cache = target.make_cache(), drafter.make_cache()
    prompt = mx.array(text[: len(PROMPT)])
    for _ in prefill(target, drafter, prompt, target_cache, drafter_cache, cut=every(step_size)):
        pass
    rounds = []
    for round in speculate(
        target,
        drafter,
        prompt[-1:],
        target_cache,
        drafter_cache,
        num_draft_tokens=k,
        max_tokens=count,
        stop_tokens=stop,
    ):
        rounds.append(round)
        if after_round is not None:
            after_round(target, target_cache, drafter_cache)
    return rounds


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def text(model):
    text = PROMPT + plain_greedy(model, PROMPT, LENGTH + 10)
    assert len(set(text)) > 15  # a text that repeats itself would hide mistakes
    return text


def tokens_of(rounds):
    return [token for round in rounds for token in round.tokens]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_equals_plain_greedy(model, text, k, seed):
    rounds = run(model, text, k, seed=seed)
    assert tokens_of(rounds) == text[len(PROMPT) :][:LENGTH]
    assert any(round.accepted for round in rounds)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(mx.bfloat16, None), (mx.float32, 4), (mx.bfloat16, 8)]
)
def test_equals_plain_greedy_in_low_precision(dtype, bits):
    """Bit for bit on the plain CPU backend, where a block of rows is what single rows are."""
    model = tiny_llama(dtype, bits)
    text = PROMPT + plain_greedy(model, PROMPT, LENGTH + 10)
    expected = text[len(PROMPT) :][:LENGTH]
    for k in (1, 4):
        assert_same_tokens(model, PROMPT, tokens_of(run(model, text, k)), expected, near_tie=0.25)


def test_caches_hold_the_committed_rows_and_true_taps_after_every_round(model, text):
    plain = Target(model, (1, 3))

    def check(target, target_cache, drafter_cache):
        committed = drafter_cache.tokens
        assert committed == text[: len(committed)]
        reference = plain.make_cache()
        _, taps = plain(mx.array(committed[:-1]), reference)
        assert_same(mx.concatenate(drafter_cache.taps), taps)
        assert_same_rows(target_cache, reference)

    run(model, text, 4, after_round=check)


def test_a_long_prompt_keeps_the_taps_of_one_chunk(model):
    """The taps of a chunk are gone when the next one is ingested."""
    drafter, kept, alive = tiny_drafter(model), [], []
    target, ingest = Target(model, drafter.taps), drafter.ingest

    def watched(tokens, taps, cache):
        kept.append(weakref.ref(taps))
        alive.append(sum(one() is not None for one in kept))
        assert tokens.size <= 16
        ingest(tokens, taps, cache)

    drafter.ingest = watched
    caches = target.make_cache(), drafter.make_cache()
    prompt = mx.array([i % 60 for i in range(200)])
    for _ in prefill(target, drafter, prompt, *caches, cut=every(16)):
        pass
    assert len(alive) == 13
    assert 1 <= min(alive) <= max(alive) <= 2  # the name is bound until the next chunk's


def test_one_token_prompt(model):
    text = PROMPT[:1] + plain_greedy(model, PROMPT[:1], 12)
    drafter = Oracle(text, [set()])
    target = Target(model, drafter.taps)
    rounds = speculate(
        target,
        drafter,
        mx.array(text[:1]),
        target.make_cache(),
        drafter.make_cache(),
        num_draft_tokens=3,
        max_tokens=12,
        stop_tokens=frozenset(),
    )
    assert tokens_of(rounds) == text[1:]


@pytest.mark.parametrize("count", range(1, 12))
def test_max_tokens_inside_a_round(model, text, count):
    rounds = run(model, text, 4, count=count)
    assert tokens_of(rounds) == text[len(PROMPT) :][:count]


@pytest.mark.parametrize("position", range(10))
def test_stop_token_inside_a_round(model, text, position):
    stop = text[len(PROMPT) + position]
    first = text.index(stop, len(PROMPT))
    rounds = run(model, text, 4, stop={stop})
    assert tokens_of(rounds) == text[len(PROMPT) : first + 1]
    last = rounds[-1]
    assert last.accepted <= last.tested
    assert len(last.tokens) in (last.accepted, last.accepted + 1)


def test_caches_end_at_a_stop_token(model, text):
    stop = text[len(PROMPT) + 6]
    first = text.index(stop, len(PROMPT))
    offsets = []
    run(
        model, text, 8, stop={stop}, after_round=lambda t, cache, d: offsets.append(cache[0].offset)
    )
    assert offsets[-1] == first  # all committed tokens but the last, the stop token itself


PENALTIES = tuple(make_logits_processors({3: 1.0}, 1.1, 20, 0.3, 20, 0.2))
FOR_ALL_ROWS_AT_ONCE = [
    GREEDY,
    Sampling(temp=0.7, top_p=0.9, xtc_probability=0.5),
    Sampling(logits_processors=PENALTIES),
    Sampling(temp=0.7, logits_processors=PENALTIES),
]


@pytest.mark.parametrize("sampling", FOR_ALL_ROWS_AT_ONCE)
def test_one_synchronisation_a_round(model, text, monkeypatch, sampling):
    accept, syncs = Chooser.accept, []

    class Counted:
        def __init__(self, array):
            self.array = array

        def tolist(self):
            syncs.append(1)
            return self.array.tolist()

    monkeypatch.setattr(Chooser, "accept", lambda *a: Counted(accept(*a)))
    drafter = Oracle(text, spoilt_rounds(0))
    target = Target(model, drafter.taps)
    target_cache, drafter_cache = target.make_cache(), drafter.make_cache()
    target(mx.array(PROMPT[:-1]), target_cache)
    drafter_cache.tokens = list(PROMPT)
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, lambda *a, name=name: pytest.fail(f"mx.{name} in a round"))
    rounds = speculate(
        target,
        drafter,
        mx.array(PROMPT[-1:]),
        target_cache,
        drafter_cache,
        num_draft_tokens=3,
        max_tokens=LENGTH,
        stop_tokens=frozenset(),
        sampling=sampling,
        key=mx.random.key(0),
        history=PROMPT,
    )
    assert len(list(rounds)) == len(syncs)


def test_plain_steps_are_rolled_back(model):
    target = Target(model, (1,))
    cache = target.make_cache()
    target(mx.array(PROMPT), cache)
    assert time_plain_steps(target, mx.array([1]), cache) > 0
    assert cache[0].offset == len(PROMPT)
