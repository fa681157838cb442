"""Rows that branch, in every mlx-lm model file that can be built small.

A tree's row must have the logits that it has on its own path, bit for bit where blocks of rows have
those of single rows; and after a path is kept the cache is what its rows alone would have made it.
Models whose rows cannot branch are found out by `check_trees`, and refused.
"""

import random

import mlx.core as mx
import pytest

from backend import ON_GPU, assert_same_tokens, rows_are_alike
from families import BUILT, build
from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.decode.speculate import every, prefill, speculate
from mlx_drift.errors import DriftError
from mlx_drift.target.caches import KVQuantization
from mlx_drift.target.model import Target
from mlx_drift.target.taps import remove_taps
from mlx_drift.target.tree import Tree
from mlx_drift.target.tree_check import check_trees
from tiny import plain_greedy, tiny_llama
from trees import TreeOracle, path_to, random_parents

ROUNDING = 1e-4  # of float32, in shares of the largest logit, where rows are not alike
PARENTS = [-1, -1, 0, 0, 1, 2, 4, 5]
KEPT = path_to(PARENTS, 7)
PROMPT = [random.Random(0).randrange(3, 60) for _ in range(40)]  # far past the windows
LENGTH = 60

CANNOT = {
    "gpt2": "off by",  # positions are learned, and looked up by row
    "gpt_bigcode": "off by",
    "llama4": "ChunkedKVCache",
    "minimax_m3_vl": "selects keys by blocks",
    **dict.fromkeys("ministral3 mistral3 mistral4".split(), "scales attention by the number of"),
    **dict.fromkeys("baichuan_m1 falcon_h1".split(), "both keys and values and a recurrent state"),
}
"""Families that verify no trees, and the words they are refused with."""

CAN = [family for family in BUILT if family not in CANNOT]
ALWAYS = """
llama qwen3 gpt_oss gemma3_text cohere2 deepseek_v3 deepseek_v32 nemotron-nas
lfm2 nemotron_h qwen3_next
""".split()
SHARE = [family for i, family in enumerate(CAN) if family in ALWAYS or i % 12 == 0]


def share(families, default):
    long = pytest.mark.long
    return [one if one in default else pytest.param(one, marks=long) for one in families]


def off(ours, theirs):
    return (mx.abs(ours - theirs).max() / mx.abs(theirs).max()).item()


def fed(target, rows=(), **options):
    """A cache after the prompt and more rows, one by one; and the logits of those."""
    cache = target.make_cache(**options)
    target(mx.array(PROMPT), cache)
    logits = [target.verify(mx.array([token]), cache)[0] for token in rows]
    return cache, mx.concatenate(logits) if logits else None


def worst(target, parents, kept, **options):
    """How far the rows of a tree are from those of their own paths, and what follows one kept."""
    rng = random.Random(1)
    tokens = [rng.randrange(3, 60) for _ in range(len(parents) + 1)]
    cache, _ = fed(target, **options)
    logits, taps = target.verify(mx.array(tokens), cache, Tree.of(mx.array(parents)))
    assert taps.shape[0] == len(tokens)
    errors = []
    for row in range(len(tokens)):
        path = path_to(parents, row)
        _, alone = fed(target, [tokens[i] for i in path], **options)
        errors.append(off(logits[row], alone[-1]))
    target.keep(cache, kept)
    reference, _ = fed(target, [tokens[i] for i in kept], **options)
    for token in (7, 11, 13):
        ours, theirs = (target.verify(mx.array([token]), one)[0] for one in (cache, reference))
        errors.append(off(ours, theirs))
    return max(errors)


@pytest.mark.parametrize("family", share(CAN, SHARE))
def test_a_row_is_what_it_is_on_its_own_path(family):
    target = Target(build(family), (1,))
    check_trees(target)
    alike = rows_are_alike(target, target.make_cache(), target.make_cache())
    assert worst(target, PARENTS, KEPT) <= (0 if alike else ROUNDING)


@pytest.mark.long
def test_most_families_verify_trees_bit_for_bit():
    exact, near = [], []
    for family in CAN:
        target = Target(build(family), (1,))
        check_trees(target)
        (near if worst(target, PARENTS, KEPT) else exact).append(family)
    print(f"bit for bit, {len(exact)}:", *exact)
    print(f"within rounding, {len(near)}:", *near)
    print(f"refused, {len(CANNOT)}:", *sorted(CANNOT))
    assert ON_GPU or len(exact) >= 85


@pytest.mark.parametrize(
    "family", share(CANNOT, ["gpt2", "llama4", "minimax_m3_vl", "mistral3", "falcon_h1"])
)
def test_what_cannot_branch_is_refused_by_name(family):
    with pytest.raises(DriftError) as refused:
        check_trees(Target(build(family), (1,)))
    message = str(refused.value)
    assert family.replace("-", "_") in message.replace("-", "_")
    assert CANNOT[family] in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {"quantization": KVQuantization(bits=8, group_size=32, start=0)},
        {"max_kv_size": 16},
    ],
    ids=["quantized", "windows and sinks"],
)
def test_rows_branch_in_every_kind_of_cache(options, seed):
    target = Target(build("qwen3"), (1,))
    check_trees(target)
    rng = random.Random(seed)
    parents = random_parents(rng, 8)
    kept = path_to(parents, rng.randrange(9))
    alike = rows_are_alike(target, *(target.make_cache(**options) for _ in range(2)))
    assert worst(target, parents, kept, **options) <= (0 if alike else ROUNDING)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_kept_path_leaves_the_arrays_of_its_rows(family):
    target = Target(build(family), (1,))
    check_trees(target)
    prompt, _ = fed(target)
    for seed in range(12):
        rng = random.Random(seed)
        parents = random_parents(rng, rng.randint(1, 12))
        kept = path_to(parents, rng.randrange(len(parents) + 1))
        tokens = mx.array([rng.randrange(60) for _ in range(len(parents) + 1)])
        cache, reference = prompt.fork(), prompt.fork()
        target.verify(tokens, cache, Tree.of(mx.array(parents)))
        target.keep(cache, kept)
        target.verify(tokens[mx.array(kept)], reference)
        ours, theirs = (one.to_arrays() for one in (cache, reference))
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours) or ON_GPU


def test_without_its_hooks_a_model_is_itself_again():
    model = tiny_llama()
    before = model(mx.array([PROMPT]))
    check_trees(Target(model, (1,)))
    assert mx.array_equal(model(mx.array([PROMPT])), before)
    remove_taps(model)
    assert not any(hasattr(type(module), "tapped_as") for module in model.modules())
    check_trees(Target(model, (1,)))  # and is found fit anew
    assert any(hasattr(type(module), "by_depth") for module in model.modules())


@pytest.mark.parametrize("family", share(CAN, ["llama", "gpt_oss", "deepseek_v3", "lfm2"]))
def test_greedy_text_is_the_targets_own(family):
    model = build(family)
    text = PROMPT + plain_greedy(model, PROMPT, LENGTH + 12)
    target = Target(model, (1,))
    check_trees(target)
    alike = rows_are_alike(target, target.make_cache(), target.make_cache())
    for right in (0.5, 0.9):
        drafter = TreeOracle(text, target.taps, right)
        caches = target.make_cache(), drafter.make_cache()
        for _ in prefill(target, drafter, mx.array(PROMPT), *caches, cut=every(16)):
            pass
        rounds = [
            *speculate(
                target,
                drafter,
                mx.array(PROMPT[-1:]),
                *caches,
                num_draft_tokens=DraftLength(7, tree=True),
                max_tokens=LENGTH,
                stop_tokens=frozenset(),
            )
        ]
        tokens = [token for round in rounds for token in round.tokens]
        expected = text[len(PROMPT) :][:LENGTH]
        near_tie = ROUNDING * mx.abs(model(mx.array([text]))).max().item()
        assert_same_tokens(model, PROMPT, tokens, expected, near_tie, alike)
        assert len(rounds) < 0.8 * LENGTH or tokens != expected
