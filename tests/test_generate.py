"""The Python API on the embedded pair: equal to mlx-lm, from threads and interleaved."""

import json
from functools import cache
from itertools import zip_longest
from pathlib import Path
from threading import Thread

import mlx.core as mx
import mlx_lm
import pytest

from backend import ON_GPU, assert_same_tokens
from mlx_drift import DriftError, generate, load_demo, stream_generate
from mlx_drift.demo import CHAINS
from tiny import NoText, plain_greedy, tiny_llama

ROOT = Path(__file__).parent.parent
HELD_OUT_FILE = ROOT / "examples" / "train_demo_pair" / "heldout.jsonl"
HELD_OUT = [json.loads(line) for line in HELD_OUT_FILE.read_text().splitlines()]
PROMPTS = 20


@pytest.fixture(scope="module", params=CHAINS)
def pair(request):
    return load_demo(request.param)


@pytest.fixture(scope="module")
def normalized():
    return load_demo()


def prompt_of(index: int, tokenizer) -> list[int]:
    """Prompts of both splits in turn: unseen wordings and unseen symbols."""
    splits = [[r for r in HELD_OUT if r["split"] == split] for split in ("wording", "symbol")]
    in_turn = [record for both in zip(*splits, strict=False) for record in both]
    return tokenizer.apply_chat_template(in_turn[index]["messages"], add_generation_prompt=True)


@pytest.fixture(scope="module")
def plain(normalized):
    """What mlx-lm answers to a held-out prompt, computed once: one response a token."""
    model, tokenizer, _ = normalized

    @cache
    def answer(index: int, max_tokens: int):
        prompt = prompt_of(index, tokenizer)
        return list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens))

    return answer


def assert_equals_mlx_lm(pair, plain, prompts, k, max_tokens):
    model, tokenizer, drafter = pair
    for index in prompts:
        prompt, expected = prompt_of(index, tokenizer), plain(index, max_tokens)
        ours = list(
            stream_generate(
                model, tokenizer, prompt, max_tokens, drafter=drafter, num_draft_tokens=k
            )
        )
        assert_same_tokens(model, prompt, [r.token for r in ours], [r.token for r in expected])
        if not ON_GPU:
            assert "".join(r.text for r in ours) == "".join(r.text for r in expected)
            assert ours[-1].finish_reason == expected[-1].finish_reason
            for a, b in zip(ours, expected, strict=True):
                assert mx.array_equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("k", [1, 4])
def test_equals_mlx_lm(pair, plain, k):
    assert_equals_mlx_lm(pair, plain, range(4), k, max_tokens=32)


@pytest.mark.long
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_equals_mlx_lm_on_the_whole_grid(pair, plain, k):
    assert_equals_mlx_lm(pair, plain, range(PROMPTS), k, max_tokens=128)


def test_there_are_enough_prompts_of_both_splits():
    for split in ("wording", "symbol"):
        assert sum(record["split"] == split for record in HELD_OUT) >= PROMPTS // 2


def test_from_worker_threads(normalized, plain):
    model, tokenizer, drafter = normalized
    prompts = [prompt_of(i, tokenizer) for i in range(3)]
    expected = ["".join(r.text for r in plain(i, 24)) for i in range(3)]
    got = {}

    def work(index):
        got[index] = generate(model, tokenizer, prompts[index], drafter=drafter, max_tokens=24)

    threads = [Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(len(prompts))] == expected


def test_interleaved_conversations(normalized, plain):
    model, tokenizer, drafter = normalized
    prompts = [prompt_of(i, tokenizer) for i in range(2)]

    def stream(prompt):
        return stream_generate(model, tokenizer, prompt, 24, drafter=drafter)

    expected = [[r.token for r in plain(i, 24)] for i in range(2)]
    interleaved = list(zip_longest(*map(stream, prompts)))
    got = [[r[i].token for r in interleaved if r[i] is not None] for i in range(2)]
    assert got == expected


def test_one_generator_driven_from_several_threads(normalized, plain):
    """A web server's thread pool asks for each next token from whichever thread is free."""
    model, tokenizer, drafter = normalized
    stream = stream_generate(model, tokenizer, prompt_of(0, tokenizer), 24, drafter=drafter)
    responses = []

    def advance():
        responses.append(next(stream, None))

    while not responses or responses[-1] is not None:
        thread = Thread(target=advance)
        thread.start()
        thread.join()
    assert [r.token for r in responses[:-1]] == [r.token for r in plain(0, 24)]
    assert mx.isfinite(responses[-2].logprobs[0]).item()


def test_a_drafter_of_another_model(normalized):
    model, tokenizer, _ = normalized
    _, _, other = load_demo()
    with pytest.raises(DriftError, match="loaded for another model"):
        generate(model, tokenizer, "x", drafter=other)


def test_verbose_prints_the_text_and_the_speed(normalized, capsys):
    model, tokenizer, drafter = normalized
    text = generate(model, tokenizer, "def quote", drafter=drafter, max_tokens=8, verbose=True)
    printed = capsys.readouterr().out
    assert printed.startswith(text)
    assert "tokens-per-sec" in printed


def test_drafts_are_accepted(pair):
    """Both drafters were trained for this target: well over one draft a round."""
    model, tokenizer, drafter = pair
    accepted = rounds = 0
    for index in range(4):
        prompt = prompt_of(index, tokenizer)
        *_, last = stream_generate(
            model, tokenizer, prompt, 32, drafter=drafter, num_draft_tokens=4
        )
        accepted += sum(last.statistics.accepted)
        rounds += last.statistics.rounds
    assert accepted / rounds > 1.0


def test_responses_are_mlx_lms_and_more(normalized):
    model, tokenizer, drafter = normalized
    prompt = prompt_of(0, tokenizer)
    responses = list(
        stream_generate(model, tokenizer, prompt, 20, drafter=drafter, compare_plain=True)
    )
    last = responses[-1]
    assert last.prompt_tokens == len(prompt)
    assert [r.generation_tokens for r in responses] == list(range(1, len(responses) + 1))
    assert any(r.from_draft for r in responses)
    assert not all(r.from_draft for r in responses)
    assert all(r.finish_reason is None for r in responses[:-1])
    assert last.statistics.rounds < len(responses)
    assert last.statistics.plain_step_seconds > 0
    assert last.prompt_tps > 0
    assert last.generation_tps > 0


def test_without_a_drafter_mlx_lm_generates(normalized):
    model, tokenizer, _ = normalized
    prompt = prompt_of(1, tokenizer)
    assert generate(model, tokenizer, prompt, max_tokens=12, prefill_step_size=8) == (
        mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    )


@pytest.mark.parametrize("k", [None, 2, "auto"])
def test_a_draft_model_of_mlx_lms_own_loop_takes_any_number_of_drafts(k):
    model, small = tiny_llama(), tiny_llama(bits=4)
    options = {"draft_model": small, "max_tokens": 6, "num_draft_tokens": k}
    tokens = [r.token for r in stream_generate(model, NoText(), [1, 2, 3], **options)]
    assert tokens == plain_greedy(model, [1, 2, 3], 6)


def test_prompt_in_chunks_and_progress(normalized):
    model, tokenizer, drafter = normalized
    prompt = prompt_of(0, tokenizer)
    expected = generate(model, tokenizer, prompt, drafter=drafter, max_tokens=16)
    calls = []
    got = generate(
        model,
        tokenizer,
        prompt,
        drafter=drafter,
        max_tokens=16,
        prefill_step_size=5,
        prompt_progress_callback=lambda done, total: calls.append((done, total)),
    )
    assert got == expected
    assert calls[0] == (0, len(prompt))
    assert calls[-1] == (len(prompt), len(prompt))
    assert len(calls) > 2


def test_text_prompts_are_encoded_as_mlx_lm_does(normalized):
    model, tokenizer, drafter = normalized
    assert generate(model, tokenizer, "def quote", drafter=drafter, max_tokens=8) == (
        mlx_lm.generate(model, tokenizer, "def quote", max_tokens=8)
    )


@pytest.mark.parametrize(
    ("prompt", "keywords", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ("x", {"num_draft_tokens": 0}, "num_draft_tokens is 0; expected 1 to 64"),
        ("x", {"max_tokens": 0}, "max_tokens is 0"),
        ("x", {"draft_model": 1}, "'draft_model' is not supported with a drafter"),
        ("x", {"temp": -1}, "temp is -1; expected from 0"),
    ],
)
def test_refuses(normalized, prompt, keywords, message):
    model, tokenizer, drafter = normalized
    with pytest.raises(DriftError, match=message):
        generate(model, tokenizer, prompt, drafter=drafter, **keywords)
