"""Whether a model's rows may branch: tried out on a small tree before anything relies on it.

A model file may build its own mask, or rotate positions without a module, and nothing in it says
so. So a tree of two branches is verified, and one branch by itself: a row must have the logits that
it has on its own path, and go on from there as if the other branch had never been fed.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from mlx_drift.errors import DriftError, brief
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.model import Target
from mlx_drift.target.recurrent import recurrent
from mlx_drift.target.tree import BRANCHING, VERIFIES_TREES, Tree, follow_trees

INSTEAD = "Draft chains instead: leave out --tree (in Python tree=)"

NO_TREES = {
    "minimax_m3_vl": "it selects keys by blocks of rows, whatever branch they are on",
    **dict.fromkeys(
        ("ministral3", "mistral4"),
        "far into a text it scales attention by the number of rows, not by a row's depth",
    ),
}
"""Model types that a small tree does not find out, and why."""

TEXT, BRANCH = 8, 4  # rows
ROUNDING = 2  # steps of the dtype
NOISE = 4  # times what a block of rows differs from single ones


def check_trees(target: Target) -> None:
    """Has a target verify trees from now on, if its rows may branch; tried out once a model.

    Raises:
        DriftError: If they may not.
    """
    if getattr(target.model, VERIFIES_TREES, False):
        return
    cache, kind = target.make_cache(), target.model.model_type
    known = (*BRANCHING, ArraysCache)
    others = sorted({type(part).__name__ for part in cache.parts() if type(part) not in known})
    both = [one for one in cache if recurrent(one) and not isinstance(one, ArraysCache)]
    follow_trees(target.model)
    kinds = [getattr(module, "model_type", kind) for module in target.model.modules()]
    if named := [NO_TREES[one] for one in kinds if one in NO_TREES]:
        why: str | None = named[0]
    elif others:
        why = f"it keeps its state in {', '.join(others)}, whose rows cannot branch"
    elif both:
        why = "one layer of its has both keys and values and a recurrent state"
    else:
        why = _try(target)
    if why:
        raise DriftError(f"the target ({kind}) cannot verify trees of drafts: {why}. {INSTEAD}")
    setattr(target.model, VERIFIES_TREES, True)


def _try(target: Target) -> str | None:
    """Verifies a tree of two branches, of which the second is kept; says what is wrong."""
    size = target.shape.vocab_size
    tokens = mx.random.randint(0, size, (TEXT + 2 * BRANCH + 2,), key=mx.random.key(0))
    text, drafts, following = tokens[:TEXT], tokens[TEXT:-1], tokens[-1:]
    legs = [*range(-1, BRANCH - 1), -1, *range(BRANCH, 2 * BRANCH - 1)]
    path = [0, *range(BRANCH + 1, 2 * BRANCH + 1)]
    tree = Tree.of(mx.array(legs))
    in_rows = Tree(mx.arange(drafts.size), tree.sees)  # each at its row's position: wrong

    def fed() -> TargetCache:
        cache = target.make_cache()
        target(text, cache)
        return cache

    def verified(cache: TargetCache, rows: mx.array, tree: Tree | None = None) -> mx.array:
        return target.verify(rows, cache, tree)[0].astype(mx.float32)

    cache, alone, singly = fed(), fed(), fed()
    try:
        on_tree = verified(cache, drafts, tree)[mx.array(path)]
        target.keep(cache, path)
        on_tree = mx.concatenate([on_tree, verified(cache, following)])
        misplaced = verified(fed(), drafts, in_rows)[mx.array(path)]
        branch = mx.concatenate([drafts[mx.array(path)], following])
        by_itself = verified(alone, branch)
        row_by_row = mx.concatenate(
            [verified(singly, row) for row in mx.split(branch, branch.size)]
        )
        scale = mx.abs(by_itself).max()
        off = mx.abs(on_tree - by_itself).max() / scale
        noise = mx.abs(row_by_row - by_itself).max() / scale
        told = mx.array([off, noise, mx.array_equal(misplaced, on_tree[:-1])])
        values: Any = told.tolist()
    except Exception as error:  # whatever a model file raises that was not written for it
        return f"mlx-lm cannot run it on one ({brief(str(error))})"
    off, noise, is_misplaced = values
    rounding = ROUNDING * mx.finfo(target.dtype).eps + NOISE * noise
    if any(recurrent(one) for one in cache):  # then what attends may well know no positions
        is_misplaced = False
    if off <= rounding and not (off and is_misplaced):
        return None
    return f"on a branch its logits are off by {off:.1%} of the largest"
