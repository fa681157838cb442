"""Forks of a conversation: both branches say what fresh caches say, whatever the caches are."""

import copy
import random
from threading import Thread

import mlx.core as mx
import pytest
from test_prompt_cache import FAMILIES, edited, question, say

from families import build
from mlx_drift import DraftModelDrafter, make_prompt_cache, save_prompt_cache, stream_generate
from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from tiny import VOCAB, NoText, Scripted, tiny_drafter, tiny_llama


def prompt_of(rng, length=12):
    return [rng.randrange(VOCAB) for _ in range(length)]


def branches(model, drafter, cache, rng):
    """Goes on in a cache and its fork in turns, and checks every answer against a fresh cache's."""
    both = [cache, cache.fork()]
    histories = [list(cache.tokens), list(cache.tokens)]
    for turn in range(3):
        for which in (0, 1) if turn % 2 else (1, 0):
            history = histories[which]
            if turn == 2:  # back behind the fork, where the one branch must not see the other's
                history = edited(rng, history)
            prompt = history + question(rng)
            tokens, _ = say(model, drafter, prompt, both[which])
            assert tokens == say(model, drafter, prompt)[0]
            histories[which] = prompt + tokens
    assert [one.tokens for one in both] == histories


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [12, pytest.param(300, marks=pytest.mark.long)])
def test_both_branches_say_what_fresh_caches_say(family, length):
    model = tiny_llama() if family == "llama" else build(family)
    drafter = tiny_drafter(model)
    rng = random.Random(family)
    cache = make_prompt_cache(model, drafter)
    say(model, drafter, prompt_of(rng, length), cache)
    branches(model, drafter, cache, rng)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 30},
        {"max_kv_size": 16},
    ],
)
def test_caches_with_options(options):
    model = build("qwen3")
    drafter = tiny_drafter(model)
    rng = random.Random(1)
    cache = make_prompt_cache(model, drafter, **options)
    say(model, drafter, prompt_of(rng), cache)
    fork, tokens = cache.fork(), list(cache.tokens)
    for one in (fork, cache):
        prompt, fresh = tokens + question(rng), make_prompt_cache(model, drafter, **options)
        say(model, drafter, tokens[:12], fresh)
        assert fresh.tokens == tokens
        assert say(model, drafter, prompt, one)[0] == say(model, drafter, prompt, fresh)[0]


@pytest.mark.parametrize("kind", ["draft model", "recurrent draft model", "prompt lookup"])
def test_drafters_that_keep_a_state_of_their_own(kind):
    model = tiny_llama()
    drafter = {
        "draft model": lambda: DraftModelDrafter(tiny_llama(), model),
        "recurrent draft model": lambda: DraftModelDrafter(build("qwen3_next"), model),
        "prompt lookup": lambda: PromptLookupDrafter(model),
    }[kind]()
    rng = random.Random(kind)
    cache = make_prompt_cache(model, drafter)
    say(model, drafter, prompt_of(rng), cache)
    branches(model, drafter, cache, rng)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("script", [[2], [0], [3, 0, 0, 0]])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_answer_under_way_goes_on_and_in_the_fork_it_ended(family, script, after):
    model = tiny_llama() if family == "llama" else build(family)
    drafter = tiny_drafter(model)
    rng = random.Random(after)
    prompt = prompt_of(rng)
    whole = say(model, drafter, prompt)[0]
    cache = make_prompt_cache(model, drafter)
    cache.draft_length = Scripted(script)
    answer = stream_generate(
        model,
        NoText(),
        prompt,
        len(whole),
        drafter=drafter,
        prompt_cache=cache,
        num_draft_tokens="auto",
    )
    spoken = [next(answer).token for _ in range(after)]
    fork = cache.fork()
    fork.draft_length = None
    assert not fork.is_ahead
    assert fork.tokens[: len(prompt) + after] == prompt + spoken
    branched = fork.tokens + question(rng)
    tokens, statistics = say(model, drafter, branched, fork)
    assert (statistics.reuse, tokens) == ("extended", say(model, drafter, branched)[0])
    assert spoken + [response.token for response in answer] == whole
    after_all = cache.tokens + question(rng)
    assert say(model, drafter, after_all, cache)[0] == say(model, drafter, after_all)[0]


def test_copies_are_forks_made_anywhere():
    """`copy` and `copy.deepcopy`, in a thread that is gone afterwards."""
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    cache.draft_length = DraftLength()
    say(model, drafter, [1, 2, 3], cache)
    forks = []
    for by in (copy.copy, copy.deepcopy):
        thread = Thread(target=lambda by=by: forks.append(by(cache)))
        thread.start()
        thread.join()
    for number, fork in enumerate(forks):
        assert fork.model is model
        assert fork.drafter is drafter
        assert fork.draft_length is not cache.draft_length
        prompt = [*fork.tokens, number]
        tokens, statistics = say(model, drafter, prompt, fork)
        assert (tokens, statistics.reuse) == (say(model, drafter, prompt)[0], "extended")


def test_a_fork_takes_no_memory_until_one_of_the_two_is_fed():
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    prompt = [i % VOCAB for i in range(2000)]
    say(model, drafter, prompt, cache, count=2)
    mx.synchronize()
    before, forks = mx.get_active_memory(), [cache.fork() for _ in range(5)]
    assert mx.get_active_memory() - before < cache.nbytes / 20
    prompt = [*cache.tokens, 5]
    say(model, drafter, prompt, forks[0], count=2)
    assert mx.get_active_memory() - before < 1.5 * cache.nbytes


def test_a_fork_is_saved_as_its_cache(tmp_path):
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    say(model, drafter, [1, 2, 3], cache)
    for name, one in (("a", cache), ("b", cache.fork())):
        save_prompt_cache(tmp_path / name, one)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
