"""Caches that take rows back: against mlx-lm's own, and as if the rows had never been fed."""

import random

import mlx.core as mx
import pytest
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import RotatingKVCache

from families import build
from mlx_drift.sliding import STEP, SlidingKVCache
from mlx_drift.target import Target

WINDOW = 8


def rows(count: int, seed: int) -> list[mx.array]:
    """Queries, keys and values of some rows."""
    keys = mx.random.split(mx.random.key(seed), 3)
    return [mx.random.normal((1, 2, count, 16), key=key) for key in keys]


def attend(cache, queries, keys, values):
    mask = cache.make_mask(queries.shape[2], return_array=False)
    keys, values = cache.update_and_fetch(keys, values)
    return scaled_dot_product_attention(queries, keys, values, cache, scale=0.25, mask=mask)


def test_attends_as_mlx_lms_rotating_cache_does():
    ours, theirs = SlidingKVCache(WINDOW), RotatingKVCache(WINDOW)
    for seed, count in enumerate([5, 1, 1, 20, 1, 1, 3, 1] + [1] * 300 + [40, 1]):
        given = rows(count, seed)
        assert mx.allclose(attend(ours, *given), attend(theirs, *given), atol=1e-5), seed
        assert ours.offset == theirs.offset


def test_rows_taken_back_were_never_there():
    rng = random.Random(0)
    cache, reference = SlidingKVCache(WINDOW), SlidingKVCache(WINDOW)
    for seed in range(500):
        count = rng.randint(1, 6)
        kept = rng.randint(0, count)
        given = rows(count, seed)
        attend(cache, *given)
        cache.trim(count - kept)
        if kept:
            attend(reference, *(part[:, :, :kept] for part in given))
        assert cache.offset == reference.offset
        if cache.offset:
            for ours, theirs in zip(
                cache.keys_and_values(), reference.keys_and_values(), strict=True
            ):
                assert mx.array_equal(ours, theirs)


def test_memory_is_bounded_by_the_window_and_one_update():
    cache = SlidingKVCache(WINDOW)
    for seed in range(3 * STEP):
        attend(cache, *rows(1 + seed % 3, seed))
        assert cache.keys.shape[2] <= WINDOW - 1 + STEP
    attend(cache, *rows(2 * STEP, 0))
    assert cache.keys.shape[2] == WINDOW - 1 + 2 * STEP
    attend(cache, *rows(1, 0))
    assert cache.keys.shape[2] == WINDOW - 1 + STEP


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next", "falcon_h1", "lfm2"])
def test_every_state_is_as_if_only_the_committed_rows_had_been_fed(family):
    """After each of 100 random rounds, against a cache that was fed the committed rows alone."""
    rng = random.Random(1)
    target = Target(build(family), (1,))
    cache, reference = target.make_cache(), target.make_cache()
    for _ in range(100):
        count = rng.randint(1, 5)
        kept = rng.randint(0, count)
        tokens = mx.array([rng.randrange(64) for _ in range(count)])
        target.verify(tokens, cache)
        target.rollback(cache, count - kept)
        if kept:
            target.verify(tokens[:kept], reference)
    probe = mx.array([1, 2, 3])
    ours, theirs = (target.verify(probe, one)[0] for one in (cache, reference))
    assert mx.allclose(ours, theirs, atol=1e-4)
