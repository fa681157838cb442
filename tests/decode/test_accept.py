"""The greedy acceptance rule and the figures made from it."""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_drift.decode.accept import accept_matching
from mlx_drift.decode.statistics import Statistics


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=8), st.integers(0, 3))
def test_accepts_the_longest_right_prefix(pairs, bonus):
    draft, choices = [d for d, _ in pairs], [c for _, c in pairs] + [bonus]
    verdict = accept_matching(mx.array(draft, dtype=mx.int32), mx.array(choices))
    accepted, *tokens = verdict.tolist()
    expected = next((i for i, (d, c) in enumerate(pairs) if d != c), len(pairs))
    assert accepted == expected
    assert tokens == choices


def test_statistics():
    statistics = Statistics()
    assert statistics.acceptance_length == 0
    for tested, accepted in ((3, 2), (1, 0), (3, 3), (0, 0)):
        statistics.record(tested, accepted, seconds=0.01)
    assert statistics.rounds == 4
    assert statistics.acceptance_length == 5 / 4
    assert statistics.tokens_per_round == 9 / 4
    assert statistics.conditional_acceptance == [2 / 3, 1.0, 0.5]
    assert statistics.speedup is None
    statistics.plain_step_seconds = 0.005
    assert statistics.speedup == pytest.approx(9 / 8)
