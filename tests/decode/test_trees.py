"""Trees of drafts: the path that is taken, its exactness, and what sees which path."""

import random

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

import stateful
from chi_square import CERTAINLY_WRONG, LEAST_P, p_value
from mlx_drift.decode.accept import accept_on_tree, read_verdict
from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.decode.sampling import GREEDY, Sampling
from mlx_drift.decode.speculate import every, prefill, speculate
from mlx_drift.decode.statistics import Statistics
from mlx_drift.decode.trees import prepare_trees
from mlx_drift.drafters.protocol import Draft
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.target.taps import remove_taps
from mlx_drift.target.tree import Tree, follow_trees
from mlx_drift.target.tree_check import check_trees
from tiny import VOCAB, plain_greedy, tiny_drafter, tiny_llama
from trees import TreeOracle, random_parents

PROMPT = [5, 9, 2, 44, 17, 3, 60]
LENGTH = 40
SIZE = 5  # of the vocabulary that is sampled from
DRAWS = 40_000


def walked(drafts, parents, choices):
    """The path that the choices take, and how many drafts it tests: the definition."""
    row, path = 0, [0]
    while True:
        following = [i for i, parent in enumerate(parents) if parent == row - 1]
        row = next((i + 1 for i in following if drafts[i] == choices[row]), None)
        if row is None:
            return path, len(path) - 1 + bool(following)
        path.append(row)


@pytest.mark.parametrize("seed", range(60))
def test_the_path_is_the_one_that_the_choices_take(seed):
    rng = random.Random(seed)
    parents = random_parents(rng, rng.randint(2, 14))
    drafts = [rng.randrange(3) for _ in parents]  # of which some are drafted twice
    choices = [rng.randrange(3) for _ in range(len(parents) + 1)]
    draft = Draft(mx.array(drafts, mx.int32), parents=mx.array(parents, mx.int32))
    tree = Tree.of(draft.parents)
    decided = accept_on_tree(draft.tokens, draft.parents, tree, mx.array(choices))
    verdict = read_verdict(decided.tolist(), draft)
    path, tested = walked(drafts, parents, choices)
    assert (list(verdict.path), verdict.tested) == (path, tested)
    assert verdict.accepted == len(path) - 1
    assert verdict.tokens == [choices[row] for row in path]


def test_a_tree_knows_depths_and_what_rows_follow():
    tree = Tree.of(mx.array([-1, -1, 0, 2, 1]))
    assert tree.depths.tolist() == [0, 1, 1, 2, 3, 2]
    assert [[j for j in range(6) if row[j]] for row in tree.sees.tolist()] == [
        [0],
        [0, 1],
        [0, 2],
        [0, 1, 3],
        [0, 1, 3, 4],
        [0, 2, 5],
    ]


def likeliest(row, count):
    return np.argsort(-row)[:count].tolist()


class Sampled:
    """A target and a drafter of two tokens, and the tree of the drafter's likeliest ones."""

    def __init__(self):
        rng = np.random.default_rng(2)
        p, q = (rng.dirichlet(np.ones(SIZE), SIZE + 1) for _ in range(2))
        self.p = p  # of the first token, in the last row, and after each
        first = likeliest(q[SIZE], 2)
        second = [likeliest(q[token], 2) for token in first]
        self.drafts = [*first, *second[0], *second[1]]
        self.parents = [-1, -1, 0, 0, 1, 1]
        self.q = q
        self.rows = p[[SIZE, *self.drafts]]

    @property
    def joint(self):
        return (self.p[SIZE][:, None] * self.p[:SIZE]).flatten()

    def count(self, first_two):
        return np.bincount(first_two @ [SIZE, 1], minlength=SIZE * SIZE)


def test_what_is_committed_has_the_targets_distribution():
    pair = Sampled()
    drafts, parents = mx.array(pair.drafts, mx.int32), mx.array(pair.parents)
    tree = Tree.of(parents)
    choices = mx.random.categorical(
        mx.log(mx.array(pair.rows)), shape=(DRAWS, len(pair.rows)), key=mx.random.key(3)
    )
    # The third token and those after it do not matter: 125 rounds to decide, not as many as drawn.
    matters = np.arange(len(pair.rows)) < 3
    rounds, which = np.unique(np.array(choices) * matters, axis=0, return_inverse=True)
    decided = [accept_on_tree(drafts, parents, tree, mx.array(round)) for round in rounds]
    verdicts = np.array(mx.stack(decided))[which.flatten()]
    accepted, tokens = verdicts[:, 0], verdicts[:, 2:4]
    rng = np.random.default_rng(5)
    alone = np.array([rng.choice(SIZE, DRAWS, p=row) for row in pair.p[:SIZE]])
    second = np.where(accepted > 0, tokens[:, 1], alone[tokens[:, 0], np.arange(DRAWS)])
    assert 0.3 < (accepted > 0).mean() < 0.9
    assert p_value(pair.count(np.stack([tokens[:, 0], second], axis=1)), pair.joint) > LEAST_P


def test_the_rule_of_chains_on_likeliest_drafts_is_found_out():
    """Accept a child with min(1, p / q), else go on with p − q: right for drafts drawn from q."""
    pair, rng = Sampled(), np.random.default_rng(6)

    def wrong(p, q, children):
        for child in children:
            if rng.random() * q[child] < p[child]:
                return child
            p = np.maximum(p - q, 0)
            p, q = p / p.sum(), np.where(np.arange(SIZE) == child, 0, q)
            q = q / q.sum()
        return rng.choice(SIZE, p=p)

    drawn = []
    for _ in range(DRAWS // 4):
        first = wrong(pair.p[SIZE], pair.q[SIZE], likeliest(pair.q[SIZE], 2))
        drawn.append([first, wrong(pair.p[first], pair.q[first], likeliest(pair.q[first], 2))])
    assert p_value(pair.count(np.array(drawn)), pair.joint) < CERTAINLY_WRONG


def spoken(model, text, k, *, count=LENGTH, stop=frozenset(), sampling=GREEDY, right=0.8):
    """The rounds of trees of k drafts."""
    target = Target(model, (1,))
    check_trees(target)
    drafter = TreeOracle(text, target.taps, right, min(target.shape.vocab_size, VOCAB))
    size, caches = len(PROMPT), (target.make_cache(), drafter.make_cache())
    for _ in prefill(target, drafter, mx.array(text[:size]), *caches, cut=every(4)):
        pass
    rounds = speculate(
        target,
        drafter,
        mx.array(text[size - 1 : size]),
        *caches,
        num_draft_tokens=DraftLength(k, tree=True),
        max_tokens=count,
        stop_tokens=stop,
        sampling=sampling,
        key=mx.random.key(1) if sampling.is_random else None,
        history=text[:size],
    )
    for round in rounds:
        assert len(caches[1].tokens) == caches[0][0].offset + 1
        yield round


def tokens_of(rounds):
    return [token for round in rounds for token in round.tokens]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def text(model):
    return PROMPT + plain_greedy(model, PROMPT, LENGTH + 12)


def test_a_round_ends_at_a_stop_token_inside_its_path(model, text):
    for place in range(len(PROMPT), len(PROMPT) + 20):
        stop = text[place]
        expected = text[len(PROMPT) : text.index(stop, len(PROMPT)) + 1]
        rounds = list(spoken(model, text, 8, stop={stop}))
        assert tokens_of(rounds) == expected
        assert all(r.accepted <= r.tested <= len(r.tokens) for r in rounds)


@pytest.mark.parametrize("count", range(1, 12))
def test_a_text_ends_inside_a_tree(model, text, count):
    assert tokens_of(spoken(model, text, 6, count=count)) == text[len(PROMPT) :][:count]


def test_rows_have_the_log_probabilities_they_are_chosen_from(model, text):
    rounds = list(spoken(model, text, 6))
    chosen_from = mx.stack([row for round in rounds for row in round.log_probabilities])
    logits = model(mx.array([text]))[0, len(PROMPT) - 1 :][: len(chosen_from)]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert mx.allclose(chosen_from, expected, atol=1e-4)


def test_statistics_tell_acceptance_by_depth_and_rank(model, text):
    statistics = Statistics()
    rounds = [round for round in spoken(model, text, 8) if round.levels]  # but for a last chain
    for round in rounds:
        statistics.record_round(round)
        assert [right > 0 for _, right in round.levels] == [
            *[True] * round.accepted,
            *[False] * (round.tested - round.accepted),
        ]
        assert all(right <= drafts for drafts, right in round.levels)
    assert [counts.total() for counts in statistics.ranks] == statistics.tested
    by_rank = [sum(shares) for shares in statistics.acceptance_by_rank]
    assert by_rank == pytest.approx(statistics.conditional_acceptance)
    assert len(statistics.acceptance_by_rank[0]) > 1
    twice = Statistics()
    twice.add(statistics)
    twice.add(statistics)
    assert twice.acceptance_by_rank == statistics.acceptance_by_rank
    assert twice.ranks[0].total() == 2 * statistics.ranks[0].total()


def test_processors_without_a_state_see_the_path_of_each_draft(model):
    processors = tuple(make_logits_processors(None, 1.4, 12))
    steps = stateful.generate_step(
        mx.array(PROMPT), model, max_tokens=LENGTH + 12, logits_processors=list(processors)
    )
    text = PROMPT + [int(token) for token, _ in steps]
    rounds = list(spoken(model, text, 6, sampling=Sampling(logits_processors=processors)))
    assert tokens_of(rounds) == text[len(PROMPT) :][:LENGTH]
    assert len(rounds) < 0.8 * LENGTH


@pytest.mark.parametrize("kind", [stateful.Counter, stateful.Automaton, stateful.Budget])
def test_processors_with_a_state_see_committed_tokens_alone(kind):
    model = stateful.small_llama()
    prompt = [token % stateful.SIZE for token in PROMPT]
    text = prompt + stateful.plain(model, prompt, kind(), count=LENGTH + 12)
    processor = kind(strict=True)
    rounds = list(
        spoken(
            model,
            text,
            4,
            stop={stateful.EOS},
            count=min(LENGTH, len(text) - len(prompt)),
            sampling=Sampling(logits_processors=(processor,)),
        )
    )
    tokens = tokens_of(rounds)
    assert tokens == text[len(prompt) :][: len(tokens)]
    assert len(tokens) == LENGTH or tokens[-1] == stateful.EOS
    assert processor.seen == stateful.positions(len(tokens), prompt)
    assert sum(round.accepted for round in rounds) > 0


def test_an_opaque_samplers_own_tokens_are_committed(model, text):
    drawn = []

    def draws(log_probabilities):  # keeps a state, so asked once a token that is committed
        drawn.append(1)
        return mx.argmax(log_probabilities, axis=-1)

    for sampler in (lambda log_probabilities: mx.argmax(log_probabilities, axis=-1), draws):
        rounds = list(spoken(model, text, 6, sampling=Sampling(sampler=sampler)))
        assert tokens_of(rounds) == text[len(PROMPT) :][:LENGTH]
    assert len(drawn) == LENGTH


def primitives(path, *arrays):
    """How many primitives the graph of some arrays has."""
    mx.export_to_dot(str(path), *arrays)
    return path.read_text().count("shape=rectangle")


def test_a_chain_takes_no_more_primitives_for_there_being_trees(tmp_path):
    model = tiny_llama()
    drafter = tiny_drafter(model)
    remove_taps(drafter.network)
    target = Target(model, drafter.taps)

    def count():
        cache, rows = target.make_cache(), drafter.make_cache()
        prompt = mx.array(PROMPT)
        _, taps = target(prompt[:-1], cache)
        drafter.ingest(prompt[1:], taps, rows)
        mx.eval(cache.state, rows.state)
        draft = drafter.propose(4, rows)
        tokens = mx.concatenate([prompt[-1:], draft.tokens])
        logits, taps = target.verify(tokens, cache, draft.tree)
        target.keep(cache, range(3))
        held = [array for part in cache.parts() for array in part.keys_and_values()]
        return primitives(tmp_path / "graph", logits, taps, *held)

    before = count()
    check_trees(target)
    follow_trees(drafter.network)
    assert any(hasattr(type(module), "by_depth") for module in drafter.network.modules())
    assert count() == before


def test_a_head_whose_rope_hangs_on_the_length_drafts_no_trees():
    """mlx-lm's dynamic RoPE has one base for all rows, by how many there are."""
    model = tiny_llama()
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    drafter = tiny_drafter(model, rope_scaling=scaling, max_position_embeddings=32)
    with pytest.raises(DriftError, match=r"no trees: the base of its RoPE \(dynamic\)"):
        prepare_trees(drafter, Target(model))
    cache = drafter.make_cache()
    drafter.ingest(
        mx.array([1, 2]), mx.zeros((2, len(drafter.taps), model.args.hidden_size)), cache
    )
    assert drafter.propose_tree(5, cache).parents is None
