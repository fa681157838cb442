"""Drafters without a head: a small model, and prompt lookup. The same loop, the same exactness."""

import random

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from demo_text import expected_text
from families import build
from mlx_drift import (
    CopyingDrafter,
    DraftModelDrafter,
    DriftError,
    PromptLookupDrafter,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    stream_generate,
)
from mlx_drift.demo import QUESTION, TARGET
from tiny import VOCAB, NoText, plain_greedy, tiny_drafter, tiny_llama

PROMPT = [5, 9, 2, 44, 17, 3, 60]


def noisy(model, scale):
    mx.random.seed(1)
    model.update(tree_map(lambda a: a + scale * mx.random.normal(a.shape), model.parameters()))
    mx.eval(model.parameters())
    return model


def say(model, drafter, prompt, count=24, **keywords):
    responses = list(
        stream_generate(
            model, NoText(), prompt, count, drafter=drafter, num_draft_tokens=4, **keywords
        )
    )
    return [r.token for r in responses], responses[-1].statistics


@pytest.mark.parametrize(
    "family", ["llama", "gpt_oss", "qwen3_next", pytest.param("falcon_h1", marks=pytest.mark.long)]
)
def test_a_draft_model_of_any_cache_kind(family):
    """Its chain is taken back from windows past the wrap and from recurrent states, too."""
    model, draft = (tiny_llama() if family == "llama" else build(family) for _ in range(2))
    drafter = DraftModelDrafter(noisy(draft, 0.003), model)
    for prompt in ([7], PROMPT, PROMPT * 10):
        tokens, statistics = say(model, drafter, prompt)
        assert tokens == plain_greedy(model, prompt, 24)
        assert statistics.acceptance_length > 0.5


def test_a_perfect_draft_model_is_always_right():
    """So its rows are those of the conversation, the first token's among them."""
    model = tiny_llama()
    _, statistics = say(model, DraftModelDrafter(tiny_llama(), model), PROMPT, 25)
    assert statistics.acceptance_length == 4
    _, sampled = say(model, DraftModelDrafter(tiny_llama(), model), PROMPT, 25, temp=1.0, seed=0)
    assert sampled.acceptance_length > 3.5  # but for rounding


@pytest.mark.parametrize("vocab_size", [VOCAB - 8, VOCAB + 8])
def test_vocabularies_may_be_padded_differently(vocab_size):
    model = tiny_llama()
    drafter = DraftModelDrafter(tiny_llama(vocab_size=vocab_size), model)
    for temp in (0.0, 0.7):
        tokens, _ = say(model, drafter, [1, 2, 3], temp=temp, seed=1)
        assert all(token < VOCAB for token in tokens)


def test_prompt_lookup_finds_what_followed():
    drafter = PromptLookupDrafter(tiny_llama())
    cache = drafter.make_cache()
    drafter.start(mx.array([1]), cache)
    drafter.ingest(mx.array([2, 3, 9, 4, 2, 3, 7, 8, 1, 2, 3]), mx.zeros((11, 0, 32)), cache)
    assert drafter.propose(2, cache).tokens.tolist() == [9, 4]  # after 1 2 3, not the later 2 3
    drafter.ingest(mx.array([5]), mx.zeros((1, 0, 32)), cache)
    assert drafter.propose(3, cache).tokens.size == 0
    assert cache.rewind(3)
    assert cache.tokens == [1, 2, 3, 9]
    assert not cache.rewind(4)


@pytest.mark.parametrize("kind", ["prompt lookup", "draft model", "head and copies"])
def test_turns_and_files(kind, tmp_path):
    model = tiny_llama()
    drafter = {
        "prompt lookup": lambda: PromptLookupDrafter(model),
        "draft model": lambda: DraftModelDrafter(noisy(tiny_llama(), 0.01), model),
        "head and copies": lambda: CopyingDrafter(tiny_drafter(model)),
    }[kind]()
    cache = make_prompt_cache(model, drafter)
    rng = random.Random(0)
    history = list(PROMPT)
    for turn in range(6):
        history = [*history[: len(history) - 5 * (turn == 3)], rng.randrange(VOCAB)]
        tokens, _ = say(model, drafter, history, 12, prompt_cache=cache)
        assert tokens == plain_greedy(model, history, 12)
        history += tokens
        save_prompt_cache(tmp_path / "cache", cache)
        cache = load_prompt_cache(tmp_path / "cache", model, drafter)
        assert cache.tokens == history


def test_sampling_through_a_lookup_is_reproducible():
    model = tiny_llama()
    drafter = PromptLookupDrafter(model)
    first, again, other = (say(model, drafter, PROMPT * 4, temp=0.8, seed=s)[0] for s in (1, 1, 2))
    assert first == again != other


def test_on_the_command_line(cli, refuses):
    for flags in (("--drafter", "prompt-lookup"), ("--draft-model", TARGET)):
        code, out, _ = cli("generate", QUESTION, "-m", 16, *flags)
        assert (code, out) == (0, expected_text(16) + "\n")
    refuses("give one of them", "generate", "--draft-model", TARGET, "--drafter", "eagle3")
    refuses("for trained heads", "generate", "--draft-model", TARGET, "--drafter-bits", 4)
    refuses("for trained heads", "generate", "--draft-model", TARGET, "--drafter-window", 4)


def test_a_draft_model_that_cannot_go_back_is_refused():
    with pytest.raises(DriftError, match="the draft model: the target"):
        DraftModelDrafter(build("plamo3"), tiny_llama())
