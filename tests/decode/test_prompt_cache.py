"""Prompt caches: the same tokens with and without, no row fed twice, files of the right model."""

import json
import random
from functools import partial
from importlib import import_module

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_prompt_cache
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from families import build
from kinds import KINDS, random_head
from mlx_drift import (
    DraftModelDrafter,
    DriftError,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    stream_generate,
)
from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.target.model import Target
from tiny import VOCAB, NoText, Scripted, tiny_drafter, tiny_llama

ANSWER = 12
TURNS = 10


@pytest.fixture
def fed(monkeypatch):
    """Counts the rows of prompts that the target is fed."""
    rows = []
    call = Target.__call__

    def counted(self, tokens, cache):
        rows.append(tokens.size)
        return call(self, tokens, cache)

    monkeypatch.setattr(Target, "__call__", counted)
    return rows


def say(model, drafter, prompt, cache=None, count=ANSWER, **keywords):
    """Generates, with a prompt cache or without: tokens and statistics."""
    responses = list(
        stream_generate(
            model, NoText(), prompt, count, drafter=drafter, prompt_cache=cache, **keywords
        )
    )
    return [r.token for r in responses], responses[-1].statistics


def question(rng):
    return [rng.randrange(VOCAB) for _ in range(rng.randint(3, 9))]


def edited(rng, history):
    """Cuts a history somewhere and changes the last token that stays."""
    at = rng.randrange(2, len(history))
    return [*history[: at - 1], (history[at - 1] + 1) % VOCAB]


FAMILIES = [
    "llama",
    "gpt_oss",
    "qwen3_next",
    pytest.param("llama4", marks=pytest.mark.long),
    pytest.param("falcon_h1", marks=pytest.mark.long),
    pytest.param("gemma3_text", marks=pytest.mark.long),
    pytest.param("nemotron_h", marks=pytest.mark.long),
    pytest.param("lfm2", marks=pytest.mark.long),
    pytest.param("kimi_linear", marks=pytest.mark.long),
    pytest.param("rwkv7", marks=pytest.mark.long),
    pytest.param("baichuan_m1", marks=pytest.mark.long),
    pytest.param("deepseek_v32", marks=pytest.mark.long),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_turns_with_branches_say_the_same_with_and_without(family, fed):
    model = tiny_llama() if family == "llama" else build(family)
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    rng = random.Random(family)
    history, ways = [], set()
    for turn in range(TURNS):
        if turn in (3, 6):  # edit an earlier message
            history = edited(rng, history)
        # Once, ask for another answer: the prompt as it was.
        prompt = history[:-ANSWER] if turn == 8 else history + question(rng)
        seen = list(cache.tokens)
        fed.clear()
        tokens, statistics = say(model, drafter, prompt, cache)
        assert sum(fed) == statistics.prompt_tokens - 1  # the last is the first round's
        if statistics.reuse == "extended":
            assert statistics.prompt_tokens == len(prompt) - len(seen) + 1
        assert statistics.prompt_tokens + statistics.reused_tokens == len(prompt)
        assert tokens == say(model, drafter, prompt)[0]
        ways.add(statistics.reuse)
        history = prompt + tokens
        assert cache.tokens == history
    assert "extended" in ways
    assert ways & {"trimmed", "snapshot"}


def test_a_branch_is_trimmed_where_it_can_be(fed):
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    tokens, statistics = say(model, drafter, prompt, cache)
    assert statistics.reuse == "nothing"
    fed.clear()
    _, statistics = say(model, drafter, [*prompt, *tokens[:5], 60, 61], cache)
    assert statistics.reuse == "trimmed"
    # The last token of the common prefix is fed again: its tap belongs to the next drafter row.
    assert sum(fed) == 2
    assert statistics.reused_tokens == len(prompt) + 4


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_seed_draws_the_same_from_a_prompt_that_is_held_whole(family):
    """What is drawn depends on the drafts, so the first round must have its own as well."""
    model = tiny_llama() if family == "llama" else build(family)
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    drawing = {"temp": 0.8, "top_p": 0.9, "seed": 7}
    expected, _ = say(model, drafter, prompt, **drawing)
    ways = []
    for _ in range(3):
        tokens, statistics = say(model, drafter, prompt, cache, **drawing)
        assert tokens == expected
        ways.append(statistics.reuse)
    assert ways == ["nothing", *[{"llama": "trimmed"}.get(family, "snapshot")] * 2]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_drafter_goes_on_and_back(kind):
    model = tiny_llama()
    drafter = random_head(kind, model)
    cache = make_prompt_cache(model, drafter)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    drawing = {"temp": 0.8, "seed": 7}
    expected, _ = say(model, drafter, prompt, **drawing)
    ways = []
    for _ in range(2):
        tokens, statistics = say(model, drafter, prompt, cache, **drawing)
        assert tokens == expected
        ways.append(statistics.reuse)
    follow = [*prompt, *tokens, 5]
    tokens, statistics = say(model, drafter, follow, cache)
    assert tokens == say(model, drafter, follow)[0]
    assert [*ways, statistics.reuse] == ["nothing", "trimmed", "extended"]


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss"])
def test_what_cannot_be_trimmed_goes_back_to_a_turn(family, fed):
    model = build(family)
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter, max_snapshots=2)
    rng = random.Random(0)
    first = [rng.randrange(VOCAB) for _ in range(300)]  # past what a window's buffer holds
    second = [*first, *say(model, drafter, first, cache)[0], 7, 8, 9]
    answer = say(model, drafter, second, cache)[0]
    other = [*second, (answer[0] + 1) % VOCAB, 5]  # another answer to the second question
    tokens, statistics = say(model, drafter, other, cache)
    assert statistics.reuse in ("snapshot", "trimmed")
    assert statistics.reused_tokens == len(second) - 1
    assert tokens == say(model, drafter, other)[0]
    early = [*first[:50], 1, 2, 3]
    tokens, statistics = say(model, drafter, early, cache)
    assert statistics.reuse == "started over"
    assert statistics.reused_tokens == 0
    assert tokens == say(model, drafter, early)[0]


def test_snapshots_are_bounded_and_counted():
    model = build("qwen3_next")
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter, max_snapshots=3)
    history, sizes = [1, 2], []
    for turn in range(6):
        history = [*history, turn, *say(model, drafter, [*history, turn], cache)[0]]
        sizes.append(cache.nbytes)
        assert len(cache._snapshots) <= 3
    assert sizes[1] > sizes[0]
    assert sizes[-1] == sizes[-2]  # all within the first 256 rows, and no further snapshot


def test_interrupted_anywhere_it_goes_on_with_what_is_whole(monkeypatch):
    """A prompt or a round that stops in the middle costs time, never a wrong token."""
    for family in ("llama", "qwen3_next"):
        model = tiny_llama() if family == "llama" else build(family)
        drafter = tiny_drafter(model)
        cache = make_prompt_cache(model, drafter)
        rng = random.Random(1)
        history = [rng.randrange(VOCAB) for _ in range(20)]
        for _ in range(5):
            left, verify = rng.randint(0, 8), Target.verify
            for name in ("__call__", "verify"):
                inner = getattr(Target, name)

                def counting(self, *arguments, inner=inner):
                    nonlocal left
                    left -= 1
                    result = inner(self, *arguments)
                    if left < 0:
                        raise KeyboardInterrupt
                    return result

                monkeypatch.setattr(Target, name, counting)
            with pytest.raises(KeyboardInterrupt):
                say(model, drafter, history, cache, prefill_step_size=4, count=40)
            monkeypatch.undo()
            assert Target.verify is verify
            assert not cache.whole
            with pytest.raises(DriftError, match="interrupted"):
                save_prompt_cache("nowhere.safetensors", cache)
            prompt = [*history[: rng.randint(1, len(history))], rng.randrange(VOCAB)]
            assert say(model, drafter, prompt, cache)[0] == say(model, drafter, prompt)[0]
            history = cache.tokens


def test_an_abandoned_answer_leaves_the_cache_whole():
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    responses = stream_generate(
        model, NoText(), [1, 2, 3], drafter=drafter, prompt_cache=cache, num_draft_tokens=4
    )
    spoken = [next(responses).token for _ in range(5)]
    responses.close()
    assert cache.whole
    assert cache.tokens[3:8] == spoken
    prompt = [1, 2, 3, *spoken, 9]
    assert say(model, drafter, prompt, cache)[0] == say(model, drafter, prompt)[0]


def test_an_end_that_fails_half_way_leaves_it_interrupted(monkeypatch, tmp_path):
    model = tiny_llama()
    drafter = tiny_drafter(model)
    module = import_module("mlx_drift.generate")  # the package has a function of that name
    monkeypatch.setattr(module, "DraftLength", lambda fixed: Scripted([0]))
    cache = make_prompt_cache(model, drafter)
    responses = stream_generate(model, NoText(), [1, 2, 3], drafter=drafter, prompt_cache=cache)
    spoken = [next(responses).token]
    assert cache.is_ahead

    def refuse(self, *arguments):
        raise MemoryError

    monkeypatch.setattr(type(drafter), "ingest", refuse)
    with pytest.raises(MemoryError):
        cache.finish()
    monkeypatch.undo()
    assert not cache.whole
    assert not cache.is_ahead
    with pytest.raises(DriftError, match="interrupted"):
        save_prompt_cache(tmp_path / "cache.safetensors", cache)
    prompt = [1, 2, 3, *spoken, 9]
    assert say(model, drafter, prompt, cache)[0] == say(model, drafter, prompt)[0]
    save_prompt_cache(tmp_path / "cache.safetensors", cache)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 300])
def test_a_file_brings_it_all_back(family, length, tmp_path):
    model = tiny_llama() if family == "llama" else build(family)
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    rng = random.Random(length)
    prompt = [rng.randrange(VOCAB) for _ in range(length)]
    history = [*prompt, *say(model, drafter, prompt, cache)[0]]
    file = tmp_path / "deep" / "cache.safetensors"
    save_prompt_cache(file, cache)
    loaded = load_prompt_cache(file, model, drafter)
    assert loaded.tokens == cache.tokens == history
    for owner in ("target_cache", "drafter_cache"):
        ours, theirs = (getattr(one, owner).to_arrays() for one in (cache, loaded))
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    prompt = [*history, 5, 6]
    tokens, statistics = say(model, drafter, prompt, loaded)
    assert tokens == say(model, drafter, prompt, cache)[0]
    assert (statistics.reuse, statistics.prompt_tokens) == ("extended", 3)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_keeps_its_quantization(tmp_path):
    model = tiny_llama(num_attention_heads=1, num_key_value_heads=1)
    drafter = tiny_drafter(model)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 10}
    for prompt in ([1, 2, 3], list(range(30))):  # before the start with 3 more, and past it
        cache = make_prompt_cache(model, drafter, **options)
        say(model, drafter, prompt, cache, count=3)
        save_prompt_cache(tmp_path / "cache", cache)
        loaded = load_prompt_cache(tmp_path / "cache", model, drafter)
        assert loaded.quantization == cache.quantization
        history = [*cache.tokens, 7]
        assert say(model, drafter, history, loaded)[0] == say(model, drafter, history, cache)[0]


@pytest.mark.parametrize("length", [10, 40, 300])
def test_a_file_keeps_sinks(length, tmp_path):
    model = build("qwen3")  # which makes no caches of its own
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter, max_kv_size=16)
    prompt = [i % VOCAB for i in range(length)]
    say(model, drafter, prompt, cache)
    save_prompt_cache(tmp_path / "cache", cache)
    loaded = load_prompt_cache(tmp_path / "cache", model, drafter)
    history = [*cache.tokens, 7]
    assert say(model, drafter, history, loaded)[0] == say(model, drafter, history, cache)[0]


@pytest.mark.parametrize("length", [0, 1])
def test_a_file_of_hardly_anything(length, tmp_path):
    model = tiny_llama()
    for drafter in (tiny_drafter(model), DraftModelDrafter(tiny_llama(), model)):
        cache = make_prompt_cache(model, drafter)
        if length:
            cache.read([5], step_size=8, progress=lambda done, total: None)
        save_prompt_cache(tmp_path / "cache", cache)
        loaded = load_prompt_cache(tmp_path / "cache", model, drafter)
        assert say(model, drafter, [5, 6], loaded)[0] == say(model, drafter, [5, 6])[0]


@pytest.mark.parametrize("make", [make_prompt_cache, partial(load_prompt_cache, "nowhere")])
def test_a_number_of_snapshots_that_makes_no_sense_is_refused(make):
    model = tiny_llama()
    with pytest.raises(DriftError, match="max_snapshots is -1; expected at least 0"):
        make(model, tiny_drafter(model), max_snapshots=-1)


def test_a_branch_at_the_first_token():
    model = build("gpt_oss")
    drafter = DraftModelDrafter(build("gpt_oss"), model)
    cache = make_prompt_cache(model, drafter)
    for prompt in ([5], [5, 60, 61], [5, 9, 9]):
        assert say(model, drafter, prompt, cache)[0] == say(model, drafter, prompt)[0]


def test_an_answer_that_another_prompt_overtook_is_refused():
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    paused = stream_generate(model, NoText(), [1, 2, 3], drafter=drafter, prompt_cache=cache)
    next(paused)
    prompt = [4, 5, 6]
    tokens, _ = say(model, drafter, prompt, cache)
    with pytest.raises(DriftError, match="used for another prompt meanwhile"):
        list(paused)
    prompt = [*prompt, *tokens, 8]
    assert say(model, drafter, prompt, cache)[0] == say(model, drafter, prompt)[0]


@pytest.mark.parametrize("k", [3, 0])
def test_an_answer_whose_cache_was_finished_says_so(k, tmp_path):
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    cache.draft_length = DraftLength(fixed=k)
    keywords = {"drafter": drafter, "prompt_cache": cache, "num_draft_tokens": "auto"}
    paused = stream_generate(model, NoText(), [1, 2, 3], **keywords)
    next(paused)
    cache.finish()
    save_prompt_cache(tmp_path / "whole.safetensors", cache)
    with pytest.raises(DriftError, match="was finished or used"):
        list(paused)


@pytest.mark.parametrize("k", [3, 0])
def test_with_its_last_round_an_answer_is_over(k, tmp_path):
    """Whoever takes the cache then, in whichever thread, finds nothing under way."""
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    cache.draft_length = DraftLength(fixed=k)
    keywords = {"drafter": drafter, "prompt_cache": cache, "num_draft_tokens": "auto"}
    answer = stream_generate(model, NoText(), [1, 2, 3], ANSWER, **keywords)
    tokens = [next(answer).token for _ in range(ANSWER)]
    assert not cache.is_ahead
    cache.finish()
    save_prompt_cache(tmp_path / "whole.safetensors", cache)
    assert list(answer) == []
    follow = [1, 2, 3, *tokens, 8]
    assert say(model, drafter, follow, cache)[0] == say(model, drafter, follow)[0]


@pytest.mark.parametrize("step", [0, -1])
def test_a_step_size_that_makes_no_sense_is_refused(step):
    model = tiny_llama()
    with pytest.raises(DriftError, match=f"prefill_step_size is {step}"):
        say(model, tiny_drafter(model), [1, 2, 3], prefill_step_size=step)


@pytest.fixture
def saved(tmp_path):
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    say(model, drafter, [1, 2, 3], cache)
    file = tmp_path / "cache.safetensors"
    save_prompt_cache(file, cache)
    return file, model, drafter


def refusal(*arguments):
    with pytest.raises(DriftError) as refused:
        load_prompt_cache(*arguments)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def test_a_file_of_another_model_is_refused(saved):
    file, model, _ = saved
    other = tiny_llama()
    other.model.norm.weight = other.model.norm.weight + 1  # a fine-tune of the same shapes
    assert "another target" in refusal(file, other, tiny_drafter(other))
    assert "another drafter" in refusal(file, model, tiny_drafter(model, norm_before_fc=True))
    assert "another drafter" in refusal(file, model, tiny_drafter(model, taps=(2, 3)))


def test_damaged_files_are_refused(saved, tmp_path):
    file, model, drafter = saved
    arrays = load_file(file)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    described = json.loads(metadata["mlx_drift_prompt_cache"])
    bad = tmp_path / "bad.safetensors"

    def written(changes=None, said=None):
        changed = {n: a for n, a in (arrays | (changes or {})).items() if a is not None}
        text = json.dumps(described | (said or {}))
        save_file(changed, bad, {"mlx_drift_prompt_cache": text})
        return refusal(bad, model, drafter)

    keys = "target.0.keys"
    assert "is damaged (0.keys" in written({keys: arrays[keys][:, :, 1:]})
    assert "is damaged (0.keys" in written({keys: arrays[keys][:, 1:]})
    assert "is damaged (0.keys" in written({keys: None})
    assert "is damaged (zero" in written({"target.zero": arrays[keys]})
    assert "outside the vocabulary" in written({"tokens": arrays["tokens"] + VOCAB})
    assert "is damaged" in written({"tokens": arrays["tokens"][1:]})
    assert "is damaged" in written(said={"quantization": {"bits": 4, "none": 3}})
    assert "max_kv_size is 1" in written(said={"max_kv_size": 1})
    assert "is damaged" in written(said={"max_kv_size": "many"})
    assert "another version" in written(said={"version": 99})
    save_file(arrays, bad, {"mlx_drift_prompt_cache": "[" * 100_000})
    assert "is not a prompt cache" in refusal(bad, model, drafter)
    save_file(arrays, bad)
    assert "is not a prompt cache" in refusal(bad, model, drafter)
    bad.write_bytes(file.read_bytes()[:-10])
    assert "cannot be read as safetensors" in refusal(bad, model, drafter)
    assert "No such file" in refusal(tmp_path / "none", model, drafter)


def test_foreign_caches_are_refused_by_name():
    model = tiny_llama()
    drafter = tiny_drafter(model)
    with pytest.raises(DriftError, match=r"mlx-lm's \(KVCache\)"):
        say(model, drafter, [1, 2], mlx_lm_prompt_cache(model))
    with pytest.raises(DriftError, match="another model or drafter"):
        say(model, drafter, [1, 2], make_prompt_cache(model, tiny_drafter(model)))
    with pytest.raises(DriftError, match="made for a drafter"):
        say(model, None, [1, 2], make_prompt_cache(model, drafter))
    with pytest.raises(DriftError, match="max_snapshots is -1"):
        make_prompt_cache(model, drafter, max_snapshots=-1)
