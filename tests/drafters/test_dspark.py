"""DSpark heads: what their biases are added to, and where they stop."""

import mlx.core as mx
import numpy as np
import pytest

from families import build
from kinds import BLOCK, random_head
from mlx_drift import DriftError, stream_generate
from mlx_drift.target.model import Target
from tiny import NoText, plain_greedy, tiny_llama

PROMPT = [5, 9, 2, 44, 17, 3]
KINDS = ["dspark gated", "dspark rnn"]


def fed(head, seed=1):
    """A conversation of six tokens."""
    cache = head.make_cache()
    size = head.config.target.hidden_size
    taps = mx.random.normal((6, len(head.taps), size), key=mx.random.key(seed))
    head.ingest(mx.array(PROMPT), taps, cache)
    return cache


@pytest.mark.parametrize("family", ["cohere2", "gemma2"])
def test_biases_are_added_to_the_targets_logits_as_it_scales_and_caps_them(family):
    model = build(family)
    head = random_head("dspark", model)
    target, cache = Target(model, head.taps), fed(head)
    hidden = head._fill(3, cache)
    token, drafts = cache.seed, []
    for slot in range(3):
        bias, _ = head.network.markov(token, hidden[slot : slot + 1], None)
        token = mx.argmax(target.logits(hidden[slot : slot + 1]) + bias, axis=-1)
        drafts.append(token.item())
    assert head.propose(3, cache).tokens.tolist() == drafts


def likelihoods(head, cache, tokens):
    """The head's account of each draft, by itself."""
    hidden = head._fill(len(tokens), cache)
    parts = [hidden]
    if head.config.confidence == "state and token":
        before = mx.concatenate([cache.seed, mx.array(tokens[:-1], dtype=mx.int32)])
        parts.append(head.network.markov.w1.weight[before])
    layer = head.network.confidence
    return np.array(mx.sigmoid(mx.concatenate(parts, -1) @ layer.weight.T + layer.bias))[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_stops_before_the_first_doubtful_slot(kind):
    head = random_head(kind, tiny_llama())
    lengths = set()
    for seed in range(8):
        cache = fed(head, seed)
        whole = head.propose(BLOCK - 1, cache).tokens.tolist()
        likely = likelihoods(head, cache, whole)
        for least in (0.0, 0.3, 0.5, 0.7, 1.0):
            doubtful = np.flatnonzero(likely < least)
            sure = int(doubtful[0]) if doubtful.size else len(whole)
            lengths.add(sure)
            drafted = head.confident(least).propose(BLOCK - 1, cache).tokens.tolist()
            assert drafted == whole[:sure]
    assert {0, BLOCK - 1} < lengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temp", [0, 0.8])
def test_what_is_generated_stays_what_it_was(kind, temp):
    model = tiny_llama()
    head = random_head(kind, model).confident(0.5)
    said = list(
        stream_generate(
            model, NoText(), PROMPT, 24, drafter=head, num_draft_tokens=4, temp=temp, seed=1
        )
    )
    rounds = said[-1].statistics
    assert 0 < sum(rounds.tested) < 4 * rounds.rounds  # it did stop, and did draft
    if temp == 0:
        assert [r.token for r in said] == plain_greedy(model, PROMPT, 24)


def test_what_makes_no_sense_is_refused():
    head = random_head("dspark", tiny_llama())
    with pytest.raises(DriftError, match="no confidence head"):
        head.confident(0.5)
    with pytest.raises(DriftError, match=r"least confidence is 1.5; expected 0 to 1"):
        random_head("dspark rnn", tiny_llama()).confident(1.5)
