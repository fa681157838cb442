"""Exactness on every mlx-lm model file that can be built small.

A share of the families runs by default, all of them under `-m long`. `families` builds them and
says what is left out; what the package refuses is listed here with the words it uses.

In float32 the text is mlx-lm's, token for token, in every family. In 4 bits and bfloat16 it is
where rows are alike, which is probed, not listed; elsewhere up to near-ties.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear

from backend import ON_GPU, assert_same_tokens, rows_are_alike
from families import BUILT, CONFIGS, LEFT_OUT, MISSING, REFUSED, build
from mlx_drift.decode.speculate import every, prefill, speculate
from mlx_drift.errors import DriftError
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.model import Target
from mlx_drift.target.taps import remove_taps
from tiny import Oracle, Scripted, plain_greedy

ALWAYS = """
    llama gpt_oss gemma3_text cohere2 qwen3_next qwen3_5 qwen3_5_moe nemotron_h falcon_h1
    granitemoehybrid lfm2 kimi_linear mamba2 llama4 deepseek_v3 baichuan_m1
""".split()
SHARE = [family for i, family in enumerate(BUILT) if family in ALWAYS or i % 10 == 0]
COARSE_SHARE = """
    gemma3_text gpt_oss qwen3_next lfm2 mamba2 llama4 deepseek_v32 baichuan_m1
""".split()
COARSE = [family for i, family in enumerate(BUILT) if family in COARSE_SHARE or i % 3 == 0]
PROMPT = [5, 9, 2, 44, 17, 3, 60, 11, 25]
LENGTH = 96


class AnyWidth(Oracle):
    """An oracle for targets of any hidden size, which does not keep the taps."""

    def ingest(self, tokens, taps, cache):
        cache.tokens += tokens.tolist()


def families(share, among=BUILT):
    """Families, those that are not in the share marked long."""
    long = pytest.mark.long
    return [family if family in share else pytest.param(family, marks=long) for family in among]


def taps_of(model):
    last = Target(model).shape.num_layers
    return sorted({0, 1, last // 2, last, last + 1})


def spoken(target, text, k, advance=next):
    """What is generated past the prompt, through every count of accepted drafts.

    With k = 0, rounds and stretches of plain decoding take turns.
    """
    rng = random.Random(k)
    spoil = [set(), {0}] + [{i for i in range(8) if rng.random() < 0.3} for _ in range(20)]
    drafter = AnyWidth(text, spoil, target.taps)
    prompt, caches = mx.array(PROMPT), (target.make_cache(), drafter.make_cache())
    for _ in prefill(target, drafter, prompt, *caches, cut=every(4)):
        pass
    rounds = speculate(
        target,
        drafter,
        mx.array(PROMPT[-1:]),
        *caches,
        num_draft_tokens=k or Scripted([0, 0, 2, 2, 0, 3, 3]),
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


@pytest.mark.parametrize("k", [0, 3])
def test_any_thread_may_ask_for_the_next_round(k):
    model = build("qwen3_next")
    text = PROMPT + plain_greedy(model, PROMPT, LENGTH + 8)
    target = Target(model, taps_of(model))
    assert spoken(target, text, k, in_a_thread) == text[len(PROMPT) : len(PROMPT) + LENGTH]


def alike(target):
    """Whether blocks of rows, as they are verified, equal the single rows of mlx-lm."""
    return rows_are_alike(target, target.make_cache(), TargetCache(make_prompt_cache(target.model)))


def coarse(family):
    """A family in bfloat16, or in 4 bits if it has experts, and what is a near-tie then.

    Rounded to bfloat16, rows that are not alike are sent to other experts; and MLX's CPU gathers
    experts in float32 only.

    Returns:
        The model, and the share of the largest logit by which a token that is chosen may be behind.
        In bfloat16 that is two steps of such a logit; in float32 what rows differ by at most.
    """
    model = build(family)
    if any(isinstance(part, SwitchLinear) for part in model.modules()):
        return build(family, bits=4), 1e-4
    return build(family, mx.bfloat16), 2 * mx.finfo(mx.bfloat16).eps


def test_every_model_file_is_accounted_for():
    print(f"{len(CONFIGS.keys() - LEFT_OUT.keys())} families are built; left out:")
    for family, why in LEFT_OUT.items():
        print(f"  {family}: {why}")
    assert MISSING == []
    assert len(BUILT) >= 100


@pytest.mark.parametrize("family", families(SHARE))
def test_greedy_output_is_the_targets_own(family):
    model = build(family)
    text = PROMPT + plain_greedy(model, PROMPT, LENGTH + 8)
    target = Target(model, taps_of(model))
    for k in (0, 1, 2, 4):
        assert spoken(target, text, k) == text[len(PROMPT) : len(PROMPT) + LENGTH], k


@pytest.mark.parametrize("family", families(COARSE_SHARE, COARSE))
def test_greedy_output_is_the_targets_own_in_bfloat16_or_4_bits(family):
    model, share = coarse(family)
    text = PROMPT + plain_greedy(model, PROMPT, LENGTH + 8)
    target = Target(model, taps_of(model))
    same, logits = alike(target), model(mx.array([text]), cache=make_prompt_cache(model))
    near_tie = share * mx.abs(logits).max().item()
    for k in (1, 2, 4):
        tokens = spoken(target, text, k)
        assert len(tokens) == LENGTH
        expected = text[len(PROMPT) : len(PROMPT) + LENGTH]
        assert_same_tokens(model, PROMPT, tokens, expected, near_tie, same)


@pytest.mark.skipif(ON_GPU, reason="a GPU picks other kernels for other numbers of rows")
@pytest.mark.parametrize(
    ("family", "expected"),
    [("qwen3", True), ("lfm2", True), ("gemma3_text", False), ("mamba2", False)],
)
def test_the_probe_tells_whether_rows_are_alike(family, expected):
    assert alike(Target(build(family), (1,))) is expected


@pytest.mark.long
def test_rows_of_most_families_are_alike():
    same = [family for family in BUILT if alike(Target(build(family), (1,)))]
    print("alike:", *same)
    print("not alike:", *(family for family in BUILT if family not in same))
    assert ON_GPU or 2 * len(same) > len(BUILT)


@pytest.mark.parametrize("family", families(SHARE))
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
