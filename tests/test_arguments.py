"""What Python programs pass: every make of prompt and number, and refusals of what is neither."""

import re
import subprocess
import sys
import time
from collections import UserDict
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.sample_utils import make_sampler

from mlx_drift import (
    DraftModelDrafter,
    DriftError,
    PromptLookupDrafter,
    generate,
    load_demo,
    make_prompt_cache,
    stream_generate,
)
from mlx_drift.arguments import (
    check_vocabulary,
    real_number,
    takes_numbers,
    token_ids,
    whole_number,
    without_defaults,
)
from tiny import VOCAB, NoText, tiny_drafter, tiny_llama

IDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def pair():
    model = tiny_llama()
    return model, NoText(), tiny_drafter(model)


def spoken(pair, prompt, **keywords):
    model, tokenizer, drafter = pair
    keywords = {"max_tokens": 6, "drafter": drafter} | keywords
    return [r.token for r in stream_generate(model, tokenizer, prompt, **keywords)]


def refusal(pair, prompt=IDS, **keywords):
    """The one line that something is refused with."""
    with pytest.raises(ValueError, match=r".") as refused:
        spoken(pair, prompt, **keywords)
    assert type(refused.value) is DriftError
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


PROMPTS = {
    "tuple": tuple(IDS),
    "range": range(1, 6),
    "a batch of one": [IDS],
    "tuples": (tuple(IDS),),
    "numpy": np.array(IDS),
    "numpy, int8": np.array(IDS, np.int8),
    "numpy, uint64": np.array(IDS, np.uint64),
    "numpy, big-endian": np.array(IDS, ">i4"),
    "numpy, a batch of one": np.array([IDS]),
    "numpy, not contiguous": np.array(IDS * 2)[::2],
    "numpy numbers": [np.int64(i) for i in IDS],
    "mlx": mx.array(IDS),
    "mlx, uint8": mx.array(IDS, mx.uint8),
    "mlx, a batch of one": mx.array([IDS]),
    "mlx numbers": list(mx.array(IDS)),
    "arrays in a list": [np.array(IDS)],
    "a tokenizer's result": UserDict(input_ids=IDS, attention_mask=[1] * 5),
    "a tokenizer's batch": {"input_ids": np.array([IDS])},
}


@pytest.mark.parametrize("make", PROMPTS)
def test_prompts_of_any_make(pair, make):
    prompt = PROMPTS[make]
    ids = {"range": [1, 2, 3, 4, 5], "numpy, not contiguous": (IDS * 2)[::2]}.get(make, IDS)
    assert token_ids(prompt) == ids
    assert {type(i) for i in token_ids(prompt)} == {int}
    assert spoken(pair, prompt) == spoken(pair, ids)


@pytest.mark.torch
def test_prompts_and_numbers_of_torch(pair):
    import torch

    assert spoken(pair, torch.tensor([IDS])) == spoken(pair, IDS)
    assert spoken(pair, IDS, max_tokens=torch.tensor(3)) == spoken(pair, IDS, max_tokens=3)
    assert real_number("temp", torch.tensor(0.5, dtype=torch.bfloat16)) == 0.5


REFUSED_PROMPTS = [
    (None, "the prompt is None; expected text, or a list of token ids"),
    (7, "the prompt is 7; expected text"),
    (np.int64(7), "the prompt is 7; expected text"),
    (mx.array(7), "the prompt is 7; expected text"),
    (Path("question.txt"), "the prompt is 'question.txt'; expected text"),
    (b"bytes", "the prompt is of type bytes; expected text"),
    ({1, 2}, "the prompt is of type set; expected text"),
    ({"ids": [1]}, "the prompt is of type dict; expected text"),
    ([IDS, IDS], "token 0 of the prompt .* is of type list, the tokens of several texts"),
    (np.array([IDS, IDS]), "token 0 of the prompt .* is of type list, the tokens of several texts"),
    ([1, [2]], "token 1 of the prompt .* is of type list, the tokens of several texts"),
    (
        [{"role": "user", "content": "Hi"}],
        "of type dict, a message: give tokenizer.apply_chat_temp",
    ),
    ([1, 2.5], r"token 1 of the prompt \(counted from 0\) is 2.5, no token id"),
    ([1, 2.0], "token 1 of the prompt .* is 2.0, no token id"),
    (np.array([1.0, 2.0]), "token 0 of the prompt .* is 1.0, no token id"),
    (mx.array([1.0], mx.bfloat16), "token 0 of the prompt .* is 1.0, no token id"),
    ([1, True], "token 1 of the prompt .* is True, no token id"),
    (np.array([True]), "token 0 of the prompt .* is True, no token id"),
    ([1, None], "token 1 of the prompt .* is None, no token id"),
    ([1, "a"], "token 1 of the prompt .* is 'a', no token id"),
    ([1, VOCAB], rf"token 1 .* is {VOCAB}: outside the model's vocabulary; expected 0 to 63"),
    ([1, -1], "token 1 of the prompt .* is -1: outside the model's vocabulary"),
    ([10**6, 1], "token 0 of the prompt .* is 1000000: outside"),
    ([1, 1 << 63], "token 1 of the prompt .* is 9223372036854775808: outside"),
    ([1, 10**5000], "token 1 of the prompt .* is an unspeakable int: outside"),
    (np.array([1, 2**64 - 1], np.uint64), "token 1 of the prompt .* is 18446744073709551615: out"),
    ([], "the prompt is empty"),
    ([[]], "the prompt is empty"),
    ((), "the prompt is empty"),
    (np.array([]), "the prompt is empty"),
    (mx.array([]), "the prompt is empty"),
    ({"input_ids": []}, "the prompt is empty"),
]


@pytest.mark.parametrize(("prompt", "message"), REFUSED_PROMPTS)
@pytest.mark.parametrize("way", ["drafter", "no drafter"])
def test_refused_prompts(pair, prompt, message, way):
    said = refusal(pair, prompt, **({} if way == "drafter" else {"drafter": None}))
    assert re.search(message, said), said


def test_every_way_in_checks_the_vocabulary(pair):
    model, tokenizer, drafter = pair
    outside = [1, VOCAB + 5]
    ways = [
        partial(generate, drafter=drafter),
        partial(generate, drafter=drafter, prompt_cache=make_prompt_cache(model, drafter)),
        partial(generate, drafter=DraftModelDrafter(tiny_llama(), model)),
        partial(generate, drafter=PromptLookupDrafter(model)),
        generate,
        partial(generate, draft_model=tiny_llama()),
    ]
    for way in ways:
        with pytest.raises(DriftError, match=f"token 1 .* is {VOCAB + 5}: outside"):
            way(model, tokenizer, outside, max_tokens=3)
    with pytest.raises(DriftError, match=r"token 0 of xtc_special_tokens .* is 900: outside"):
        generate(model, tokenizer, IDS, drafter=drafter, xtc_special_tokens=[900])


def test_a_draft_model_of_fewer_ids():
    """A padded target has ids that the draft model lacks; mlx-lm feeds both the same prompt."""
    model, small = tiny_llama(vocab_size=VOCAB + 8), tiny_llama()
    prompt = [1, 2, VOCAB + 7, 3, VOCAB + 1]
    drafter = DraftModelDrafter(small, model)
    with_drafts = spoken((model, NoText(), drafter), prompt, max_tokens=20)
    assert with_drafts == spoken((model, NoText(), None), prompt, max_tokens=20)
    with pytest.raises(DriftError, match=f"token 2 .* is {VOCAB + 7}: outside"):
        generate(model, NoText(), prompt, max_tokens=3, draft_model=small)


NUMBERS = {
    "temp": 0.7,
    "top_p": 0.9,
    "min_p": 0.05,
    "min_tokens_to_keep": 2,
    "top_k": 9,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "max_tokens": 5,
    "num_draft_tokens": 2,
    "tree": 4,
    "seed": 11,
    "max_kv_size": 40,
    "kv_bits": 8,
    "kv_group_size": 32,
    "quantized_kv_start": 3,
    "prefill_step_size": 2,
}
MAKES = {
    "numpy": np.array,
    "numpy scalar": lambda value: np.float32(value) if value < 1 else np.int64(value),
    "mlx": mx.array,
    "float": float,
    "fraction": Fraction,
}


def test_every_number_is_tried():
    annotated = signature(stream_generate).parameters.values()
    kinds = int, float, int | None, int | Literal["auto"], int | Literal["auto"] | None
    assert {p.name for p in annotated if p.annotation in kinds} == NUMBERS.keys()


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_any_make(make, name):
    model = tiny_llama(num_attention_heads=1, num_key_value_heads=1)
    pair = model, NoText(), tiny_drafter(model)
    keywords = {"temp": 0.6, "seed": 3} | {name: NUMBERS[name]}
    if name.startswith(("kv_", "quantized")):
        keywords = {"kv_bits": 8, "kv_group_size": 32} | keywords
    expected = spoken(pair, IDS, **keywords)
    assert spoken(pair, IDS, **keywords | {name: MAKES[make](NUMBERS[name])}) == expected


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", ["many", "3", True, np.bool_(1), [3], np.array([3]), Decimal("0.5"), 1j, b"3"]
)
def test_what_is_no_number(pair, name, value):
    said = refusal(pair, **{name: value})
    assert said.startswith(f"{name} is ")
    assert "number" in said


def test_what_numbers_may_be_instead(pair):
    for name in ("seed", "max_kv_size", "kv_bits"):
        assert spoken(pair, IDS, **{name: None}) == spoken(pair, IDS)
        assert "a whole number or None" in refusal(pair, **{name: "x"})
    assert "a whole number or None or auto" in refusal(pair, num_draft_tokens="Auto")
    assert refusal(pair, max_tokens=2.5) == "max_tokens is 2.5; expected a whole number"
    assert refusal(pair, max_tokens=None) == "max_tokens is None; expected a whole number"
    assert "max_tokens is nan" in refusal(pair, max_tokens=float("nan"))
    assert "max_tokens is inf" in refusal(pair, max_tokens=np.float32("inf"))
    assert "temp is nan" in refusal(pair, temp=float("nan"))


def test_takes_numbers_leaves_the_rest_alone():
    @takes_numbers
    def function(a: int, *, flag: bool = True, names: tuple[str, ...] = (), **rest: object):
        """Says what it was given."""
        return a, flag, names, rest

    assert function(np.int8(3), flag=False, names=("x",), b=np.int8(4)) == (
        (3, False, ("x",), {"b": np.int8(4)})
    )
    assert function.__doc__ == "Says what it was given."
    with pytest.raises(TypeError, match="missing a required argument: 'a'"):
        function()


def test_keywords_at_mlx_lms_own_default_are_none(pair):
    """Every keyword of mlx-lm's at the value that its signatures give it."""
    model, _, drafter = pair
    for function in (generate_step, mlx_lm.stream_generate):
        defaults = {
            p.name: p.default
            for p in signature(function).parameters.values()
            if p.default is not p.empty and p.name not in ("max_tokens", "prefill_step_size")
        }
        assert {"input_embeddings", "max_kv_size"} & defaults.keys() or "stream" in defaults
        for one in (drafter, None):
            assert spoken(pair, IDS, drafter=one, **defaults) == spoken(pair, IDS, drafter=one)
    assert without_defaults({"stream": generation_stream, "draft_model": None}) == {}
    assert "'input_embeddings' is not supported" in refusal(pair, input_embeddings=mx.zeros((1, 1)))
    assert "'draft_model' is not supported" in refusal(pair, draft_model=model)
    assert "'colour' is not supported with a drafter" in refusal(pair, colour="red")


def test_what_was_not_loaded(pair, tmp_path):
    model, tokenizer, drafter = pair
    assert "drafter is 'some/folder'; expected a drafter: drafter = load_drafter(path, model)" in (
        refusal(pair, drafter="some/folder")
    )
    assert "load_drafter(path, model)" in refusal(pair, drafter=tmp_path)
    assert "DraftModelDrafter(it, model)" in refusal(pair, drafter=tiny_llama())
    for wrong in ("owner/name", tmp_path, None, (model, tokenizer)):
        assert "the model is" in refusal((wrong, tokenizer, drafter))
        assert "the tokenizer is" in refusal((model, wrong, drafter))
    assert "load_prompt_cache(path, model, drafter)" in refusal(pair, prompt_cache="cache.st")
    assert "load_prompt_cache(path, model, drafter)" in refusal(pair, prompt_cache=tmp_path)
    assert "logits_processors is of type function; expected a list of functions" in (
        refusal(pair, logits_processors=lambda tokens, logits: logits)
    )
    assert "logits_processors is of type list" in refusal(pair, logits_processors=[3])
    assert "sampler is 0.7; expected a function" in refusal(pair, sampler=0.7)
    assert spoken(pair, IDS, sampler=make_sampler(0.0), logits_processors=()) == spoken(pair, IDS)


anything = st.one_of(
    st.integers(),
    st.integers(-5, VOCAB + 5),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=2),
    st.sampled_from([np.int64(3), np.uint64(2**64 - 1), np.float16(1), np.bool_(1)]),
)
prompts = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), max_size=6),
    st.lists(st.integers(), max_size=4),
    st.recursive(anything, lambda inner: st.lists(inner, max_size=4), max_leaves=8),
    st_numpy.arrays(
        st.one_of(
            st_numpy.integer_dtypes(endianness="?"),
            st_numpy.unsigned_integer_dtypes(endianness="?"),
            st_numpy.floating_dtypes(endianness="?"),
            st_numpy.boolean_dtypes(),
            st_numpy.complex_number_dtypes(),
            st_numpy.datetime64_dtypes(),
            st_numpy.byte_string_dtypes(),
            st_numpy.unicode_string_dtypes(),
        ),
        st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
)


def fuzz(examples):
    """Gives every way in fuzzed prompts: an answer, or a line."""
    model = tiny_llama()
    drafter = tiny_drafter(model)
    draft_model = DraftModelDrafter(tiny_llama(), model)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(prompts, st.sampled_from([drafter, draft_model, PromptLookupDrafter(model), None]))
    def check(prompt, way):
        if isinstance(prompt, str):
            return  # text, which NoText cannot encode
        tokens = []
        with suppress(DriftError):
            tokens = spoken((model, NoText(), way), prompt, max_tokens=3)
        if tokens:
            assert all(0 <= i < VOCAB for i in token_ids(prompt))
            assert len(tokens) == 3

    check()


def child(code):
    """Runs code in a process of its own, which may die."""
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_fuzzed_prompts_end_no_process():
    assert "done" in child("import test_arguments; test_arguments.fuzz(100); print('done')")


@pytest.mark.long
def test_many_fuzzed_prompts_end_no_process():
    assert "done" in child("import test_arguments; test_arguments.fuzz(500); print('done')")


def test_the_check_is_cheap():
    """A prompt of a hundred thousand tokens is not walked through in Python."""
    ids = [i % VOCAB for i in range(100_000)]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        check_vocabulary(token_ids(ids), VOCAB)
        seconds.append(time.perf_counter() - start)
    walked = time.perf_counter()
    for i in ids:
        whole_number("id", i)
    assert min(seconds) < (time.perf_counter() - walked) / 3


def test_texts_and_chats_of_a_real_tokenizer():
    model, tokenizer, drafter = load_demo()
    messages = [{"role": "user", "content": "Hi"}]
    chat = partial(tokenizer.apply_chat_template, messages, add_generation_prompt=True)
    ids = chat()
    batch = chat(return_dict=True)
    assert token_ids(batch) == token_ids(ids)
    say = partial(generate, model, tokenizer, drafter=drafter, max_tokens=5)
    assert say(batch) == say(ids) == say(np.array(ids))
    assert say(tokenizer.decode(ids)) == say(tokenizer.encode(tokenizer.decode(ids)))
