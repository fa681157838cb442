"""What chooses the number of drafts: its parts by hand, and replays of recorded traces."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from mlx_drift.decode.acceptance import (
    COPY_GUESS,
    GUESS,
    GUESS_WEIGHT,
    Acceptance,
    CopyAcceptance,
    committed,
)
from mlx_drift.decode.costs import COLD, OPTIMISM, SETTLED, Costs, estimate
from mlx_drift.decode.draft_length import PLAIN, DraftLength

TRACES = json.loads((Path(__file__).parents[1] / "traces.json").read_text())
REGIMES, ACCEPTED = TRACES["costs"], TRACES["accepted"]
LENGTHS = range(9)


def test_costs_are_lower_medians_once_there_are_two():
    costs = Costs()
    costs.add(2, 9.0)
    assert costs.known().get(2) is None
    costs.add(2, 1.0)
    assert costs.known().get(2) == 1.0
    costs.add(2, 3.0)
    assert costs.known().get(2) == 3.0
    for _ in range(20):
        costs.add(2, 5.0)
    assert costs.known().get(2) == 5.0  # only the last few count


def test_unknown_costs_lie_on_lines_and_beyond_them_less_steep():
    known = {0: 1.0, 2: 2.0, 4: 6.0}
    beyond = [6 + 2 * OPTIMISM, 6 + 4 * OPTIMISM]
    assert [estimate(k, known) for k in range(7)] == [1.0, 1.5, 2.0, 4.0, 6.0, *beyond]
    assert estimate(2, {1: 1.0}) is None
    assert estimate(0, {}) is None


def test_what_was_known_before_takes_the_scale_of_now():
    costs = Costs({0: 1.0, 1: 1.5, 2: 2.0})
    for _ in range(2):
        costs.add(1, 3.0)
    assert costs.known() == {0: 2.0, 1: 3.0, 2: 4.0}


def test_acceptance_by_hand():
    acceptance = Acceptance()
    assert acceptance.rates(2) == pytest.approx([GUESS, GUESS])
    acceptance.record(tested=2, accepted=1)
    first = (1 + GUESS_WEIGHT * GUESS) / (1 + GUESS_WEIGHT)
    second = (0 + GUESS_WEIGHT * first) / (1 + GUESS_WEIGHT)
    assert acceptance.rates(3) == pytest.approx([first, second, second])
    expected = [1, 1 + first, 1 + first + first * second]
    assert acceptance.tokens(2) == pytest.approx(expected)
    acceptance.fade(10_000)
    assert acceptance.rates(2) == pytest.approx([GUESS, GUESS])


def test_the_first_rounds_of_a_process_are_not_timed():
    """Whatever they took: neither plain decoding nor a length of drafts is known by them."""
    costs = Costs(cold=2)
    for seconds in (9.0, 8.0, 2.0, 2.0):
        costs.add(PLAIN, seconds)
    assert costs.known() == {PLAIN: 2.0}
    assert not Costs({1: 1.0}, cold=2).is_cold


def test_few_measurements_are_no_figure_to_tell():
    costs = Costs()
    for _ in range(SETTLED):
        assert not costs.is_settled(PLAIN)
        costs.add(PLAIN, 1.0)
    assert costs.is_settled(PLAIN)
    assert not costs.is_settled(1)
    costs.know(1, 2.0)
    assert costs.is_settled(1)


def test_a_copied_token_that_is_accepted_makes_the_match_longer():
    acceptance = CopyAcceptance()
    assert acceptance.rates(3, 2) == pytest.approx([COPY_GUESS[3], COPY_GUESS[4]])
    acceptance.record(3, tested=3, accepted=2)  # after 3 and 4 tokens right, after 5 wrong
    known = {
        3: (1 + GUESS_WEIGHT * COPY_GUESS[3]) / (1 + GUESS_WEIGHT),
        4: (1 + GUESS_WEIGHT * COPY_GUESS[4]) / (1 + GUESS_WEIGHT),
        5: (0 + GUESS_WEIGHT * COPY_GUESS[5]) / (1 + GUESS_WEIGHT),
    }
    assert acceptance.to_dict() == pytest.approx(known)
    assert acceptance.rates(4, 2) == pytest.approx([known[4], known[5]])
    assert acceptance.tokens(4, 2) == pytest.approx(committed([known[4], known[5]]))
    assert committed([0.5, 0.5]) == [1, 1.5, 1.75]
    assert acceptance.rates(40, 1) == pytest.approx([COPY_GUESS[32]])
    acceptance.fade(10_000)
    assert acceptance.rates(5, 1) == pytest.approx([COPY_GUESS[5]])


def test_it_times_plain_decoding_first_and_climbs_while_that_pays():
    length, chosen = DraftLength(), []
    for _ in range(40):
        k = length.choose()
        chosen.append(k)
        if k == PLAIN:
            length.record_plain(1.0)
        else:
            length.record_round(k, k, k, k, 1.0 + 0.1 * k if k <= 4 else 3.0 * k)
    assert chosen[:COLD] == [1] * COLD
    chosen = chosen[COLD:]
    assert chosen[:4] == [0, 0, 1, 1]
    assert all(b - a <= 1 for a, b in pairwise(chosen))
    assert chosen[-20:] == [4] * 20


def test_a_fixed_length_stays_and_knows_what_would_be_better():
    length = DraftLength(fixed=5)
    length.costs.know(PLAIN, 1.0)
    for _ in range(10):
        assert length.choose() == 5
        length.record_round(5, 5, 1, 0, 4.0)
    assert length.best().num_draft_tokens == PLAIN
    told = length.to_dict()
    assert (told["fixed"], told["auto"]) == (5, PLAIN)
    assert [c["num_draft_tokens"] for c in told["candidates"]] == list(range(7))
    assert [c["measured"] for c in told["candidates"]] == [True, *[False] * 4, True, False]


def test_missed_rows_keep_it_from_drafting_where_they_cost_more_than_it_gains():
    length = DraftLength(costs={0: 1.0, 1: 1.2})
    length.record_catch_up(rows=1, seconds=0.1)
    length.record_plain(1.0)
    assert length.choose(pending=1) > PLAIN
    assert length.choose(pending=1000) == PLAIN


@pytest.mark.parametrize("often", [0.0, 0.1])
def test_a_drafter_with_little_to_say_costs_little(often):
    length, rng, seconds, tokens = DraftLength(), random.Random(0), 0.0, 0
    while tokens < 1000:
        k = length.choose()
        if k == PLAIN:
            length.record_plain(1.0)
            seconds, tokens = seconds + 1.0, tokens + 1
            continue
        drafted = k if rng.random() < often else 0
        took = 1.1 + 0.2 * drafted
        length.record_round(k, drafted, drafted, drafted, took)
        seconds, tokens = seconds + took, tokens + 1 + drafted
    assert seconds < 1.05 * tokens


def replay(costs, accepted, draft_length):
    """Decodes a recorded text: tokens in the time of a plain step, and the lengths chosen.

    Args:
        costs: Of a round by draft length and of a row that the drafter missed, in plain steps.
        accepted: How many drafts would be accepted at each position.
        draft_length: What chooses.
    """
    rounds, seconds, position, pending, chosen = costs["rounds"], 0.0, 0, 0, []
    while position < len(accepted):
        k = draft_length.choose(pending)
        chosen.append(k)
        seconds += rounds[k]
        if k == PLAIN:
            draft_length.record_plain(rounds[k] if pending else None)
            position, pending = position + 1, pending + 1
            continue
        if pending:
            seconds += pending * costs["missed_row"]
            draft_length.record_catch_up(pending, pending * costs["missed_row"])
            pending = 0
        kept = min(k, accepted[position])
        draft_length.record_round(k, k, min(k, kept + 1), kept, rounds[k])
        position += kept + 1
    return len(accepted) / seconds, chosen


def best_fixed(costs, accepted):
    return max((replay(costs, accepted, DraftLength(fixed=k))[0], k) for k in LENGTHS)


def text(name, temp):
    """A trace of about 500 tokens: recorded answers one after the other."""
    easy, hard = (ACCEPTED[f"{kind}, temperature {temp}"] for kind in ("easy", "hard"))
    return {"easy": easy * 2, "hard": hard * 12, "changing": hard * 6 + easy}[name]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("temp", [0, 1])
@pytest.mark.parametrize("name", ["easy", "hard", "changing"])
def test_replayed_it_is_as_good_as_the_best_fixed_length(regime, temp, name):
    costs, accepted = REGIMES[regime], text(name, temp)
    best, k = best_fixed(costs, accepted)
    tuned = DraftLength(costs=dict(enumerate(costs["rounds"])))
    for draft_length, share in ((DraftLength(), 0.96), (tuned, 0.96)):
        got, chosen = replay(costs, accepted, draft_length)
        print(f"{regime}, {name}, temperature {temp}: {got / best:.3f} of K = {k}, {best:.2f}")
        assert got >= share * best, chosen
