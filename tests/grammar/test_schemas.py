"""Answers under JSON schemas: valid, and greedily those of plain decoding under the same schema.

Twelve schemas on the embedded pair, four on SmolLM2-135M-Instruct, greedily and at a temperature,
with one draft a round and with four. Each schema is tried once by default; the rest is `long`.
"""

import itertools
from functools import cache

import pytest

import real
from backend import ON_GPU
from mlx_drift import PromptLookupDrafter, Statistics, load, load_demo, stream_generate
from schemas import SCHEMAS, assert_valid, grammar_of

COUNT = 40
GRID = list(itertools.product(SCHEMAS, (0.0, 0.8), (1, 4)))
SAMPLE = {GRID[4 * i + i % 4] for i in range(len(SCHEMAS))}
REAL_NAMES = "object", "enum", "anyOf", "map"
REAL = [*itertools.product(REAL_NAMES, (0.0, 0.8), (1, 4))]


@cache
def pair():
    return load_demo()


@cache
def real_pair():
    model, tokenizer = load(str(real.folder()))
    return model, tokenizer, PromptLookupDrafter(model)


def answer(pair, name, count, **keywords):
    model, tokenizer, _ = pair
    question = [{"role": "user", "content": "Describe Bob as JSON."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    grammar = grammar_of(name)
    return list(stream_generate(model, tokenizer, prompt, count, grammar=grammar, **keywords))


@cache
def plain(pair, name, count):
    return [response.token for response in answer(pair(), name, count)]


@cache
def drafted(pair, name, temp, k, count):
    drafter = pair()[2]
    return answer(pair(), name, count, temp=temp, seed=7, drafter=drafter, num_draft_tokens=k)


def assert_holds(pair, name, temp, k, count):
    said = drafted(pair, name, temp, k, count)
    text = "".join(response.text for response in said)
    assert_valid(SCHEMAS[name], pair()[1], text, said[-1].finish_reason)
    if not temp and not ON_GPU:
        assert [response.token for response in said] == plain(pair, name, count)


@pytest.mark.parametrize(
    ("name", "temp", "k"),
    [pytest.param(*c, marks=() if c in SAMPLE else pytest.mark.long) for c in GRID],
)
def test_answers_of_the_embedded_pair(name, temp, k):
    assert_holds(pair, name, temp, k, COUNT)


def marked(cases, is_sample):
    """Minutes on a real model: a sample is enough but for who asks for all."""
    one, whole = (pytest.mark.real,), (pytest.mark.real, pytest.mark.long)
    return [pytest.param(*case, marks=one if is_sample(case) else whole) for case in cases]


@pytest.mark.parametrize(
    ("name", "temp", "k"), marked(REAL, lambda case: case in (("object", 0.0, 4), ("map", 0.8, 1)))
)
def test_answers_of_smollm2(name, temp, k):
    assert_holds(real_pair, name, temp, k, 64)


@pytest.mark.parametrize(
    ("temp", "k"),
    marked(itertools.product((0.0, 0.8), (1, 4)), lambda case: case == (0.0, 1)),
)
def test_what_is_forced_spares_smollm2_rounds(temp, k):
    total = Statistics()
    for name in REAL_NAMES:
        total.add(drafted(real_pair, name, temp, k, 64)[-1].statistics)
    assert total.tokens_per_round >= 1.3
    assert total.sources["forced"]["share"] > 0.1
