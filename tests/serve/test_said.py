"""Answers told apart: text, reasoning, calls; on streams of tokens, whatever they are cut into."""

import importlib
import json
import random
from types import SimpleNamespace

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from scripts import WRITTEN

from mlx_drift.serve.json_object import JsonObject
from mlx_drift.serve.said import (
    Blocks,
    CallArguments,
    CallBegan,
    CallEnded,
    Reasoning,
    Speech,
    Text,
    joined,
)
from mlx_drift.serve.wording import Wording

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
    for name in ("look", "write")
]


class Pieces(TokenizerWrapper):
    """A tokenizer whose tokens are pieces of a text."""

    def __init__(self, parser=None, thinks=False):
        self._tokenizer = SimpleNamespace(init_kwargs={"tool_parser_type": parser})
        self._think_start, self._think_end = ("<think>", "</think>") if thinks else (None, None)
        self._structural_markers = ()
        self._response_format = {}
        self._tool_call_start = self._tool_call_end = self._tool_parser = None
        if parser is not None:
            module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
            self._tool_call_start, self._tool_call_end = (
                module.tool_call_start,
                module.tool_call_end,
            )
            self._tool_parser = module.parse_tool_call
        self.last_segment = ""

    @property
    def detokenizer(self):
        return self

    def add_token(self, token):
        self.last_segment = token

    def finalize(self):
        self.last_segment = ""


def cut(text, rng):
    while text:
        size = rng.randint(1, 9)
        yield text[:size]
        text = text[size:]


def tell(text, parser="json_tools", *, stop=(), is_cut=False, seed=0, thinks=True, **speech):
    """Tells a text apart that comes in random pieces; returns the wording and what was said."""
    speech = Speech(**({"tools": TOOLS} | speech))
    wording = Wording(Pieces(parser, thinks), stop, speech)
    said = []
    for piece in cut(text, random.Random(seed)):
        said += wording.add(piece)
        if wording.is_over:
            break
    return wording, joined(said + wording.end(is_cut=is_cut))


def calls(said):
    """The calls of an answer: name, and arguments as a client reads them."""
    blocks = Blocks()
    for one in said:
        blocks.add(one)
    return [(b.name, json.loads(b.text)) for b in blocks.every if b.kind is CallBegan]


@pytest.mark.parametrize("parser", WRITTEN)
def test_calls_of_every_format(parser):
    for seed in range(5):
        wording, said = tell(f"I look.\n{WRITTEN[parser]}", parser, seed=seed)
        assert said[0] == Text("I look.")
        assert calls(said) == [("look", {"a": 5})]
        assert (said[-1], wording.calls, len({type(s) for s in said})) == (CallEnded(True), 1, 4)
        (began,) = (s for s in said if isinstance(s, CallBegan))
        assert began.id  # serving.md 3.11: LM Studio's were empty
        assert len(began.id) == 9 or parser != "mistral"


@pytest.mark.parametrize("parser", WRITTEN)
def test_several_calls(parser):
    text = WRITTEN[parser] + "\n" + WRITTEN[parser].replace("look", "write")
    wording, said = tell(text, parser)
    assert calls(said) == [("look", {"a": 5}), ("write", {"a": 5})]
    assert len({s.id for s in said if isinstance(s, CallBegan)}) == 2
    wording, said = tell(text, parser, calls_once=True)  # `parallel_tool_calls` is false
    assert wording.is_over
    assert calls(said) == [("look", {"a": 5})]


def test_one_call_of_a_payload_with_several():
    for parser, text in {
        "pythonic": "<|tool_call_start|>[look(a=5), write(a=6)]<|tool_call_end|>",
        "kimi_k2": WRITTEN["kimi_k2"].replace(
            "<|tool_calls_section_end|>",
            '<|tool_call_begin|>functions.write:1<|tool_call_argument_begin|>{"a": 6}'
            "<|tool_call_end|><|tool_calls_section_end|>",
        ),
    }.items():
        assert calls(tell(text, parser)[1]) == [("look", {"a": 5}), ("write", {"a": 6})]
        assert calls(tell(text, parser, calls_once=True)[1]) == [("look", {"a": 5})]


def test_arguments_come_as_they_are_written():
    """serving.md 3.6: arguments that come at the end alone let clients time out."""
    wording = Wording(Pieces("json_tools"), (), Speech(tools=TOOLS))
    content = "line\\n" * 200
    text = f'<tool_call>\n{{"name": "write", "arguments": {{"a": "{content}"}}}}\n</tool_call>'
    pieces = [said for piece in cut(text, random.Random(1)) for said in wording.add(piece)]
    assert sum(isinstance(said, CallArguments) for said in pieces) > 100
    assert isinstance(pieces[0], CallBegan)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "payload",
    [
        "\nI would call a tool here.\n",
        '\n{"name": "look"}\n',
        '\n{"arguments": {}}\n',
        "\n[1, 2]\n",
        '\n{"name": 5, "arguments": {"a": 5}}\n',
        '\n{"name": "look", "arguments": [5]}\n',
        '\n{"name": "look", "arguments": "{"}\n',
        '\n{"name": "look", "arguments": {"a": nan}}\n',
        '\n{"name": "look", "arguments": {a: 5}}\n',
        '\n{"name": "look", "arguments": {"a": 5,}}\n',
        '\n{"name": "look", "arguments": {"a": <b>}}\n',
        '\n{"name": "look", "arguments": {"a": 5}\n',
        "",
        "{" * 5000,
    ],
)
def test_a_payload_that_is_no_call_is_text(payload, seed):
    """serving.md 3.10: a payload that is not JSON crashes the request."""
    text = f"Well. \n<tool_call>{payload}</tool_call> So."
    wording, said = tell(text, seed=seed)
    shown = "".join(one.text for one in said if isinstance(one, Text))
    if '{"a": 5}' in payload and "look" in payload:  # the arguments were whole: no brace is missed
        assert calls(said) == [("look", {"a": 5})]
        return
    assert shown == text
    assert wording.calls == 0
    for one in said:
        assert one != CallEnded(True)


@pytest.mark.parametrize("parser", WRITTEN)
def test_a_call_cut_by_the_limit_is_never_whole_with_less_than_it_says(parser):
    """serving.md 3.8: a call cut by `max_tokens` drops the connection."""
    text = WRITTEN[parser]
    for end in range(1, len(text)):
        wording, said = tell(text[:end], parser, is_cut=True, seed=end)
        for name, arguments in calls(said) if wording.calls else []:
            assert (name, arguments) == ("look", {"a": 5}), text[:end]
        began = sum(isinstance(one, CallBegan) for one in said)
        assert began == sum(isinstance(one, CallEnded) for one in said)
        if not began:  # nothing is lost
            shown = "".join(one.text for one in said)
            assert shown.strip() == text[:end].strip()


def test_no_end_marker():
    """serving.md 3.9: Mistral's calls end with the answer."""
    _, said = tell('[TOOL_CALLS]look[ARGS]{"a": 5}[TOOL_CALLS]write[ARGS]{"a": 6}', "mistral")
    assert calls(said) == [("look", {"a": 5}), ("write", {"a": 6})]
    old = '[TOOL_CALLS][{"name": "look", "arguments": {"a": 5}, "id": "abcdefghi"}]'
    _, said = tell(old, "mistral")
    assert calls(said) == [("look", {"a": 5})]
    assert said[0] == CallBegan("abcdefghi", "look")
    _, said = tell('<tool_call>{"name": "look", "arguments": {"a": 5}}')  # ended by a stop token
    assert calls(said) == [("look", {"a": 5})]


def test_a_marker_within_an_argument_is_part_of_it():
    arguments = {"a": '</tool_call> \\ " é \n <tool_call>'}
    written = json.dumps({"name": "write", "arguments": arguments})
    for seed in range(10):
        _, said = tell(f"<tool_call>{written}</tool_call>", seed=seed)
        assert calls(said) == [("write", arguments)]


def test_reasoning():
    for seed in range(10):
        _, said = tell("<think>\nHm <tool_call> hm.\n</think>\n\nYes.\n", seed=seed)
        # serving.md 3.13: a marker of calls within reasoning stays there
        assert said == [Reasoning("Hm <tool_call> hm."), Text("Yes.\n")]
        _, said = tell("Hm.</think>Yes.", begins_in_reasoning=True, seed=seed)
        assert said == [Reasoning("Hm."), Text("Yes.")]
        _, said = tell("Hm", begins_in_reasoning=True, is_cut=True, seed=seed)
        assert said == [Reasoning("Hm")]
        call = '<tool_call>{"name": "look", "arguments": {"a": 5}}</tool_call>'
        _, said = tell(f"<think>Hm.</think>\n\n{call}\n", seed=seed)
        assert said[0] == Reasoning("Hm.")
        assert isinstance(said[1], CallBegan)
        assert calls(said) == [("look", {"a": 5})]


def test_stop_texts_are_of_the_text_alone():
    wording, said = tell("<think>a stop b</think>c stop d", stop=["stop"])
    assert said == [Reasoning("a stop b"), Text("c ")]
    assert (wording.stopped, wording.is_over) == ("stop", True)
    call = '<tool_call>{"name": "look", "arguments": {"a": "stop"}}</tool_call>'
    wording, said = tell(call, stop=["stop"])
    assert (wording.stopped, calls(said)) == (None, [("look", {"a": "stop"})])


def test_what_is_not_asked_for_is_text():
    text = 'a <tool_call>{"name": "look", "arguments": {}}</tool_call> \n'
    _, said = tell(text, tools=())
    assert said == [Text(text)]
    _, said = tell("a <think> b \n", thinks=False, tools=())
    assert said == [Text("a <think> b \n")]


def test_an_object_is_passed_on_as_far_as_it_is_one():
    rng = random.Random(3)
    values = [
        {},
        {"a": []},
        {"a": [1, -2.5e-7, True, None, {"b": 'é\n\\"\u2028'}], "": {"c": [[], {}, ""]}},
        {"long": "x" * 300, "n": 10**30},
    ]
    for value in values * 20:
        text = json.dumps(value, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        reader, passed = JsonObject(), ""
        for piece in cut(text + " rest", rng):
            passed += reader.add(piece)
            assert (text + " rest").startswith(passed)
        assert (reader.is_whole, reader.is_broken) == (True, False)
        assert (passed, reader.rest) == (text, " rest")


def test_an_object_agrees_with_the_standard_library_on_what_is_none():
    rng = random.Random(5)
    whole = '{"a": [1, -2.5e+7, true, null, {"b": "\\u00e9\\n x"}], "c": {"d": ""}}'
    for _ in range(3000):
        at = rng.randrange(1, len(whole))
        spoilt = (
            whole[:at] + rng.choice(' {}[]",:0-.e1tn\\\n\x01') + whole[at + rng.randint(0, 2) :]
        )
        reader = JsonObject()
        passed = "".join(reader.add(piece) for piece in cut(spoilt + " ", rng))
        try:
            end = json.JSONDecoder(parse_constant=lambda name: 1 / 0).raw_decode(spoilt)[1]
        except (ValueError, ZeroDivisionError):
            assert not reader.is_whole, spoilt
            continue
        assert (reader.is_whole, passed) == (True, spoilt[:end]), spoilt
