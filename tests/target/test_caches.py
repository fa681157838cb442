"""Caches that take rows back: against mlx-lm's own, and as if the rows had never been fed."""

import random

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import RotatingKVCache

from mlx_drift.target.rewind import Caches
from mlx_drift.target.sliding import STEP, SlidingKVCache

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


def test_a_snapshot_stays_as_it_is_whatever_is_fed_after_it_was_restored():
    def alike(count, value):
        return mx.full((1, 1, count, 4), value, mx.float32)

    caches = Caches([SlidingKVCache(WINDOW)])
    caches[0].update_and_fetch(alike(5, 1), alike(5, 1))
    snapshot = caches.snapshot()
    for count in (STEP, 1):  # until the first ones are gone
        caches[0].update_and_fetch(alike(count, 2), alike(count, 2))
    assert not caches.can_rewind(5)
    assert caches.restore(snapshot, 5)
    assert caches.rewind(3)
    caches[0].update_and_fetch(alike(1, 3), alike(1, 3))  # in place
    assert all(mx.array_equal(array, alike(5, 1)) for array in snapshot[0].values())
