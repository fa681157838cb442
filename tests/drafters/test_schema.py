"""Configs of every kind with wrong values: what is told of them."""

import re

import pytest

from kinds import KINDS, random_head
from mlx_drift import DriftError
from mlx_drift.drafters.config import config_from_dict
from tiny import tiny_llama

WRONG = ("x", -1, 0, 2**40, 1.5, None, [], [10**5], {}, True, 1e30, float("nan"))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_value_is_told_in_jsons_words(kind, model):
    good = random_head(kind, model).config.to_dict()
    told = []
    for key in good:
        for value in WRONG:
            try:
                config_from_dict(good | {key: value})
            except DriftError as error:
                told.append((key, str(error)))
    assert all(key in line for key, line in told)
    expected = " ".join(line.partition("; expected ")[2] for _, line in told)
    assert len(told) > 5 * len(good)
    assert not re.search(r"\b(int|float|str|bool|tuple|dict|Literal|Optional|None)\b", expected)


def test_a_choice_is_told_with_what_may_be_chosen(model):
    good = random_head("dspark rnn", model).config.to_dict()
    with pytest.raises(DriftError, match="markov = 'x'; expected vanilla or gated or rnn or null"):
        config_from_dict(good | {"markov": "x"})
    with pytest.raises(DriftError, match=r"taps = 'x'; expected a list of whole numbers"):
        config_from_dict(good | {"taps": "x"})
    with pytest.raises(DriftError, match=r"full_attention_layers is \[2\], but there are 2 layers"):
        config_from_dict(good | {"full_attention_layers": [2]})
