"""`bench`: its arithmetic, and a small run of it."""

import json

import pytest

from mlx_drift.measure.bench import bench, break_even, quartiles
from tiny import NoText, tiny_drafter, tiny_llama


@pytest.mark.parametrize(
    ("k", "cost", "acceptance"),
    [(1, 1.0, 0.0), (1, 1.6, 0.6), (1, 2.0, 1.0), (2, 1.75, 0.5), (3, 4.0, 1.0), (2, 3.1, None)],
)
def test_break_even(k, cost, acceptance):
    found = break_even(k, cost)
    assert found is acceptance if acceptance is None else found == pytest.approx(acceptance)


def test_quartiles():
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_every_arm_answers_every_prompt(temp):
    model = tiny_llama()
    drafter = tiny_drafter(model)
    told = []
    found = bench(
        model,
        NoText(),
        drafter,
        [[1, 2, 3], [4, 5]],
        lengths=(1, 3),
        max_tokens=6,
        repeats=2,
        temp=temp,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (18, 18)  # three arms, two prompts, three times
    assert [arm.num_draft_tokens for arm in found.arms] == [0, 1, 3]
    plain, *drafting = found.arms
    assert plain.speedup == (1.0, 1.0, 1.0)
    for arm in drafting:
        low, middle, high = arm.speedup
        assert 0 < low <= middle <= high
        assert 0 < arm.host_seconds < 2 * arm.round_seconds
        assert arm.efficiency > 0
        assert len(arm.conditional_acceptance) <= arm.num_draft_tokens
    assert json.loads(json.dumps(found.to_dict()))["prompts"] == 2


def test_the_command(cli, refuses):
    arguments = ("bench", "-m", 6, "--repeats", 1, "-p", "def quote")
    code, out, err = cli(*arguments, "--num-draft-tokens", 2, "--num-draft-tokens", 1)
    assert (code, err) == (0, "")
    assert "pays at" in out
    told = json.loads(cli(*arguments, "--num-draft-tokens", 2, "--dequantize", "--json")[1])
    assert [arm["num_draft_tokens"] for arm in told["arms"]] == [0, 2]
    refuses("num_draft_tokens is 0", *arguments, "--num-draft-tokens", 0)
    refuses("repeats is 0", "bench", "--repeats", 0)
