"""Tap capture and rollback on an mlx-lm model."""

from threading import Thread

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, RotatingKVCache, make_prompt_cache

from backend import assert_same, assert_same_rows
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.target.taps import remove_taps
from tiny import HIDDEN, LAYERS, tiny_llama

ALL_TAPS = tuple(range(LAYERS + 2))
TOKENS = mx.array([5, 9, 2, 44, 17, 3])


def states_by_hand(model, tokens):
    """[embedding, out_0 … out_{n−1}, final norm], each [L, H]."""
    hidden = model.model.embed_tokens(tokens[None])
    states = [hidden]
    for layer in model.model.layers:
        hidden = layer(hidden, "causal")
        states.append(hidden)
    return [state[0] for state in [*states, model.model.norm(hidden)]]


def test_taps_are_the_states_by_hand():
    model = tiny_llama()
    expected = states_by_hand(model, TOKENS)
    target = Target(model, ALL_TAPS)
    _, taps = target(TOKENS, target.make_cache())
    assert taps.shape == (TOKENS.size, LAYERS + 2, HIDDEN)
    for tap in ALL_TAPS:
        assert_same(taps[:, tap], expected[tap])


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_logits_keep_every_bit(dtype, bits):
    model = tiny_llama(dtype, bits)
    before = model(TOKENS[None], cache=make_prompt_cache(model))
    target = Target(model, ALL_TAPS)
    during, _ = target(TOKENS, target.make_cache())
    assert mx.array_equal(before[0], during)
    assert mx.array_equal(before, model(TOKENS[None], cache=make_prompt_cache(model)))


def test_taps_are_removable():
    model = tiny_llama()
    classes = [type(module) for module in model.modules()]
    Target(model, (0, 1, 2))
    Target(model, (1, LAYERS + 1))
    assert [type(module) for module in model.modules()] != classes
    remove_taps(model)
    assert [type(module) for module in model.modules()] == classes


def test_tapping_again_adds_nothing():
    model = tiny_llama()
    Target(model, (1, 2))
    classes = [type(module) for module in model.modules()]
    Target(model, (2, 1))
    assert [type(module) for module in model.modules()] == classes


def test_threads_sharing_a_model_see_their_own_taps():
    model = tiny_llama()
    prompts = [mx.array([i, i + 1, i + 2]) for i in range(8)]
    expected = [states_by_hand(model, prompt)[2] for prompt in prompts]
    target, got = Target(model, (2,)), {}

    def work(index):
        for _ in range(5):
            got[index] = target(prompts[index], target.make_cache())[1][:, 0]
            mx.eval(got[index])

    threads = [Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mx.array_equal(got[i], expected[i]) for i in range(len(prompts)))


def test_embed_and_head_are_the_models_own():
    for tied in (True, False):
        model = tiny_llama(tie_word_embeddings=tied, bits=4)
        target = Target(model, (LAYERS + 1,))
        logits, taps = target(TOKENS, target.make_cache())
        assert mx.array_equal(target.head(taps[:, 0]), logits)
        assert mx.array_equal(target.embed(TOKENS), model.model.embed_tokens(TOKENS))


def test_rollback_is_exact():
    target = Target(tiny_llama(), (1,))
    cache, reference = target.make_cache(), target.make_cache()
    target(TOKENS, reference)
    target(TOKENS, cache)
    for rows in (1, 3, 5):
        target.verify(mx.array([7] * rows), cache)
        target.rollback(cache, rows)
    assert_same_rows(cache, reference)


def test_refuses_a_cache_that_cannot_roll_back():
    model = tiny_llama()

    class Batched(type(model)):
        def make_cache(self):
            return [RotatingKVCache(8), BatchKVCache([0])] * 2

    model.__class__ = Batched
    target = Target(model, (1,))
    with pytest.raises(DriftError, match=r"llama.*keeps its state in BatchKVCache,"):
        target.make_cache()


def test_works_in_a_thread_that_did_not_load_it():
    """mlx-lm leaves scaled RoPE tables lazy, bound to the loading thread's stream."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    target = Target(tiny_llama(rope_scaling=scaling), (1,))
    failures = []

    def work():
        try:
            mx.eval(target(TOKENS, target.make_cache()))
        except RuntimeError as error:
            failures.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_refuses_layers_that_hand_on_something_else():
    model = tiny_llama()

    class Fused(type(model.model)):
        def __call__(self, inputs, cache=None, input_embeddings=None):
            return self.norm(self.embed_tokens(inputs))  # the layers are never called

    model.model.__class__ = Fused
    target = Target(model, (2,))
    with pytest.raises(DriftError, match="does not hand a plain hidden state"):
        target(TOKENS, target.make_cache())


def test_refuses_a_model_laid_out_otherwise():
    model = tiny_llama()
    model.model.lookup = model.model.pop("embed_tokens")
    with pytest.raises(DriftError, match="'llama' has no embedding and layers side by side"):
        Target(model, (1,))
