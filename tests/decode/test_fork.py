"""Which processors keep a state, which of those can be forked, and what a round costs without."""

import warnings
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_drift import DriftWarning
from mlx_drift.decode.accept import accept_matching
from mlx_drift.decode.chooser import Chooser
from mlx_drift.decode.fork import fork, unforkable
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.stateless import is_stateless
from mlx_drift.drafters.protocol import Draft
from stateful import (
    EOS,
    PROMPT,
    SIZE,
    Believed,
    Counter,
    Grammar,
    grammar,
    plain,
    say,
    small_llama,
    tokens_of,
)
from tiny import tiny_drafter


def counting():
    calls = 0

    def processor(tokens, logits):
        nonlocal calls
        calls += 1
        return mx.where(mx.arange(SIZE) == calls % EOS, logits, -mx.inf)

    return processor


calls_so_far: list[int] = []
number_of_calls = 0


def every_other(number, logits):
    return mx.where(mx.arange(SIZE) == 1 + number % 2, logits, -mx.inf)


def with_a_global_list(tokens, logits):
    calls_so_far.append(1)
    return every_other(len(calls_so_far), logits)


def with_a_global_number(tokens, logits):
    global number_of_calls
    number_of_calls += 1
    return every_other(number_of_calls, logits)


def with_a_default(tokens, logits, calls=[]):  # noqa: B006
    calls.append(1)
    return every_other(len(calls), logits)


def with_an_attribute(tokens, logits):
    with_an_attribute.calls = getattr(with_an_attribute, "calls", 0) + 1
    return every_other(with_an_attribute.calls, logits)


class Counting:
    def __init__(self, **held):
        self.calls = 0
        vars(self).update(held)

    def __call__(self, tokens, logits):
        self.calls += 1
        return every_other(self.calls, logits)


class InItsClass:
    calls: list[int] = []  # noqa: RUF012

    def __call__(self, tokens, logits):
        self.calls.append(1)
        return every_other(len(self.calls), logits)


class InAGlobal:
    def __call__(self, tokens, logits):
        global number_of_calls
        number_of_calls += 1
        return every_other(number_of_calls, logits)


class Refusing(Counting):
    def fork(self):
        raise NotImplementedError


def forget():
    global number_of_calls
    number_of_calls = 0
    for calls in (calls_so_far, InItsClass.calls, with_a_default.__defaults__[0]):
        calls.clear()
    vars(with_an_attribute).clear()


UNFORKABLE = {
    "a cell": counting,
    "a global list": lambda: with_a_global_list,
    "a global number": lambda: with_a_global_number,
    "a default": lambda: with_a_default,
    "an attribute": lambda: with_an_attribute,
    "a partial of one": lambda: partial(counting()),
    "in its class": InItsClass,
    "in a global": InAGlobal,
    "held": lambda: Counting(step=counting()),
    "a generator": lambda: Counting(held=iter(x for x in [1])),
    "refuses": Refusing,
}


@pytest.mark.parametrize("name", UNFORKABLE)
def test_what_cannot_be_forked_is_decoded_plainly(name):
    model = small_llama()
    make = UNFORKABLE[name]
    forget()
    expected = plain(model, PROMPT, make(), count=12)
    forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        responses = say(model, tiny_drafter(model), 3, make(), count=12)
    assert tokens_of(responses) == expected
    assert responses[-1].statistics.rounds == 0
    assert [w.category for w in caught] == [DriftWarning]
    assert "stateless = True" in str(caught[0].message)


def test_a_state_is_copied_once_for_all_who_share_it():
    shared = Counting()

    class Reader:
        __slots__ = ("counting", "network")

        def __call__(self, tokens, logits):
            return logits + self.counting.calls

    reader = Reader()
    reader.counting, reader.network = shared, nn.Module()
    forked, of_shared, method = fork([reader, shared, shared.__call__])
    assert forked.counting is of_shared is method.__self__ is not shared
    assert forked.network is reader.network
    of_shared(mx.array([1]), mx.zeros((1, SIZE)))
    assert (of_shared.calls, shared.calls) == (1, 0)


def test_llguidances_matcher_is_copied():
    processor = Grammar()
    processor(mx.array(PROMPT), mx.zeros((1, SIZE)))
    (forked,) = fork([processor])
    forked(mx.array([*PROMPT, 0]), mx.zeros((1, SIZE)))
    assert forked.may_come != processor.may_come == Grammar().allowed()


def test_what_a_wrapper_of_one_holds_is_copied_or_shared():
    """As outlines' processors do: matchers in a list, a tokenizer, a module, their own method."""
    llguidance = pytest.importorskip("llguidance")

    class Adapter:
        def __init__(self):
            self.library = np

    class Wrapper:
        def __init__(self):
            self.tokenizer = llguidance.LLTokenizer("byte")
            self.matchers = [grammar().deep_copy()]
            self.adapter, self.step = Adapter(), self.advance

        def advance(self, token):
            return self.matchers[0].consume_token(token)

        def __call__(self, tokens, logits):
            assert self.step(tokens[-1].item())
            return logits

    wrapper = Wrapper()
    (forked,) = fork([wrapper])
    forked(mx.array([0]), mx.zeros((1, SIZE)))
    fresh = grammar().compute_bitmask()
    assert forked.matchers[0].compute_bitmask() != fresh == wrapper.matchers[0].compute_bitmask()
    assert forked.tokenizer is wrapper.tokenizer


def biased(tokens, logits, bias=1.5):
    return logits + bias * (mx.arange(SIZE) == 2)


def scaled(factor):
    def processor(tokens, logits):
        logits[:, 1:3] = sum(x * factor for x in [logits[:, 1:3]])
        return biased(tokens, logits)

    return processor


def marked():
    processor = counting()
    processor.stateless = True
    return processor


PENALTIES = make_logits_processors({1: 2.0}, 1.1, 20, 0.3, 20, 0.2)


KEEPING_NOTHING = [*PENALTIES, make_sampler(1.0), make_sampler(0), biased, scaled(2.0), Believed()]
KEEPING_NOTHING += [mx.compile(biased), partial(biased, bias=3.0), marked()]
KEEPING_NOTHING += [lambda tokens, logits: mx.abs(logits)]


@pytest.mark.parametrize("function", KEEPING_NOTHING)
def test_what_keeps_nothing_is_seen_to(function):
    assert is_stateless(function)
    assert unforkable([function]) is None
    assert fork([function]) == [function]


def primitives(path, *arrays):
    mx.export_to_dot(str(path), *arrays)
    return path.read_text().count("shape=rectangle")


def test_mlx_lms_own_cost_a_round_their_own_work_alone(tmp_path):
    history, draft, logits = mx.array(PROMPT), mx.array([1, 2, 1]), mx.ones((4, SIZE))
    chooser = Chooser(Sampling(logits_processors=tuple(PENALTIES)), 3, history=history)
    mx.eval(history, draft, logits)
    rows = []
    for i in range(4):
        row = logits[i : i + 1]
        for processor in PENALTIES:
            seen = mx.concatenate([history, *(draft[j : j + 1] for j in range(i))])
            row = processor(seen, mx.array(row))
        rows.append(row)
    row = mx.concatenate(rows)
    row = row - mx.logsumexp(row, axis=-1, keepdims=True)
    decided = accept_matching(draft, mx.argmax(row, axis=-1))
    got = chooser.verify(Draft(draft), logits)
    # A round shares the slices of the draft between its rows.
    assert primitives(tmp_path / "got", *got) <= primitives(tmp_path / "own", decided, row)


@pytest.mark.parametrize("make", [*UNFORKABLE.values(), Counting, Counter, Grammar])
def test_what_may_keep_a_state_is_seen_to(make):
    assert not is_stateless(make())


def test_drawing_at_random_is_a_state():
    assert not is_stateless(lambda logits: mx.random.categorical(logits))
