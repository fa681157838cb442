"""The index over a conversation, by an exhaustive search; a drafter that copies beside a head."""

import random

import mlx.core as mx
import pytest

from mlx_drift import CopyingDrafter, PromptLookupDrafter, Statistics, make_prompt_cache
from mlx_drift.decode.answer import answer
from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.speculate import every
from mlx_drift.decode.text import Round
from mlx_drift.drafters.expecting import ExpectingDrafter
from mlx_drift.drafters.prompt_lookup import FURTHEST, RUN, TOKEN_BYTES, LookupState
from mlx_drift.drafters.protocol import NETWORK, TREE, Source
from tiny import VOCAB, plain_greedy, tiny_drafter, tiny_llama


def longest(tokens, window):
    """The longest match of the last tokens, the latest of those alike, place by place."""
    best, found = 0, 0
    for end in range(max(RUN, len(tokens) - window + 1), len(tokens)):
        length = 0
        while length < end and tokens[end - length - 1] == tokens[len(tokens) - length - 1]:
            length += 1
        if length >= max(RUN, found):
            best, found = end, length
    return best, found


@pytest.mark.parametrize("window", [40, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_matches_are_the_longest_under_rewinds_and_forks(seed, window):
    rng = random.Random(seed)
    state = LookupState(window)
    for _ in range(400):
        what = rng.random()
        if what < 0.1 and len(state.tokens) > 1:
            assert state.rewind(rng.randrange(len(state.tokens)))
        elif what < 0.2:
            other, state = state, state.fork()
            other.append([9, 9, 9])
        else:
            repeated = rng.randrange(len(state.tokens) + 1)
            copied = state.tokens[repeated : repeated + rng.randrange(12)]
            state.append(copied if rng.random() < 0.5 else [rng.randrange(4)])
        fresh = LookupState(window)
        fresh.append(state.tokens)
        assert (state._latest, state._before) == (fresh._latest, fresh._before)
        end, length = state.match()
        _, expected = longest(state.tokens, window)
        assert min(length, FURTHEST) == min(expected, FURTHEST)
        assert state.tokens[end - length : end] == state.tokens[len(state.tokens) - length :]


def test_an_index_is_no_larger_than_its_window():
    rng, state = random.Random(0), LookupState(window=1000)
    state.append([rng.randrange(100) for _ in range(20_000)])
    assert len(state._latest) <= 1000
    assert state.nbytes < 1_000_000


def test_a_copy_may_run_into_itself():
    state = LookupState()
    state.append([1, 5, 5, 5, 5])
    assert state.copy(6) == [5] * 6
    state.append([7, 8, 5, 5, 7, 8, 5, 5])
    assert state.copy(7) == [7, 8, 5, 5, 7, 8, 5]


def test_too_short_a_match_is_none():
    drafter = PromptLookupDrafter(tiny_llama())
    cache = drafter.make_cache()
    cache.append([1, 2, 9, 1, 2])
    assert [*drafter.sources(cache)] == [Source("copy", 0)]
    assert drafter.propose(4, cache).tokens.size == 0


def test_the_head_drafts_where_there_is_nothing_to_copy_and_sees_every_row():
    model = tiny_llama()
    head = tiny_drafter(model)
    drafter, alone = CopyingDrafter(head), make_prompt_cache(model, head)
    beside = make_prompt_cache(model, drafter)
    for prompt, sources in (
        ([1, 2, 3, 4], [NETWORK]),
        ([1, 2, 3, 4, 1, 2, 3], [Source("copy", 3), NETWORK]),
        ([1, 2, 3, 9, 1, 2], [NETWORK]),
    ):
        for cache in (beside, alone):
            cache.read(prompt, step_size=3, progress=lambda done, total: None)
        offered = drafter.sources(beside.drafter_cache)
        assert [source for source in offered if source != TREE] == sources
        own = offered[NETWORK](3, beside.drafter_cache, None).tokens.tolist()
        assert own == head.propose(3, alone.drafter_cache).tokens.tolist()
    assert drafter.propose(3, beside.drafter_cache).tokens.tolist() == own


def test_tokens_that_were_seen_ahead_are_seen_once():
    model = tiny_llama()
    drafter = PromptLookupDrafter(model)
    cache = drafter.make_cache()
    drafter.start(mx.array([1]), cache)
    drafter.sources(cache, [2])
    drafter.sources(cache, [2, 3])
    drafter.ingest(mx.array([2]), mx.zeros((1, 0, 32)), cache)
    drafter.sources(cache, [3, 4])
    fork = cache.fork()
    for one in (cache, fork):
        drafter.ingest(mx.array([3, 4, 5]), mx.zeros((3, 0, 32)), one)
        assert one.tokens == [1, 2, 3, 4, 5]


def expecting(model, drafter, expected, count=40, prompt=(7, 3, 9, 9, 1), **keywords):
    """An answer of which something is expected; what became of it."""
    cache, statistics = make_prompt_cache(model, drafter), Statistics()
    steps = answer(
        cache,
        list(prompt),
        cut=every(2),
        max_tokens=count,
        stop_tokens=frozenset(),
        sampling=Sampling(),
        key=None,
        statistics=statistics,
        expected=expected,
        **{"draft_length": DraftLength(fixed=2)} | keywords,
    )
    tokens = [token for step in steps if isinstance(step, Round) for token in step.tokens]
    assert tokens == plain_greedy(model, list(prompt), count)
    return statistics, cache


@pytest.mark.parametrize("kind", ["head", "head and copies", "copies"])
@pytest.mark.parametrize("auto", [False, True])
def test_what_is_expected_is_copied_as_long_as_it_is_right(kind, auto):
    model = tiny_llama()
    head = tiny_drafter(model)
    make = {"head": lambda: head, "copies": lambda: PromptLookupDrafter(model)}
    drafter = make.get(kind, lambda: CopyingDrafter(head))()
    said = plain_greedy(model, [7, 3, 9, 9, 1], 40)
    changed = [*said[:12], (said[12] + 1) % VOCAB, *said[13:]]
    shorter = said[20:]
    for text, most in ((said, 10), (changed, 16), (shorter, 33), ([1, 2, 3], 40)):
        keywords = {}
        if auto:  # a round costs what a token does, whatever is drafted
            keywords["draft_length"] = DraftLength(costs={0: 1.0, 1: 1.0, 16: 1.0})
        statistics, cache = expecting(model, drafter, text, **keywords)
        longest = auto or kind != "copies"  # which are else as long as they are asked to be
        assert statistics.rounds + statistics.plain_tokens <= (most if longest else 40)
        followed = statistics.expected[0]
        assert statistics.expected[1] == len(text) - followed
        if text == said:
            assert followed == 40
        if text == changed:
            assert 12 + 20 < followed < 39
        follow = [*cache.tokens, 1]  # nothing of it stays
        assert expecting(model, drafter, (), 8, follow)[0].expected is None


def test_a_copy_of_the_cache_takes_no_part_in_what_is_expected():
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cache, other = drafter.make_cache(), drafter.make_cache()
    one = ExpectingDrafter(drafter, [4, 5, 6, 7, 8, 9], cache)
    propose = next(iter(one.sources(cache).values()))
    assert propose(3, cache, None).tokens.tolist() == [4, 5, 6]
    taps = mx.zeros((2, 2, 32))
    one.ingest(mx.array([1, 1]), taps, other)
    assert one.counts == (0, 6)
    one.ingest(mx.array([4, 5]), taps, cache)
    assert one.counts == (2, 4)
    propose = next(iter(one.sources(cache).values()))
    assert propose(3, cache, None).tokens.tolist() == [6, 7, 8]


def test_an_index_takes_no_more_bytes_a_token_than_is_said():
    rng, state = random.Random(0), LookupState()
    for size in range(1, 40_000):
        state.append([rng.randrange(50_000)])
        assert state.nbytes <= TOKEN_BYTES * (size + 300)


COPY, LONG = Source("copy", 3), Source("copy", 16)


def test_a_fixed_length_prefers_a_sure_copy_as_long_as_its_match():
    length = DraftLength(fixed=2)
    picked = [length.pick([source, NETWORK]) for source in (COPY, LONG)]
    assert picked == [NETWORK, LONG]
    assert length.choose() == 16
    length.pick([NETWORK])
    assert length.choose() == 2
    length.pick([LONG])  # alone it is as long as it is asked to be
    assert length.choose() == 2


def test_copies_are_learned_by_their_match_and_cost_what_they_cost():
    """Short matches are wrong, long ones right; rows are cheap and the chain is dear."""
    length = DraftLength(costs={0: 1.0})
    for turn in range(300):
        source = length.pick([LONG if turn % 3 else COPY, NETWORK])
        k = length.choose()
        if k == 0:
            length.record_plain(1.0)
            continue
        right = {NETWORK: 1, COPY: 0, LONG: k}[source]
        took = 1 + k * (0.05 if source.is_free else 0.3)
        length.record_round(k, k, min(k, right + 1), min(right, k), took, source)
    length.pick([LONG, NETWORK])
    assert (length._source, length.choose()) == (LONG, 16)
    assert length.pick([COPY, NETWORK]) == NETWORK
    assert length.choose() in (1, 2)  # the longer one is looked at now and then
    assert length.copy_costs.known()[16] == pytest.approx(1.8)
    learned = length.to_dict()["copy_acceptance"]
    assert learned[16] > 0.95
    assert learned[3] < 0.3


def test_nothing_to_copy_is_plain_decoding():
    length = DraftLength(costs={0: 1.0, 1: 1.0})
    length.pick([Source("copy")])
    assert length.choose() == 0
    length.pick([LONG])
    assert length.choose() > 1


def test_a_plain_step_waits_for_its_token_where_copies_often_begin():
    length = DraftLength(costs={0: 1.0, 1: 1.1})
    for _ in range(2):
        length.record_plain(1.05, waited=True)
    assert length.is_ahead()  # nothing was ever copied
    for _ in range(10):
        length.record_plain(None)
        length.pick([LONG, NETWORK])
    assert not length.is_ahead()
    for _ in range(200):
        length.record_plain(None)
        length.pick([NETWORK])
    assert length.is_ahead()
