"""Shares of the device, as numbers: no clock, no device."""

import random

from mlx_drift.serve.turns import Turns


def run(turns, seconds, until, can_go=lambda one: True):
    """Gives turns that take so long each; returns what everyone had."""
    had, clock = dict.fromkeys(seconds, 0.0), 0.0
    while clock < until:
        one = turns.next(can_go)
        turns.charge(one, seconds[one])
        had[one] += seconds[one]
        clock += seconds[one]
    return had


def test_shares_are_of_time_and_not_of_turns():
    turns = Turns()
    seconds = {"round": 0.01, "chunk": 0.2, "long chunk": 1.0}
    for one in seconds:
        turns.add(one)
    had = run(turns, seconds, 100)
    assert min(had.values()) > 0.95 * max(had.values())


def test_who_comes_late_starts_level():
    turns = Turns()
    turns.add("first")
    run(turns, {"first": 0.1}, 50)
    turns.add("second")
    had = run(turns, {"first": 0.1, "second": 0.1}, 10)
    assert abs(had["first"] - had["second"]) < 0.3


def test_waiting_earns_nothing():
    turns = Turns()
    turns.add("waits")
    turns.add("goes")
    run(turns, {"goes": 0.1}, 20, lambda one: one == "goes")
    had = run(turns, {"goes": 0.1, "waits": 0.1}, 10)
    assert abs(had["goes"] - had["waits"]) < 0.3
    assert turns.next(lambda one: False) is None
    turns.remove("goes")
    assert turns.next(lambda one: True) == "waits"
    assert len(turns) == 1


def test_shares_hold_while_others_come_and_go():
    rng, turns = random.Random(0), Turns()
    turns.add(0)
    had, fair = 0.0, 0.0
    for step in range(1, 5000):
        if rng.random() < 0.05:
            turns.add(step)
        present = list(turns)
        if len(present) > 4 and rng.random() < 0.2:
            turns.remove(rng.choice(present[1:]))
        one, seconds = turns.next(lambda one: True), rng.uniform(0.01, 0.3)
        turns.charge(one, seconds)
        had += seconds * (one == 0)
        fair += seconds / len(turns)
    assert abs(had / fair - 1) < 0.05
