"""What forces the end of reasoning and the start of a call, in rounds as in plain decoding."""

import mlx.core as mx
import pytest

from mlx_drift import stream_generate
from mlx_drift.decode.stateless import is_stateless
from mlx_drift.serve.steering import Opening, ThinkingBudget
from tiny import VOCAB, NoText, tiny_drafter, tiny_llama

PROMPT = [5, 6, 7]


def said(processor, count=14, k=3):
    model = tiny_llama()
    drafter = tiny_drafter(model)
    keywords = {"logits_processors": [processor]} if processor else {}
    responses = stream_generate(
        model,
        NoText(),
        PROMPT,
        drafter=drafter,
        max_tokens=count,
        num_draft_tokens=k,
        **keywords,
    )
    return [response.token for response in responses]


def reference(processor, count=14):
    """The same one token at a time, by the model alone."""
    model, tokens = tiny_llama(), list(PROMPT)
    for _ in range(count):
        logits = processor(mx.array(tokens), model(mx.array([tokens]))[:, -1])
        tokens.append(int(mx.argmax(logits, axis=-1).item()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("end", [(40,), (40, 41, 42)])
@pytest.mark.parametrize("start", [(), (2,)])
@pytest.mark.parametrize("budget", [0, 5])
def test_a_budget_ends_reasoning(end, start, budget):
    free = said(None)
    starts = free[:1] if start else ()  # the answer begins with it by itself
    processor = ThinkingBudget(len(PROMPT), budget, starts, end)
    assert is_stateless(processor)
    tokens = said(processor)
    assert tokens == reference(processor)
    at = budget + len(starts)
    assert tokens[:at] == free[:at]
    assert tuple(tokens[at : at + len(end)]) == end
    assert said(ThinkingBudget(len(PROMPT), budget, (63, 63, 63), end)) == free  # never began
    by_itself = tuple(free[2:4])
    assert said(ThinkingBudget(len(PROMPT), 6, (), by_itself)) == free  # had ended


@pytest.mark.parametrize("tokens", [(9,), (9, 10, 11, 12, 13)])
def test_an_opening_comes_first_or_after_reasoning(tokens):
    processor = Opening(len(PROMPT), tokens)
    assert is_stateless(processor)
    assert tuple(said(processor)[: len(tokens)]) == tokens
    assert said(processor) == reference(processor)
    free = said(None)
    end = tuple(free[4:6])
    after = Opening(len(PROMPT), tokens, end)
    found = said(after)
    assert found == reference(after)
    at = next(i for i in range(len(free)) if tuple(free[i : i + 2]) == end) + 2
    assert found[:at] == free[:at]
    assert tuple(found[at : at + len(tokens)]) == tokens
    never = (VOCAB - 1,) * 4
    assert said(Opening(len(PROMPT), tokens, never)) == free
