"""OpenAI's Responses API: its own client, and what Codex sends (3.2: no other).

The model is scripted (`tests/scripted.py`): a prompt that ends in a cue is answered by its script.
"""

import json
import socket
import time
from itertools import pairwise

import openai
import pytest
from scripts import CITY, SCRIPTS, TOOLS

from serving import JSON, PATIENCE, fetch, post

FUNCTIONS = [{"type": "function", "strict": False} | tool["function"] for tool in TOOLS]
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'},
}
NAMESPACE = {
    "type": "namespace",
    "name": "crm",
    "description": "The customers.",
    "tools": [{"type": "function", "name": "find", "parameters": {"type": "object"}}],
}


@pytest.fixture(scope="module")
def client(scripted):
    return openai.OpenAI(base_url=scripted.url, api_key="none", max_retries=0, timeout=PATIENCE)


def bare(item):
    """An item without what is new in each response."""
    kept = item.model_dump(exclude_none=True, exclude={"id", "call_id", "parsed_arguments"})
    for part in kept.get("content", []):
        part.pop("parsed", None)
    return kept


def ask(client, given, **keywords):
    """Asks twice, streamed and whole; returns the response, and the events."""
    keywords = {"model": "scripted", "max_output_tokens": 400, "tools": FUNCTIONS} | keywords
    whole = client.responses.create(input=given, **keywords)
    events = [*client.responses.create(input=given, stream=True, **keywords)]
    streamed = events[-1].response
    assert [bare(item) for item in streamed.output] == [bare(item) for item in whole.output]
    assert (streamed.status, streamed.usage.output_tokens) == (
        whole.status,
        whole.usage.output_tokens,
    )
    check_events(events)
    return whole, events


def check_events(events):
    """Events are numbered, item ids are the final object's, and deltas add up to its texts."""
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    assert {event.response.id for event in events if hasattr(event, "response")} == {final.id}
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.item for event in done] == final.output
    assert [event.output_index for event in done] == [*range(len(done))]
    added = [event.item.id for event in events if event.type == "response.output_item.added"]
    assert added == [item.id for item in final.output]
    for item in final.output:
        own = [event for event in events if getattr(event, "item_id", None) == item.id]
        deltas = "".join(event.delta for event in own if event.type.endswith(".delta"))
        text = {
            "message": lambda item: item.content[0].text,
            "reasoning": lambda item: item.content[0].text,
            "function_call": lambda item: item.arguments,
            "custom_tool_call": lambda item: item.input,
        }[item.type](item)
        assert deltas == text


def test_text(client):
    response, events = ask(client, "How is it? [[sunny]]", instructions="Be brief.")
    assert response.output_text == "It is sunny there."
    assert (response.status, response.object) == ("completed", "response")
    assert response.instructions == "Be brief."
    assert events[-1].type == "response.completed"
    again, _ = ask(client, "How is it? [[sunny]]", instructions="Be brief.")
    assert again.usage.input_tokens_details.cached_tokens > 0.9 * again.usage.input_tokens  # 3.22


def test_a_round_trip_of_tools(client):
    given = [{"role": "user", "content": [{"type": "input_text", "text": "Well? [[weather]]"}]}]
    response, _ = ask(client, given)
    message, call = response.output
    assert message.content[0].text == "I look it up."
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "get_weather",
        CITY,
    )
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "[[sunny]]"}
    history = [*given, *(item.model_dump() for item in response.output), output]
    second, _ = ask(client, history)
    assert second.output_text == "It is sunny there."


def test_several_calls_and_one(client):
    response, _ = ask(client, "[[both]]")
    assert [item.name for item in response.output] == ["get_weather", "get_time"]
    response, _ = ask(client, "[[both]]", parallel_tool_calls=False)
    assert [item.name for item in response.output] == ["get_weather"]


def test_whether_a_tool_is_called(client, scripted):
    response, _ = ask(client, "[[weather]]", tool_choice="none")
    assert response.output_text == SCRIPTS["[[weather]]"]
    response, _ = ask(client, "Anything.", tool_choice="required")
    assert json.loads(response.output[0].arguments) == {"zone": "forced"}
    named = {"type": "function", "name": "get_weather"}
    response, _ = ask(client, "Anything.", tool_choice=named)
    assert json.loads(response.output[0].arguments) == {"city": "forced"}


def test_custom_and_namespaced_tools(client):
    """serving.md 3.2: Codex's `namespace` tools were discarded."""
    given = [{"role": "user", "content": "[[patch]]"}]
    response, _ = ask(client, given, tools=[PATCH, {"type": "web_search"}])
    (call,) = response.output
    assert (call.type, call.name) == ("custom_tool_call", "apply_patch")
    assert call.input == '*** Begin Patch\n+é "x"\n*** End Patch'
    output = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "[[sunny]]"}
    second, _ = ask(client, [*given, call.model_dump(), output], tools=[PATCH])
    assert second.output_text == "It is sunny there."

    given = [{"role": "user", "content": "[[namespaced]]"}]
    response, _ = ask(client, given, tools=[*FUNCTIONS, NAMESPACE])
    (call,) = response.output
    assert (call.namespace, call.name, json.loads(call.arguments)) == ("crm", "find", {"id": 5})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "[[sunny]]"}
    second, _ = ask(client, [*given, call.model_dump(), output], tools=[NAMESPACE])
    assert second.output_text == "It is sunny there."


def test_reasoning(client):
    response, _ = ask(client, "[[think]]")
    thought, message = response.output
    assert thought.type == "reasoning"
    assert thought.content[0].text == "First <tool_call> second third fourth."  # 3.13
    assert message.content[0].text == "So it is five."
    details = response.usage.output_tokens_details
    assert 0 < details.reasoning_tokens < response.usage.output_tokens
    items = [item.model_dump() for item in response.output]
    history = [{"role": "user", "content": "a"}, *items, {"role": "user", "content": "[[sunny]]"}]
    assert ask(client, history)[0].output_text == "It is sunny there."
    body = {"chat_template_kwargs": {"open_thinking": True}, "thinking_budget": 2}
    response, _ = ask(client, "Odd?", extra_body=body, reasoning={"effort": "high"})
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output_text == "Enough of that."
    response, _ = ask(client, "[[sunny]]", extra_body=body, reasoning={"effort": "none"})
    assert [item.type for item in response.output] == ["message"]


def test_an_answer_cut_by_the_limit(client):
    """serving.md 3.8."""
    for cue, kind in (("[[write]]", "function_call"), ("[[sunny]]", "message")):
        response, events = ask(client, cue, max_output_tokens=20 if cue == "[[write]]" else 2)
        assert (response.status, events[-1].type) == ("incomplete", "response.incomplete")
        assert response.incomplete_details.reason == "max_output_tokens"
        assert (response.output[-1].type, response.output[-1].status) == (kind, "incomplete")


def test_what_is_no_call_is_text(client):
    """serving.md 3.10."""
    response, _ = ask(client, "[[garbled]]")
    assert response.output_text == SCRIPTS["[[garbled]]"]
    whole = client.responses.create(model="scripted", input="[[broken]]", tools=FUNCTIONS)
    assert whole.output_text == SCRIPTS["[[broken]]"]
    events = [
        *client.responses.create(model="scripted", input="[[broken]]", tools=FUNCTIONS, stream=True)
    ]
    check_events(events)
    assert events[-1].response.output_text == SCRIPTS["[[broken]]"]


def test_the_clients_own_stream(client):
    with client.responses.stream(model="scripted", input="[[weather]]", tools=FUNCTIONS) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.delta") > 2
    assert final.output[1].name == "get_weather"


def test_what_is_refused_is_named(scripted):
    for body, named in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a", "strict": "yes"}]}, "tools[0].strict"),
        ({"tools": [NAMESPACE | {"tools": [{"type": "mcp"}]}]}, "tools[0].tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format.schema"),
    ):
        answered = post(f"{scripted.url}/responses", {"input": "a"} | body)
        assert answered.status == 400
        assert answered.error["param"].startswith(named)
        assert named in answered.error["message"]


CODEX = {
    "model": "scripted",
    "instructions": "You are a coding agent. " * 300,
    "tools": [
        {
            "type": "function",
            "name": f"tool{i}",
            "description": "What it does, at length. " * 20,
            "strict": False,
            "parameters": {
                "type": "object",
                "properties": {f"key{k}": {"type": "string"} for k in range(5)},
                "required": ["key0"],
                "additionalProperties": False,
            },
        }
        for i in range(17)
    ]
    + [PATCH, NAMESPACE, {"type": "web_search", "external_web_access": False}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-session",
    "text": {"verbosity": "medium"},
    "client_metadata": {"x-codex-installation-id": "a"},
}
"""Written by hand from the API's public schema, in the shape of what Codex sends."""


def codex(turns, beginning="Look at the files."):
    """A request after some turns with outputs of 10k characters each."""

    def message(role, *texts):
        content = [{"type": "input_text", "text": text} for text in texts]
        return {"type": "message", "role": role, "content": content}

    given = [
        message("developer", "<permissions>Files may be written.</permissions>"),
        message("user", "<environment_context><cwd>/a</cwd></environment_context>"),
        message("user", beginning),
    ]
    for i in range(turns):
        thought = {"type": "reasoning", "summary": [], "encrypted_content": None}
        thought["content"] = [{"type": "reasoning_text", "text": "I should look."}]
        arguments = json.dumps({"key0": "cat a.py"})
        call = {"type": "function_call", "name": "tool1", "arguments": arguments}
        output = {"type": "function_call_output", "output": f"{i} " + "a line of a file\n" * 600}
        given += [thought, call | {"call_id": f"call_{i}"}, output | {"call_id": f"call_{i}"}]
    return CODEX | {"input": [*given, message("user", "[[sunny]]")]}


def last_of(answered):
    (line,) = [x for x in answered.body.splitlines() if x.startswith(b"data: ")][-1:]
    return json.loads(line.removeprefix(b"data: "))


def test_codex_is_answered_and_cached(scripted):
    """serving.md 3.20: the system prompt is never reused."""
    usages = []
    for turns in range(3):
        answered = post(f"{scripted.url}/responses", codex(turns), JSON | {"session_id": "a"})
        assert answered.status == 200, answered.body
        last = last_of(answered)
        assert last["type"] == "response.completed"
        assert last["response"]["output"][0]["content"][0]["text"] == "It is sunny there."
        usages.append(last["response"]["usage"])
    for before, after in pairwise(usages):
        cached = after["input_tokens_details"]["cached_tokens"]
        assert cached > 0.95 * before["input_tokens"]


def test_codex_is_cancelled_cleanly(scripted):
    raw = json.dumps(codex(4, "Another beginning, which nobody has read.")).encode()
    host, _, port = scripted.root.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        head = f"POST /v1/responses HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        received = connection.recv(1000)
    assert b"200" in received.splitlines()[0]
    deadline = time.monotonic() + PATIENCE
    while b"mlx_drift_running 0.0" not in fetch(f"{scripted.root}/metrics").body:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert last_of(post(f"{scripted.url}/responses", codex(0)))["type"] == "response.completed"
