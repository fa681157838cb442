"""Drafters of every kind lose nothing, on targets of every kind.

A random head hardly ever drafts what the target says. So that every length of acceptance occurs,
drafts are replaced by the target's own tokens, each with probability 0.7: what is tested are
the round, the rollback and the drafter's cache, and these do not know where a draft is from.
"""

import random

import mlx.core as mx
import numpy as np
import pytest

from families import build
from kinds import BLOCK, KINDS, random_head
from mlx_drift.decode.speculate import every, prefill, speculate
from mlx_drift.drafters.protocol import Draft
from mlx_drift.target.model import Target
from tiny import VOCAB, plain_greedy, tiny_llama

TARGETS = """
    llama qwen3_moe gpt_oss gemma3_text cohere2 deepseek_v3 llama4_text qwen3_next qwen3_5 lfm2
    nemotron_h granitemoehybrid
""".split()
ALWAYS = "llama gemma3_text deepseek_v3 qwen3_next".split()
"""Of which the default tests take the kinds in turn; all of it is `long`."""
PROMPT = [5, 9, 2, 44, 17, 3, 60, 11, 25]
LENGTH = 48
COMBINATIONS = [
    pytest.param(
        kind, family, marks=() if j < len(ALWAYS) and (i - j) % 2 == 0 else pytest.mark.long
    )
    for i, kind in enumerate(KINDS)
    for j, family in enumerate([*ALWAYS, *(f for f in TARGETS if f not in ALWAYS)])
]


class Nudged:
    """A drafter whose drafts are the target's own tokens with probability 0.7."""

    def __init__(self, drafter, text):
        self.drafter = drafter
        self.text = text
        self.random = random.Random(3)
        self.seen = 1
        self.taps, self.model, self.network = drafter.taps, drafter.model, drafter.network

    def make_cache(self):
        return self.drafter.make_cache()

    def start(self, token, cache):
        self.drafter.start(token, cache)

    def ingest(self, tokens, taps, cache):
        self.seen += tokens.size
        self.drafter.ingest(tokens, taps, cache)

    def propose(self, k, cache, chooser=None):
        draft = self.drafter.propose(k, cache, chooser)
        true = self.text[self.seen : self.seen + draft.tokens.size]
        right = [self.random.random() < 0.7 for _ in true]
        wrong = [(token + 1) % VOCAB for token in draft.tokens.tolist()]
        nudged = [t if r else w for t, r, w in zip(true, right, wrong, strict=True)]
        return Draft(mx.array(nudged, dtype=mx.int32), draft.log_probabilities)


@pytest.fixture(scope="module")
def targets():
    made = {}

    def target(family):
        if family not in made:
            model = build(family)
            made[family] = model, PROMPT + plain_greedy(model, PROMPT, LENGTH + BLOCK + 2)
        return made[family]

    return target


@pytest.mark.parametrize(("kind", "family"), COMBINATIONS)
def test_greedy_text_is_mlx_lms(kind, family, targets):
    model, text = targets(family)
    head = random_head(kind, model)
    target = Target(model, head.taps)
    seen, most = set(), 0
    for k in (1, 3, BLOCK + 2):
        drafter = Nudged(head, text)
        caches = target.make_cache(), drafter.make_cache()
        for _ in prefill(target, drafter, mx.array(PROMPT), *caches, cut=every(4)):
            pass
        rounds = list(
            speculate(
                target,
                drafter,
                mx.array(PROMPT[-1:]),
                *caches,
                num_draft_tokens=k,
                max_tokens=LENGTH,
                stop_tokens=frozenset(),
            )
        )
        tokens = [token for round in rounds for token in round.tokens]
        assert tokens == text[len(PROMPT) : len(PROMPT) + LENGTH]
        drafted = min(k, head.max_drafts or k)
        seen, most = seen | {round.accepted for round in rounds}, max(most, drafted)
        assert max(round.tested for round in rounds) == drafted
        if k == 3:
            is_as_if_fed_at_once(target, head, text, caches[1])
    assert seen >= set(range(min(most, 2) + 1))  # rounds end at any length


def is_as_if_fed_at_once(target, head, text, cache):
    """Whether a cache holds the rows of committed tokens, from true taps, and nothing else."""
    rows = len(PROMPT) + LENGTH - 1
    tokens = mx.array(text[: rows + 1])
    whole = head.make_cache()
    _, taps = target(tokens[:-1], target.make_cache())
    head.ingest(tokens[1:], taps, whole)
    ours, theirs = cache.to_arrays(), whole.to_arrays()
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=2e-4, err_msg=name)
    assert head.propose(4, cache).tokens.tolist() == head.propose(4, whole).tokens.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_from_an_earlier_point(kind):
    """Rewound, saved and forked caches draft as the one that came there by itself."""
    model = tiny_llama()
    head = random_head(kind, model)
    tokens = mx.array([7, 3, 9, 22, 41, 5, 6, 30, 12, 8])
    taps = mx.random.normal((10, len(head.taps), 32), key=mx.random.key(1))
    there, beyond, filled = head.make_cache(), head.make_cache(), head.make_cache()
    head.ingest(tokens[:6], taps[:6], there)
    head.ingest(tokens[:5], taps[:5], filled)
    saved = filled.to_arrays()
    head.ingest(tokens, taps, beyond)
    fork = beyond.fork()
    assert beyond.rewind(5)
    loaded = head.make_cache()
    loaded.from_arrays(saved, 5)
    for cache in (beyond, loaded):
        assert head.propose(3, cache).tokens.size == 0  # nothing to go by yet
        head.ingest(tokens[5:6], taps[5:6], cache)
        assert head.propose(4, cache).tokens.tolist() == head.propose(4, there).tokens.tolist()
    whole = head.make_cache()
    head.ingest(tokens, taps, whole)
    assert head.propose(4, fork).tokens.tolist() == head.propose(4, whole).tokens.tolist()
