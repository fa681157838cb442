"""Calls of tools by grammar: what mlx-lm's parser reads, with arguments that fit their schema."""

import json

import jsonschema
import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers.json_tools import parse_tool_call, tool_call_end, tool_call_start
from transformers import AddedToken, PreTrainedTokenizerFast

from mlx_drift import Grammar, load_demo, stream_generate
from mlx_drift.demo import TARGET
from mlx_drift.grammar.tools import calls
from schemas import DIGIT, SCHEMAS, closed

F = closed(a=DIGIT)
TOOLS = {"f": F, "deep.g": SCHEMAS["recursive"], "free": {"type": "object"}}
SENT = [2, 3, 4]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call>'
OTHER = CALL.replace('"f"', '"free"').replace('"a"', '"anything"')


def own_tokenizer(marks):
    own = PreTrainedTokenizerFast.from_pretrained(TARGET)
    own.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return TokenizerWrapper(
        own,
        tool_call_start=tool_call_start,
        tool_call_end=tool_call_end,
        tool_parser=parse_tool_call,
    )


@pytest.fixture(scope="module", params=["marks are tokens", "marks are text"])
def tokenizer(request):
    is_token = request.param == "marks are tokens"
    return own_tokenizer((tool_call_start, tool_call_end) if is_token else ())


def holds(tokenizer, grammar, text):
    """Whether an answer may be a text, whole."""
    follow = grammar.processor(tokenizer, SENT)
    answer = [*tokenizer.encode(text, add_special_tokens=False), *tokenizer.eos_token_ids]
    return follow.count_possible(mx.array(SENT), answer) == len(answer)


def test_an_answer_may_call(tokenizer):
    grammar = calls(tokenizer, TOOLS)
    for text in ("hello", "", CALL, f"Well.\n{CALL}", f"{CALL}\n{OTHER}", f'{{"a": 1}}{CALL} so'):
        assert holds(tokenizer, grammar, text), text
    for wrong in (
        CALL.replace("3", "33"),
        CALL.replace('"a"', '"b"'),
        CALL.replace('"f"', '"unknown"'),
        f"Well. {CALL[:-20]}",
        "<tool_call>no JSON</tool_call>",
    ):
        assert not holds(tokenizer, grammar, wrong), wrong


def test_a_mark_that_is_spelled_out_is_one(tokenizer):
    grammar = calls(tokenizer, TOOLS)
    follow = grammar.processor(tokenizer, SENT)
    spelled = [
        token
        for part in ("so <tool", "_call>", '\n{"name": "f", "arguments": {"b')
        for token in tokenizer.encode(part, add_special_tokens=False)
    ]
    last = tokenizer.encode("b", add_special_tokens=False)
    assert spelled[-1:] == last
    assert follow.count_possible(mx.array(SENT), spelled) == len(spelled) - 1


def test_an_answer_must_call(tokenizer):
    grammar = calls(tokenizer, TOOLS, must_call=True)
    assert holds(tokenizer, grammar, CALL)
    assert holds(tokenizer, grammar, f"{CALL}\n{OTHER}")
    for wrong in ("hello", "", f"Well. {CALL}", f"{CALL} so", CALL.replace("3", "33")):
        assert not holds(tokenizer, grammar, wrong), wrong


def test_an_answer_is_a_call_or_json(tokenizer):
    grammar = calls(tokenizer, TOOLS, otherwise=Grammar.json_schema(SCHEMAS["array"]))
    assert holds(tokenizer, grammar, CALL)
    assert holds(tokenizer, grammar, "[1, 2]")
    for wrong in ("hello", "[1]", f"[1, 2]{CALL}", f"Well. {CALL}"):
        assert not holds(tokenizer, grammar, wrong), wrong


def test_spaces_and_references_are_the_schemas_own(tokenizer):
    grammar = calls(tokenizer, TOOLS)
    deep = '{"name": "deep.g", "arguments": {"value": 1, "children": []}}'
    assert holds(tokenizer, grammar, f"<tool_call>\n{deep}\n</tool_call>")
    assert not holds(tokenizer, grammar, CALL.replace('{"a": 3}', '{ "a":3 }'))
    own = calls(tokenizer, {"f": F | {"x-guidance": {"whitespace_flexible": True}}})
    assert holds(tokenizer, own, CALL.replace('{"a": 3}', '{ "a": 3 }'))


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_what_a_model_says_is_a_call(temp):
    model, _, drafter = load_demo()
    tokenizer = own_tokenizer(())
    prompt = tokenizer.encode("Call it.")
    grammar = calls(tokenizer, {"f": F, "g": SCHEMAS["enum"]}, must_call=True)
    keywords = {"grammar": grammar, "temp": temp, "seed": 3}
    said = list(stream_generate(model, tokenizer, prompt, 120, drafter=drafter, **keywords))
    text = "".join(response.text for response in said)
    for written in text.split(tool_call_start)[1:]:
        body, end, _ = written.partition(tool_call_end)
        if end:
            call = parse_tool_call(body)
            jsonschema.validate(call["arguments"], {"f": F, "g": SCHEMAS["enum"]}[call["name"]])
    assert text.startswith(tool_call_start)
    assert text.count(tool_call_end) >= 1, json.dumps(text)
    if not temp:
        plain = stream_generate(model, tokenizer, prompt, 120, grammar=grammar)
        assert [r.token for r in plain] == [r.token for r in said]
