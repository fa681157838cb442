"""Sampling loses nothing with heads that draft a block: chi-square tests as in `test_sampling`.

Drafts that do not know of each other are certain; those that are drawn one after another are tested
with what each was drawn from, given the ones before it.
"""

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors
from test_sampling import CERTAINLY_WRONG, D2T, LEAST_P, PENALTY, Pair, p_value, sampling_of

from kinds import KINDS, ONE_STATE, random_head
from mlx_drift import stream_generate
from mlx_drift.drafters.dspark import DSparkDrafter
from mlx_drift.drafters.protocol import Draft
from mlx_drift.target.model import Target
from tiny import NoText, tiny_llama

SOME = 60
GENERATIONS = [
    SOME,
    pytest.param(1200, marks=pytest.mark.long),
    pytest.param(6000, marks=pytest.mark.hours),
]
LOOPS = {
    "temperature": {"temp": 0.9},
    "top-p, repetition": {
        "temp": 1.2,
        "top_p": 0.9,
        "logits_processors": make_logits_processors(**PENALTY),
    },
}
CHANGES = {
    "intermediate_size": 16,
    "num_layers": 1,
    "causal_layers": [],
    "mask_token_id": 0,
    "num_candidates": 2,
}
SAMPLED = [kind for kind in KINDS if kind not in ("dflash sliding", "dflash causal", "eagle-attn")]
"""Those that draft in ways of their own; plain chains are tested in `test_sampling`."""


def sampled_pair(kind):
    """The tiny target of `test_sampling`, with a head of three of its five tokens."""
    pair = Pair()
    reads_last = KINDS[kind]["drafter_type"] in ONE_STATE
    changes = CHANGES | ({} if reads_last else {"taps": [1]})
    head = random_head(kind, pair.model, mx.array(D2T), **changes)
    for part in head.network.get("heads", [head.network]):
        part.lm_head.weight = 3 * part.lm_head.weight  # of some opinion
    if "markov" in head.network:
        head.network.markov.w2.weight = 12 * head.network.markov.w2.weight
    pair.drafter, pair.target = head, Target(pair.model, head.taps)
    return pair


@pytest.mark.parametrize("generations", GENERATIONS)
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("kind", SAMPLED)
def test_sampled_text_has_the_targets_distribution(kind, name, generations):
    pair = sampled_pair(kind)
    counts, acceptance = pair.sample(generations, **LOOPS[name])
    assert p_value(counts, pair.joint(sampling_of(LOOPS[name]))) > LEAST_P
    assert 0 < acceptance < 1


def test_slots_drawn_apart_but_tested_as_joint_fail(monkeypatch):
    """Each slot drawn without the bias of the token before, yet reported with it."""
    pair = sampled_pair("dspark")
    markov = pair.drafter.network.markov
    markov.w2.weight = 4 * markov.w2.weight

    def propose(self, k, cache, chooser=None):
        if k == 0:
            return self._nothing()
        rows = self._spread(self._head(self._fill(k, cache)))
        tokens, reported, before = [], [], cache.seed
        for slot in range(k):
            token, _ = chooser.draft(rows[slot : slot + 1], tokens)
            bias, _ = self.network.markov(before, rows, None)
            biased = rows[slot : slot + 1] + self._spread(bias)
            reported.append(chooser.draft(biased, tokens)[1])
            tokens.append(token)
            before = token
        return Draft(mx.concatenate(tokens), mx.concatenate(reported))

    monkeypatch.setattr(DSparkDrafter, "propose", propose)
    counts, _ = pair.sample(400, temp=0.9)
    assert p_value(counts, pair.joint(sampling_of({"temp": 0.9}))) < CERTAINLY_WRONG


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_block_draft_obeys_processors(kind):
    """Tokens that a processor forbids are not drafted, in whatever slot."""
    model = tiny_llama()
    head = random_head(kind, model)
    allowed = [3, 11, 40]

    def only(tokens, logits):
        mask = mx.full(logits.shape, -mx.inf)
        mask[:, mx.array(allowed)] = 0
        return logits + mask

    only.stateless = True
    accepted = 0
    for temp in (0, 0.8):
        responses = list(
            stream_generate(
                model,
                NoText(),
                [5, 6, 7],
                24,
                drafter=head,
                num_draft_tokens=4,
                logits_processors=[only],
                temp=temp,
                seed=1,
            )
        )
        assert {r.token for r in responses} <= set(allowed)
        accepted += sum(responses[-1].statistics.accepted)
    assert accepted > 0  # a third is right by chance
