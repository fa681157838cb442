"""`max_kv_size` and `kv_bits` with a drafter: mlx-lm's own tokens, or a refusal by name."""

import random

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from test_families import AnyWidth

from families import build
from mlx_drift import DriftError, DriftWarning, make_prompt_cache
from mlx_drift.decode.speculate import every, prefill, speculate
from mlx_drift.target.caches import KVQuantization
from mlx_drift.target.model import Target
from tiny import Scripted, plain_greedy, tiny_drafter, tiny_llama

PROMPT = [5, 9, 2, 44, 17, 3, 60, 11, 25]
LENGTH = 64


def long(value):
    return pytest.param(value, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def model():
    return build("qwen3")  # makes no caches of its own, has heads of 32 values


def same_as_mlx_lm(model, prompt, k, *, max_kv_size=None, quantization=None, step_size=2048):
    """Asserts that what is generated through an oracle is what mlx-lm generates alone.

    With k = 0, rounds and stretches of plain decoding take turns.
    """
    q = quantization
    kv_bits = {} if q is None else {"kv_bits": q.bits, "kv_group_size": q.group_size}
    options = kv_bits if q is None else kv_bits | {"quantized_kv_start": q.start}
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=LENGTH + 8,
        max_kv_size=max_kv_size,
        prefill_step_size=step_size,
        **options,
    )
    text = prompt + [int(token) for token, _ in steps]
    rng = random.Random(k)
    spoil = [set(), {0}] + [{i for i in range(8) if rng.random() < 0.3} for _ in range(20)]
    target = Target(model, (1, 2))
    drafter = AnyWidth(text, spoil, target.taps)
    cache = target.make_cache(max_kv_size=max_kv_size, quantization=q)
    caches = cache, drafter.make_cache()
    tokens = mx.array(prompt)
    for _ in prefill(target, drafter, tokens, *caches, cut=every(step_size)):
        pass
    rounds = speculate(
        target,
        drafter,
        tokens[-1:],
        *caches,
        num_draft_tokens=k or Scripted([0, 0, 2, 2, 0, 3, 3]),
        max_tokens=LENGTH,
        stop_tokens=frozenset(),
    )
    spoken = [token for round in rounds for token in round.tokens]
    assert spoken == text[len(prompt) :][:LENGTH]
    return cache


@pytest.mark.parametrize("size", [8, long(16), 32])
@pytest.mark.parametrize("k", [0, 1, long(3), 5])
@pytest.mark.parametrize("times", [1, 4])
def test_a_bounded_cache_with_sinks_says_what_mlx_lm_says(model, size, k, times):
    cache = same_as_mlx_lm(model, PROMPT * times, k, max_kv_size=size, step_size=16)
    assert all(one.sinks == 4 and one.window == size for one in cache)


@pytest.mark.parametrize("start", [0, 1, len(PROMPT), 20, 50])
@pytest.mark.parametrize("bits", [4, long(8)])
@pytest.mark.parametrize("k", [0, long(1), long(2), 4])
def test_quantized_keys_and_values_say_what_mlx_lm_says(model, start, bits, k):
    quantization = KVQuantization(bits, 32, start)
    cache = same_as_mlx_lm(model, PROMPT, k, quantization=quantization)
    assert all(isinstance(one, QuantizedKVCache) for one in cache)


@pytest.mark.parametrize("start", [0, 12, 30])
def test_prompts_are_quantized_between_mlx_lms_chunks(model, start):
    quantization = KVQuantization(4, 32, start)
    same_as_mlx_lm(model, PROMPT * 3, 3, quantization=quantization, step_size=10)


@pytest.mark.parametrize("family", ["qwen3_next", long("nemotron_h"), "llama4", long("glm4")])
def test_quantizes_what_mlx_lm_quantizes(family):
    same_as_mlx_lm(build(family), PROMPT, 3, quantization=KVQuantization(8, 32, 20))


def test_no_round_straddles_the_start(model, monkeypatch):
    """A block in which later rows would see quantized keys if they came one by one."""
    blocks, verify = [], Target.verify

    def noted(self, tokens, cache, *tree):
        blocks.append((cache[0].offset, tokens.size))
        return verify(self, tokens, cache, *tree)

    monkeypatch.setattr(Target, "verify", noted)
    same_as_mlx_lm(model, PROMPT, 4, quantization=KVQuantization(8, 32, 20))
    assert all(first >= 20 or first + rows <= 20 for first, rows in blocks)
    assert any(first < 20 for first, _ in blocks)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt_oss", "keeps a sliding window of keys and values (RotatingKVCache)"),
        ("gemma3_text", "keeps a sliding window"),
        ("mamba", "keeps its state in ArraysCache, which mlx-lm does not quantize"),
        ("falcon_h1", "keeps its state in ArraysCache, KVCache, which mlx-lm does not quantize"),
        ("deepseek_v3", "mlx-lm cannot run the target (deepseek_v3) on such keys and values"),
        ("gemma2", "mlx-lm cannot run the target (gemma2)"),
        ("plamo2", "mlx-lm cannot run the target (plamo2)"),
    ],
)
def test_kv_bits_are_refused_by_name(family, message):
    model = build(family)
    with pytest.raises(DriftError) as refused:
        make_prompt_cache(model, tiny_drafter(model), kv_bits=8, kv_group_size=32)
    assert message in str(refused.value)
    assert family in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 8, "kv_group_size": 64}, "cannot run the target (qwen3)"),  # heads of 32
        ({"kv_bits": 7, "kv_group_size": 32}, "kv_bits = 7"),
        ({"kv_bits": 8, "kv_group_size": 0}, "kv_group_size 0"),
        ({"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": -1}, "quantized_kv_start is -1"),
        ({"max_kv_size": 4}, "max_kv_size is 4; expected more than 4"),
        ({"max_kv_size": 64, "kv_bits": 8}, "keeps a sliding window"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(model, options, message):
    with pytest.raises(DriftError, match=message.replace("(", r"\(").replace(")", r"\)")):
        make_prompt_cache(model, tiny_drafter(model), **options)


def test_a_model_that_makes_its_own_caches_keeps_them():
    model = tiny_llama()
    with pytest.warns(DriftWarning, match=r"max_kv_size changes nothing: .*\(llama\)"):
        cache = make_prompt_cache(model, tiny_drafter(model), max_kv_size=16)
    assert all(type(one) is KVCache for one in cache.target_cache)


def test_plain_text_is_left_alone(model):
    """What the options do is seen against this: without them nothing changes."""
    plain = plain_greedy(model, PROMPT, LENGTH)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=LENGTH, max_kv_size=16)
    assert [int(token) for token, _ in steps] != plain


def test_an_empty_cache_is_not_quantized():
    """mlx-lm quantizes after a row: the first one sees plain keys, also when it is fed anew."""
    model = build("qwen3")
    target = Target(model)
    quantization = KVQuantization(4, 32, 0)
    cache, fresh = (target.make_cache(quantization=quantization) for _ in range(2))
    target.verify(mx.array([5]), cache)
    target.rollback(cache, 1)
    again, first = (target.verify(mx.array([9]), one)[0] for one in (cache, fresh))
    assert mx.array_equal(again, first)
