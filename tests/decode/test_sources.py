"""What drafts come from under a grammar: what it forces, and of copies what it lets come."""

import mlx.core as mx
import pytest

from mlx_drift import CopyingDrafter, PromptLookupDrafter
from mlx_drift.decode.draft_length import MOST_DRAFTS, PLAIN, DraftLength
from mlx_drift.decode.sources import possible_sources
from mlx_drift.drafters.protocol import NETWORK, Source
from stateful import EOS, PROMPT, SIZE, plain, say, small_llama, tokens_of
from tiny import tiny_drafter

BEGIN = len(PROMPT)
SONG = [0, 1, 2, 3, 4] * 8


class Song:
    """Lets only one text come, foreseen as far as some tokens."""

    stateless = True

    def __init__(self, begin=BEGIN, foresees=3):
        self.begin, self.foresees = begin, foresees

    def left(self, tokens):
        said = tokens.tolist()[self.begin :]
        return [*SONG, EOS][len(said) :] if said == SONG[: len(said)] else []

    def __call__(self, tokens, logits):
        left = self.left(tokens)
        return mx.where(mx.arange(SIZE) == left[0], logits, -mx.inf) if left else logits

    def forced(self, tokens):
        return self.left(tokens)[: self.foresees]

    def count_possible(self, tokens, drafts):
        left = self.left(tokens)
        return next((i for i, d in enumerate(drafts) if left[i : i + 1] != [d]), len(drafts))


@pytest.fixture(scope="module")
def model():
    return small_llama()


@pytest.mark.parametrize("k", [1, 2, 4, "auto"])
@pytest.mark.parametrize("kind", ["eagle", "lookup", "both"])
def test_what_is_forced_costs_no_draft_of_a_network(model, kind, k):
    drafter = PromptLookupDrafter(model)
    if kind != "lookup":
        drafter = tiny_drafter(model)
        drafter = CopyingDrafter(drafter) if kind == "both" else drafter
    responses = say(model, drafter, k, Song())
    assert tokens_of(responses) == [*SONG, EOS] == plain(model, PROMPT, Song())
    statistics = responses[-1].statistics
    if k == "auto":  # which learns by the clock
        return
    told = statistics.sources
    forced = told.get("forced", {"accepted": 0, "rounds": 0})
    # Up to three are forced, which a network's four drafts are as well; so is the target's own.
    if k <= 3 and kind != "both":
        assert forced["accepted"] >= 3 * (len(SONG) // 4)
        assert statistics.conditional_acceptance[:3] == [1.0] * 3
    by = [response.origin.by for response in responses]
    assert by.count("forced") == forced["accepted"]
    assert sum(one["accepted"] for one in told.values()) == sum(statistics.accepted)


def test_forced_or_not_where_the_number_of_drafts_is_fixed():
    copy, none = Source("copy", 8), Source("copy")
    length = DraftLength(fixed=4)
    for count, others, expected, k in (
        (4, [copy, NETWORK], Source("forced", 4), 4),
        (3, [copy, NETWORK], copy, 8),
        (3, [NETWORK], NETWORK, 4),
        (3, [none], Source("forced", 3), 3),
        (3, [copy], copy, 4),
        (99, [NETWORK], Source("forced", 99), MOST_DRAFTS),
    ):
        assert length.pick([Source("forced", count), *others]) == expected
        assert length.choose() == k


def test_auto_takes_what_is_forced_where_it_saves_seconds():
    length = DraftLength(costs={PLAIN: 1.0, 1: 1.4, 2: 1.8, 3: 2.2, 4: 2.6, 8: 4.2, 16: 7.4})
    for _ in range(20):  # a drafter that is hardly ever right
        length.record_round(1, 1, 1, 0, 1.4)
    assert length.pick([NETWORK]) == NETWORK
    assert length.choose() == PLAIN
    for k in (1, 2, 4, 4, 8, 8):  # rows without a network are cheaper
        length.record_round(k, k, k, k, 1.0 + 0.1 * k, Source("forced", k))
    forced = Source("forced", 6)
    assert length.pick([forced, NETWORK]) == forced
    assert length.choose() == 6


def test_copies_are_cut_off_where_they_may_not_go_on(model):
    drafter = PromptLookupDrafter(model)
    history = [0, 1, 2, 3, 4, 0, 1, 2, 4, 4, 0, 1, 2]  # where a 4 followed, a 3 must
    cache = drafter.make_cache()
    cache.append(history)
    song = Song(begin=10, foresees=0)
    ((source, propose),) = drafter.sources(cache).items()
    assert propose(2, cache, None).tokens.tolist() == [4, 4]
    ((cut, propose),) = possible_sources(
        [song], mx.array(history), drafter.sources(cache), cache
    ).items()
    assert (cut, propose(2, cache, None).tokens.tolist()) == (Source("copy"), [])
    # Beside a network it is out of the question; where it may begin, it is cut.
    kept = possible_sources(
        [song], mx.array(history), {source: drafter.propose, NETWORK: drafter.propose}, cache
    )
    assert [*kept] == [NETWORK]
    song.count_possible = lambda tokens, drafts: 1
    kept = possible_sources(
        [song], mx.array(history), {source: drafter.propose, NETWORK: drafter.propose}, cache
    )
    assert [*kept] == [source, NETWORK]
    assert kept[source](5, cache, None).tokens.tolist() == [4]


def test_processors_that_foresee_nothing_change_nothing(model):
    drafter = PromptLookupDrafter(model)
    cache = drafter.make_cache()
    cache.append(PROMPT)
    sources = drafter.sources(cache)
    assert possible_sources([lambda tokens, logits: logits], mx.array(PROMPT), sources, cache) == (
        sources
    )
