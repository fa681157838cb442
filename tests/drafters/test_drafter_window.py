"""The drafter's own window over long contexts, and the first tokens kept beyond it."""

import random

import mlx.core as mx
import pytest

from mlx_drift import DriftError, stream_generate
from mlx_drift.drafters.cache import ChainCache
from mlx_drift.target.model import Target
from mlx_drift.target.sliding import STEP, SlidingKVCache
from tiny import VOCAB, NoText, plain_greedy, tiny_drafter, tiny_llama

WINDOW, SINKS = 8, 3


def rows(count: int, seed: int) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(seed), 3)
    return [mx.random.normal((1, 2, count, 16), key=key) for key in keys]


def naive(queries, keys, values, first, window, sinks):
    """Attention over all keys, masked by the definition; the queries start at row `first`."""
    i, j = mx.arange(first, first + queries.shape[2])[:, None], mx.arange(keys.shape[2])[None]
    visible = (j <= i) & ((i - j < window) | (j < sinks))
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.25, mask=visible)


@pytest.mark.parametrize("sinks", [0, SINKS])
def test_reads_the_window_and_the_sinks(sinks):
    """Blocks and single rows, some of them taken back, over several buffers."""
    rng = random.Random(0)
    cache = ChainCache(WINDOW, sinks)
    keys = values = mx.zeros((1, 2, 0, 16))
    for seed in range(200):
        queries, k, v = rows(rng.choice([1, 1, 2, 5, 20]), seed)
        first = cache.offset
        keys, values = mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2)
        expected = naive(queries, keys, values, first, WINDOW, sinks)
        assert mx.allclose(cache.attend(queries, k, v, 0.25), expected, atol=1e-5), seed
        back = rng.randrange(min(4, cache.offset))  # of earlier updates, too
        cache.trim(back)
        keys, values = (a[:, :, : a.shape[2] - back] for a in (keys, values))
    assert cache.offset == keys.shape[2] > 2 * STEP


def test_a_target_cache_with_sinks_forgets_what_is_between():
    cache = SlidingKVCache(WINDOW, SINKS)
    _, keys, values = rows(3 * STEP, 0)
    for i in range(3 * STEP):
        k, v = cache.update_and_fetch(keys[:, :, i : i + 1], values[:, :, i : i + 1])
        mask = cache.make_mask(1)
        assert mask is None
        seen = sorted({*range(min(SINKS, i + 1)), *range(max(0, i - WINDOW + SINKS + 1), i + 1)})
        assert mx.array_equal(k, keys[:, :, mx.array(seen)])
        assert mx.array_equal(v, values[:, :, mx.array(seen)])
    assert cache.keys.shape[2] <= WINDOW - 1 + STEP
    assert cache.nbytes == 2 * 4 * 2 * 16 * (cache.keys.shape[2] + SINKS)


def test_the_default_is_the_length_of_the_heads_training():
    model = tiny_llama()
    trained = tiny_drafter(model, max_position_embeddings=40)
    assert (trained.window, trained.sinks) == (40, 1)
    assert [layer.rows.window for layer in trained.make_cache().layers] == [41]
    own = tiny_drafter(model, sliding_window=16, max_position_embeddings=40)
    assert own.sinks == 0
    assert [layer.rows.window for layer in own.make_cache().layers] == [16]
    assert [layer.rows.window for layer in own.windowed(8, 2).make_cache().layers] == [10]
    everything = trained.windowed(None)
    assert not isinstance(everything.make_cache().layers[0].rows, SlidingKVCache)
    assert everything.network is trained.network


def drafts(drafter, tokens, taps):
    cache = drafter.make_cache()
    drafter.ingest(tokens[1:], taps, cache)
    return drafter.propose(4, cache).tokens.tolist(), cache.draft_logits


def test_a_window_matters_past_its_length_alone():
    model = tiny_llama()
    drafter = tiny_drafter(model, max_position_embeddings=40)
    rng = random.Random(0)
    tokens = mx.array([rng.randrange(VOCAB) for _ in range(100)])
    target = Target(model, drafter.taps)
    _, taps = target(tokens[:-1], target.make_cache())
    short, long = (tokens[:30], taps[:29]), (tokens, taps)
    unlimited, kept = drafter.windowed(None), drafter.windowed(40, sinks=60)
    assert drafts(drafter, *short)[0] == drafts(unlimited, *short)[0]
    one, other, whole = (drafts(d, *long)[1] for d in (drafter, unlimited, kept))
    assert not mx.allclose(one, other, atol=1e-4)
    assert mx.allclose(whole, other, atol=1e-5)  # 60 sinks and 40 tokens: all of them


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (4, 0), (4, 2), (1, 0)])
def test_the_text_is_the_targets_whatever_the_drafter_sees(window, sinks):
    model = tiny_llama()
    drafter = tiny_drafter(model).windowed(window, sinks)
    prompt = [5, 9, 2, 44, 17, 3, 60, 11, 25, 8, 30]
    spoken = [r.token for r in stream_generate(model, NoText(), prompt, 24, drafter=drafter)]
    assert spoken == plain_greedy(model, prompt, 24)


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (-3, 0), (8, -1)])
def test_numbers_that_make_no_sense_are_refused(window, sinks):
    drafter = tiny_drafter(tiny_llama())
    with pytest.raises(DriftError, match=f"window is {window} with {sinks} sinks"):
        drafter.windowed(window, sinks)
