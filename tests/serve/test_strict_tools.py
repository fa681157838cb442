"""Strict tools: their arguments fit their schema, whatever the model would rather say."""

import json

import openai
import pytest
from scripts import SCRIPTS, WRITTEN

from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.formats import response_format
from mlx_drift.serve.api.served import Defaults, Served
from mlx_drift.serve.api.tools import held_to, read_tools
from mlx_drift.target.load import load
from schemas import closed
from scripted import scripted_checkpoint
from serving import PATIENCE, server

TOWNS = closed(city={"enum": ["Bern", "Basel"]})
ALL_TOWNS = {"city": "Bern"}, {"city": "Basel"}
ZONES = closed(zone={"enum": ["UTC"]})


def tool(name, parameters, **keywords):
    function = {"name": name, "parameters": parameters, **keywords}
    return {"type": "function", "function": function}


STRICT = [tool("get_weather", TOWNS, strict=True), tool("get_time", ZONES, strict=True)]
FREE = tool("get_weather", TOWNS), tool("get_time", ZONES, strict=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scripted_checkpoint(tmp_path_factory.mktemp("model") / "scripted", SCRIPTS)


@pytest.fixture(scope="module")
def client(folder):
    with server("--model", folder, "--drafter", "prompt-lookup") as process:
        yield openai.OpenAI(base_url=process.url, api_key="none", max_retries=0, timeout=PATIENCE)
    assert process.returncode == 0, process.err
    assert "Traceback" not in process.err


def ask(client, text, tools, **keywords):
    messages = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(
        model="scripted", messages=messages, tools=tools, max_tokens=200, **keywords
    )
    return answer.choices[0]


def arguments(choice):
    assert choice.finish_reason == "tool_calls"
    return {c.function.name: json.loads(c.function.arguments) for c in choice.message.tool_calls}


def test_arguments_are_held_to_their_schema(client):
    said = arguments(ask(client, "[[weather]]", [*FREE]))
    assert said["get_weather"] not in ALL_TOWNS  # but what the script has
    choice = ask(client, "[[weather]]", STRICT, parallel_tool_calls=False)
    (town,) = arguments(choice).values()
    assert town in ALL_TOWNS
    assert choice.message.content == "I look it up."  # what comes before is free
    choice = ask(client, "[[sunny]]", STRICT)
    assert choice.message.content == "It is sunny there."


def test_a_call_that_must_be(client):
    once = {"parallel_tool_calls": False}
    said = arguments(ask(client, "Anything.", STRICT, tool_choice="required", **once))
    assert said in ({"get_time": {"zone": "UTC"}}, *({"get_weather": t} for t in ALL_TOWNS))
    named = {"type": "function", "function": {"name": "get_time"}}
    said = arguments(ask(client, "Anything.", STRICT, tool_choice=named, **once))
    assert said == {"get_time": {"zone": "UTC"}}


def test_json_beside_tools(client):
    """A call, or JSON: neither is lost for the other."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": ZONES}}
    said = ask(client, "[[sunny]]", [*FREE], response_format=form)
    if said.finish_reason == "stop":
        assert json.loads(said.message.content) == {"zone": "UTC"}
    else:
        assert arguments(said)


# What is refused.


@pytest.fixture(scope="module")
def served(folder):
    return Served("scripted", load(str(folder))[1], 5000, 2048, "the model", False, Defaults())


def refusal(served, tools, must_call=None, form=None):
    grammar = response_format(form, served)
    with pytest.raises(BadRequest) as refused:
        held_to(grammar, read_tools(tools), must_call, served, "response_format")
    return refused.value


def test_schemas_and_formats_that_cannot_be_held_to(served):
    bad = [tool("a", TOWNS), tool("b", {"type": "object", "uniqueItems": True}, strict=True)]
    refused = refusal(served, bad)
    assert refused.param == "tools[1]"
    assert "uniqueItems" in refused.message
    assert held_to(None, read_tools(bad[:1]), None, served, "response_format") is None
    regex = {"type": "regex", "pattern": "a"}
    assert "held to JSON alone" in refusal(served, STRICT, form=regex).message
    json_object = {"type": "json_object"}
    assert "contradict" in refusal(served, STRICT, "", json_object).message


@pytest.mark.parametrize("parser", sorted({*WRITTEN} - {"json_tools"}))
def test_families_whose_calls_are_no_json_between_marks(tmp_path, parser):
    folder = scripted_checkpoint(tmp_path / "model", {"[[a]]": WRITTEN[parser]}, parser)
    other = Served("other", load(str(folder))[1], 5000, 2048, "the model", False, Defaults())
    refused = refusal(other, STRICT)
    assert refused.param == "tools[0]"
    assert "calls of other are not JSON between marks" in refused.message
    assert refusal(other, [*FREE], form={"type": "json_object"}).param == "response_format"
