"""What trees are expected to give, and whether auto chooses between chains and trees rightly."""

import random
from functools import cache

import pytest

from mlx_drift.decode.costs import Costs
from mlx_drift.decode.draft_length import PLAIN, TREES, DraftLength
from mlx_drift.decode.tree_shape import CAUGHT, CAUGHT_WEIGHT, Ranks, tokens_of_trees
from mlx_drift.drafters.protocol import NETWORK, TREE
from mlx_drift.drafters.tree import DEPTH

TEXT = 4000  # tokens


def test_a_tree_is_of_the_likeliest_nodes():
    # By hand: .6, then .36 after it, then .2 beside the first, then .6 × .2 beside the second
    # and .2 × .6 after the one beside.
    tokens = tokens_of_trees([0.6] * 5, [0.5])
    assert tokens == pytest.approx([1, 1.6, 1.96, 2.176, 2.376, 2.376 + 0.1296])
    assert tokens_of_trees([], [0.5]) == [1.0]
    # No more levels than a drafter grows: then a sure drafter's further drafts go beside.
    assert tokens_of_trees([1.0] * 12, [0.5])[-1] == 1 + DEPTH
    assert tokens_of_trees([0.5] * 4, [], levels=2) == [1, 1.5, 1.75, 1.75, 1.75]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_tree_gives_no_less_than_a_chain(rate):
    chain = [sum(rate**i for i in range(k + 1)) for k in range(9)]
    trees = tokens_of_trees([rate] * 8, CAUGHT, levels=8)
    assert len(trees) == 9
    assert all(a >= b - 1e-12 for a, b in zip(trees, chain, strict=True))
    assert tokens_of_trees([rate] * 8, [0.0], levels=8) == pytest.approx(chain)


def test_shares_are_of_what_the_first_missed():
    ranks = Ranks()
    ranks.record([(4, 1), (3, 2), (2, 0)])  # right at once; the second; neither of two
    first, second, third = ranks.shares(1.0)
    assert first == pytest.approx((1 + CAUGHT_WEIGHT * CAUGHT[0]) / (2 + CAUGHT_WEIGHT))
    assert second == pytest.approx(CAUGHT_WEIGHT * CAUGHT[1] / (1 + CAUGHT_WEIGHT))
    assert third == CAUGHT[2]
    ranks.fade(0.0)
    assert ranks.shares(1.0) == pytest.approx(CAUGHT)


def test_who_is_right_more_often_is_believed_to_catch_more():
    assert Ranks().shares(0.8) == pytest.approx([2 * share for share in Ranks().shares(0.4)])
    known = Ranks()
    known.record([(2, 2), (2, 0)] * 500)  # what was seen counts, whatever the rate
    assert known.shares(0.9)[0] == pytest.approx(known.shares(0.1)[0], abs=0.01)


class World:
    """A drafter whose acceptances are known, on a machine whose costs are."""

    def __init__(self, rates, shares, chain, tree, seed=0):
        rates = [*rates, *rates[-1:] * 20]
        self.by_rank = [[rate, *((1 - rate) * share for share in shares)] for rate in rates]
        self.costs = {NETWORK: chain, TREE: tree}
        self.rng = random.Random(seed)
        self.nodes = cache(self.nodes)

    def nodes(self, k):
        """The likeliest tree: paths of ranks."""
        pool, nodes = {(): 1.0}, []
        while len(nodes) <= k:
            best = max(pool, key=pool.get)
            chance = pool.pop(best)
            nodes.append(best)
            for rank, rate in enumerate(self.by_rank[len(best)] if len(best) < DEPTH else ()):
                pool[*best, rank] = chance * rate
        return nodes

    def round(self, source, k):
        """What a round of k drafts brings: levels, and seconds."""
        nodes = set(self.nodes(k)) if source == TREE else {(0,) * i for i in range(k + 1)}
        path, levels = (), []
        while beside := sum(node[:-1] == path for node in nodes if node):
            rates = self.by_rank[len(path)]
            draws = self.rng.random()
            right = next((i for i, r in enumerate(rates) if draws < sum(rates[: i + 1])), None)
            is_right = right is not None and (*path, right) in nodes
            levels.append((beside, right + 1 if is_right else 0))
            if not is_right:
                break
            path = (*path, right)
        return levels, self.costs[source](k) * self.rng.uniform(0.98, 1.1)

    def speed(self, length, text=TEXT):
        """Tokens a second over a text, and how many rounds were of trees."""
        tokens, seconds, trees = 0, 0.0, 0
        while tokens < text:
            source = length.pick([TREE, NETWORK])
            k = length.choose()
            if k == PLAIN:
                took = self.rng.uniform(0.98, 1.1)
                length.record_plain(took)
                tokens, seconds = tokens + 1, seconds + took
                continue
            levels, took = self.round(source, k)
            accepted = sum(right > 0 for _, right in levels)
            trees += source == TREE
            length.record_round(
                k, k, len(levels), accepted, took, source, levels if source == TREE else ()
            )
            tokens, seconds = tokens + accepted + 1, seconds + took
        return tokens / seconds, trees


WORLDS = {
    "a weak chain, cheap rows": (
        [0.57, 0.5, 0.45, 0.4, 0.35, 0.3, 0.3, 0.3],
        [0.4, 0.25, 0.1],
        lambda k: 1.0 + 0.1 * k,
        lambda k: 1.05 + 0.06 * k,
        True,
    ),
    "a strong chain, dear trees": (
        [0.85] * 8,
        [0.2, 0.1, 0.05],
        lambda k: 1.0 + 0.08 * k,
        lambda k: 1.3 + 0.12 * k,
        False,
    ),
    "rows too dear for either": (
        [0.4] * 8,
        [0.1, 0.1, 0.05],
        lambda k: 1.0 + 0.7 * k,
        lambda k: 1.2 + 0.7 * k,
        False,
    ),
}


@pytest.mark.parametrize("name", WORLDS)
def test_auto_is_about_as_fast_as_the_better(name):
    *world, wants_trees = WORLDS[name]
    fixed = [World(*world).speed(DraftLength(k))[0] for k in range(1, 9)]
    trees = [World(*world).speed(DraftLength(k, tree=True))[0] for k in TREES]
    length = DraftLength(tree=True)
    auto, rounds_of_trees = World(*world).speed(length)
    print(f"{name}: chains {max(fixed):.3f}, trees {max(trees):.3f}, auto {auto:.3f}")
    assert auto >= 0.97 * max(*fixed, *trees, 1 / 1.04)
    assert (max(trees) > max(fixed)) == wants_trees
    assert length.prefers_trees == wants_trees
    assert (rounds_of_trees > 100) == wants_trees


SHORT, ANSWERS = 80, 60  # tokens, each answer beginning with what is believed at first
HEADS_OF = {  # rates and shares that were found of embedded heads
    "medusa": ([0.49, 0.47, 0.38, 0.40], [0.20, 0.11, 0.07]),
    "dflash": ([0.62, 0.62, 0.70, 0.74, 0.77, 0.79, 0.67], [0.29, 0.12, 0.07]),
}


@pytest.mark.parametrize("head", HEADS_OF)
def test_auto_branches_from_the_first_rounds_on(head):
    """Where rows are nearly free; what each costs is known, as after `mlx-drift tune`."""

    def chain(k):
        return 1 + 0.06 * k

    def tree(k):
        return 1.05 + 0.01 * k + 0.07 * min(k, 2 + k // 4)

    def speed(k, is_tree):
        world, taken = World(*HEADS_OF[head], chain, tree), 0.0
        for _ in range(ANSWERS):
            length = DraftLength(k, {k: chain(k) for k in range(9)}, tree=is_tree)
            length.tree_costs = Costs({k: tree(k) for k in TREES})
            taken += 1 / world.speed(length, SHORT)[0]
        return ANSWERS / taken

    best = max(*(speed(k, False) for k in (1, 2, 3, 4, 6)), *(speed(k, True) for k in (2, 4, 7)))
    auto = speed(None, True)
    print(f"{head}: auto {auto / best:.3f} of the best")
    assert auto >= 0.985 * best


def test_without_being_told_no_tree_is_drafted():
    length = DraftLength()
    assert length.pick([TREE, NETWORK]) == NETWORK
    assert DraftLength(4, tree=True).pick([TREE, NETWORK]) == TREE
    assert DraftLength(4, tree=True).pick([NETWORK]) == NETWORK
