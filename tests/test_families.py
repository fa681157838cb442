"""Exactness on every mlx-lm model file that can be built small.

A share of the families runs by default, all of them under `-m long`. `families` builds them and
says what is left out; what the package refuses is listed here with the words it uses.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

from families import CONFIGS, LEFT_OUT, MISSING, build
from mlx_drift.decode.speculate import prefill, speculate
from mlx_drift.errors import DriftError
from mlx_drift.target import Target, remove_taps
from tiny import Oracle, plain_greedy

REFUSED = {
    "deepseek_v41": "keeps its state in LayerCache",
    "gemma3n": "does not hand a plain hidden state",  # four streams
    "iquestloopcoder": "does not hand a plain hidden state",  # its layers run twice
    "kimi_k3": "hands its recurrent layers a",
    "longcat_flash_ngram": "has no embedding and layers side by side",
    "nanbeige": "does not hand a plain hidden state",  # its layers run twice
    "nanochat": "has no final norm",
    "phixtral": "has no embedding and layers side by side",
    "plamo3": "cannot be verified exactly",
    "talkie": "has no final norm",
}
BUILT = [family for family in CONFIGS if family not in LEFT_OUT and family not in REFUSED]
ALWAYS = """
    llama gpt_oss gemma3_text cohere2 qwen3_next qwen3_5 qwen3_5_moe nemotron_h falcon_h1
    granitemoehybrid lfm2 kimi_linear mamba2 llama4 deepseek_v3 baichuan_m1
""".split()
SHARE = [family for i, family in enumerate(BUILT) if family in ALWAYS or i % 10 == 0]
REST = [pytest.param(family, marks=pytest.mark.long) for family in BUILT if family not in SHARE]
PROMPT = [5, 9, 2, 44, 17, 3, 60, 11, 25]
LENGTH = 96


class AnyWidth(Oracle):
    """An oracle for targets of any hidden size, which does not keep the taps."""

    def ingest(self, tokens, taps, cache):
        cache.tokens += tokens.tolist()


def taps_of(model):
    last = Target(model).shape.num_layers
    return sorted({0, 1, last // 2, last, last + 1})


def spoken(target, text, k, advance=next):
    """What is generated past the prompt, through every count of accepted drafts."""
    rng = random.Random(k)
    spoil = [set(), {0}] + [{i for i in range(8) if rng.random() < 0.3} for _ in range(20)]
    drafter = AnyWidth(text, spoil, target.taps)
    prompt, caches = mx.array(PROMPT), (target.make_cache(), drafter.make_cache())
    prefill(target, drafter, prompt, *caches, step_size=4, progress=lambda done, total: None)
    rounds = speculate(
        target,
        drafter,
        mx.array(PROMPT[-1:]),
        *caches,
        num_draft_tokens=k,
        max_tokens=LENGTH,
        stop_tokens=frozenset(),
    )
    tokens = []
    while (round := advance(rounds, None)) is not None:
        tokens += round.tokens
    return tokens


def in_a_thread(rounds, end):
    """Asks for the next round in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(next, rounds, end).result()


def test_any_thread_may_ask_for_the_next_round():
    model = build("qwen3_next")
    text = PROMPT + plain_greedy(model, PROMPT, LENGTH + 8)
    target = Target(model, taps_of(model))
    assert spoken(target, text, 3, in_a_thread) == text[len(PROMPT) : len(PROMPT) + LENGTH]


def test_every_model_file_is_accounted_for():
    print(f"{len(CONFIGS.keys() - LEFT_OUT.keys())} families are built; left out:")
    for family, why in LEFT_OUT.items():
        print(f"  {family}: {why}")
    assert MISSING == []
    assert len(BUILT) >= 100


@pytest.mark.parametrize("family", [*SHARE, *REST])
def test_greedy_output_is_the_targets_own(family):
    model = build(family)
    text = PROMPT + plain_greedy(model, PROMPT, LENGTH + 8)
    target = Target(model, taps_of(model))
    for k in (1, 2, 4):
        assert spoken(target, text, k) == text[len(PROMPT) : len(PROMPT) + LENGTH], k


@pytest.mark.parametrize("family", [*SHARE, *REST])
def test_capture_leaves_the_logits_alone(family):
    model = build(family)
    target = Target(model, taps_of(model))
    during, taps = target.verify(mx.array(PROMPT), target.make_cache())
    after = model(mx.array([PROMPT]), cache=target.make_cache())
    remove_taps(model)
    plain = model(mx.array([PROMPT]), cache=target.make_cache())
    assert mx.array_equal(during[None], plain)
    assert mx.array_equal(after, plain)
    assert taps.shape == (len(PROMPT), len(target.taps), target.shape.hidden_size)


@pytest.mark.parametrize("family", sorted(REFUSED.keys() - LEFT_OUT.keys()))
def test_what_is_not_exact_is_refused_by_name(family):
    model = build(family)
    with pytest.raises(DriftError) as refused:
        spoken(Target(model, taps_of(model)), PROMPT + [1] * 8, 2)
    assert REFUSED[family] in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
