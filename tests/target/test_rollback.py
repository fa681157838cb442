"""Rollback: after every round a cache is what it would be had only the committed rows been fed.

The reference is fed the committed rows alone, from the start: those of a round as one block where
rows are alike (`backend.rows_are_alike`), and then all arrays must equal; elsewhere one by one, and
then they must agree within rounding. At the end a fresh cache is fed all of them in one block.
"""

import random

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache

from backend import rows_are_alike
from families import VOCAB, build
from mlx_drift.target.caches import KVQuantization
from mlx_drift.target.model import Target

PROMPT = [3, 1, 4]
ROUNDS, LONGEST = 500, 5
ROUNDING = 1e-4
"""By how much arrays of float32 may differ, in shares of their largest entry or of one.

A state-space model's states reach 1,000 and more, where float32 has steps of 6e-5.
"""

KINDS = {
    "quantized": ("qwen3", {"quantization": KVQuantization(bits=8, group_size=32, start=0)}),
    "windows, and all keys": ("gpt_oss", {}),
    "short convolutions": ("lfm2", {}),
    "Mamba-2 and experts": ("nemotron_h", {}),
}
LONG_KINDS = {
    "all keys": ("qwen3", {}),
    "windows and sinks": ("qwen3", {"max_kv_size": 16}),
    "windows of another model": ("gemma3_text", {}),
    "chunks": ("llama4", {}),
    "latent and index keys": ("deepseek_v32", {}),
    "last keys beside windows": ("baichuan_m1", {}),
    "gated delta rule": ("qwen3_next", {}),
    "Kimi's delta rule and latent keys": ("kimi_linear", {}),
    "RWKV": ("rwkv7", {}),
    "Mamba": ("mamba", {}),
    "Mamba-2 beside attention": ("falcon_h1", {}),
    "Mamba-2 in other layers": ("granitemoehybrid", {}),
}


def visible(cache):
    """What a row that is fed next may see: the offset and arrays of each part."""
    for part in cache.parts():
        if isinstance(part, ArraysCache):
            yield None, part.cache
            continue
        arrays = [array for _, array in tree_flatten(part.keys_and_values())]
        if isinstance(part, ChunkedKVCache):  # which drops older rows when it is fed next
            arrays = [array[..., -part.chunk_size :, :] for array in arrays]
        yield part.offset, arrays


def apart(cache, reference):
    """The largest difference of two caches, in shares of an array's largest entry or of one."""
    shares = []
    for (offset, ours), (expected, theirs) in zip(visible(cache), visible(reference), strict=True):
        assert offset == expected
        for a, b in zip(ours, theirs, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if a.dtype == mx.uint32:  # quantized, four to a word
                a, b = a.view(mx.uint8).astype(mx.float32), b.view(mx.uint8).astype(mx.float32)
            shares.append(mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1))
    return mx.stack(shares).max().item()


def next_tokens(target, cache):
    """The next 8 tokens, greedily."""
    tokens = [mx.array([1])]
    for _ in range(8):
        logits, _ = target.verify(tokens[-1], cache)
        tokens.append(mx.argmax(logits, axis=1))
    return mx.concatenate(tokens).tolist()


@pytest.mark.parametrize(
    ("family", "options"),
    [pytest.param(*kind, id=name) for name, kind in KINDS.items()]
    + [pytest.param(*kind, id=name, marks=pytest.mark.long) for name, kind in LONG_KINDS.items()],
)
def test_a_cache_is_what_the_committed_rows_make_it(family, options):
    target = Target(build(family), (1,))
    alike = rows_are_alike(target, target.make_cache(**options), target.make_cache(**options))
    most, rounding = (LONGEST, 0) if alike else (1, ROUNDING)
    rng = random.Random(0)
    committed = [mx.array(PROMPT)]
    cache, reference, fresh = (target.make_cache(**options) for _ in range(3))
    for one in (cache, reference, fresh):
        target(committed[0], one)
    for round in range(ROUNDS):
        tokens = mx.array(rng.choices(range(VOCAB), k=rng.randint(1, LONGEST)))
        kept = rng.randint(0, tokens.size)
        target.verify(tokens, cache)
        target.rollback(cache, tokens.size - kept)
        committed.append(tokens[:kept])
        for start in range(0, kept, most):
            target.verify(committed[-1][start : start + most], reference)
        assert apart(cache, reference) <= rounding, round
    target.verify(mx.concatenate(committed[1:]), fresh)
    assert apart(cache, fresh) <= rounding
    assert next_tokens(target, cache) == next_tokens(target, fresh)
