"""Anthropic's Messages API (serving.md 3.4: no such path): its own client, what Claude Code sends.

The model is scripted (`tests/scripted.py`): a prompt that ends in a cue is answered by its script.
"""

import json
import socket
import time
from itertools import pairwise

import anthropic
import pytest
from scripts import CITY, SCRIPTS, TOOLS

from mlx_drift.serve.api.messages_history import read_messages
from serving import JSON, PATIENCE, fetch, post, server

CUSTOM = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"]["description"],
        "input_schema": tool["function"]["parameters"],
    }
    for tool in TOOLS
]


@pytest.fixture(scope="module")
def client(scripted):
    return anthropic.Anthropic(
        base_url=scripted.root, api_key="none", max_retries=0, timeout=PATIENCE
    )


def user(text):
    return [{"role": "user", "content": text}]


def ask(client, messages, **keywords):
    """Asks twice, streamed and whole; returns the message, and the events."""
    messages = user(messages) if isinstance(messages, str) else messages
    keywords = {"model": "claude-opus-5", "max_tokens": 400, "tools": CUSTOM} | keywords
    whole = client.messages.create(messages=messages, **keywords)
    with client.messages.stream(messages=messages, **keywords) as stream:
        events = [*stream]
        streamed = stream.get_final_message()
    for one in (whole, streamed):
        for block in one.content:
            if block.type == "tool_use":
                assert block.id
                block.id = "id"
    plain = [
        [block.model_dump(exclude={"parsed_output"}, exclude_none=True) for block in one.content]
        for one in (whole, streamed)
    ]
    assert plain[0] == plain[1]
    assert whole.stop_reason == streamed.stop_reason
    assert whole.stop_sequence == streamed.stop_sequence
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    return whole, events


def test_text(client):
    message, events = ask(client, "How is it? [[sunny]]", tools=[])
    assert (message.model, message.role, message.type) == ("claude-opus-5", "assistant", "message")
    assert [block.text for block in message.content] == ["It is sunny there."]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]


def test_a_round_trip_of_tools(client):
    messages = user([{"type": "text", "text": "How is it? [[weather]]"}])
    message, _ = ask(client, messages)
    assert message.stop_reason == "tool_use"
    text, use = message.content
    assert text.text == "I look it up."
    assert (use.type, use.name, use.input) == ("tool_use", "get_weather", CITY)
    result = {
        "type": "tool_result",
        "tool_use_id": use.id,
        "content": [{"type": "text", "text": "[[sunny]]"}],
    }
    history = [*messages, {"role": "assistant", "content": message.content}]
    second, _ = ask(client, [*history, {"role": "user", "content": [result]}])
    assert second.content[0].text == "It is sunny there."
    assert second.usage.cache_read_input_tokens > second.usage.input_tokens  # 3.20, 3.22


@pytest.mark.parametrize(
    ("told", "read"),
    [("", "Error: "), ("no such file", "Error: no such file"), ("<tool_use_error>x", None)],
)
def test_a_result_that_failed_is_told_as_such(told, read):
    """What the template gets; an empty one would look as if all were well."""
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": told, "is_error": True}
    messages = [{"role": "assistant", "content": [use]}, *user([result])]
    assert read_messages(messages)[-1]["content"] == (told if read is None else read)
    result["is_error"] = False
    assert read_messages(messages)[-1]["content"] == told


def test_several_calls_and_one(client):
    message, _ = ask(client, "[[both]]")
    assert [block.name for block in message.content] == ["get_weather", "get_time"]
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message, _ = ask(client, "[[both]]", tool_choice=choice)
    assert [block.name for block in message.content] == ["get_weather"]
    assert message.stop_reason == "tool_use"


def test_whether_a_tool_is_called(client):
    message, _ = ask(client, "[[weather]]", tool_choice={"type": "none"})
    assert message.content[0].text == SCRIPTS["[[weather]]"]
    message, _ = ask(client, "Anything.", tool_choice={"type": "any"})
    assert message.content[0].input == {"zone": "forced"}
    choice = {"type": "tool", "name": "get_weather"}
    message, _ = ask(client, "Anything.", tool_choice=choice)
    assert message.content[0].input == {"city": "forced"}


def test_input_is_streamed(client):
    """serving.md 3.6."""
    message, events = ask(client, "[[write]]")
    parts = [e for e in events if e.type == "content_block_delta"]
    assert len(parts) > 50
    assert message.content[0].input["content"].count("\n") == 60


def test_a_call_cut_by_the_limit_ends_cleanly(client, scripted):
    """serving.md 3.8; the client's own reader of half an input does not fail on it."""
    for limit in (4, 30, 60):
        ask_whole = client.messages.create(
            model="claude-a", max_tokens=limit, messages=user("[[write]]"), tools=CUSTOM
        )
        assert ask_whole.stop_reason == "max_tokens"
        for block in ask_whole.content:
            assert block.type == "text" or block.input == {}
        with client.messages.stream(
            model="claude-a", max_tokens=limit, messages=user("[[write]]"), tools=CUSTOM
        ) as stream:
            assert stream.get_final_message().stop_reason == "max_tokens"


def test_what_is_no_call_is_text(client):
    """serving.md 3.10."""
    message, _ = ask(client, "[[garbled]]")
    assert message.content[0].text == SCRIPTS["[[garbled]]"]
    assert message.stop_reason == "end_turn"
    with client.messages.stream(
        model="claude-a", max_tokens=400, messages=user("[[broken]]"), tools=CUSTOM
    ) as stream:
        assert stream.get_final_message().stop_reason == "end_turn"


def test_thinking(client):
    message, _ = ask(client, "[[think]]")
    thought, text = message.content
    assert thought.thinking == "First <tool_call> second third fourth."  # 3.13
    assert thought.signature
    assert text.text == "So it is five."
    assert 0 < message.usage.output_tokens_details.thinking_tokens < message.usage.output_tokens
    history = [
        *user("[[think]]"),
        {"role": "assistant", "content": message.content},
        *user("[[sunny]]"),
    ]
    assert ask(client, history)[0].content[0].text == "It is sunny there."
    opens = {"extra_body": {"chat_template_kwargs": {"open_thinking": True}}}
    thinking = {"type": "enabled", "budget_tokens": 2}
    message, _ = ask(client, "Odd?", thinking=thinking, **opens)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[1].text == "Enough of that."
    message, _ = ask(client, "[[sunny]]", thinking={"type": "disabled"}, **opens)
    assert [block.type for block in message.content] == ["text"]


def test_stop_sequences(client):
    message, _ = ask(client, "[[stop]]", stop_sequences=["no such", " END"])
    assert message.content[0].text == "One two three"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " END")


def test_an_answer_goes_on_from_the_assistants_last_word(client):
    messages = [*user("How is it?"), {"role": "assistant", "content": "[[sunny]]"}]
    assert ask(client, messages)[0].content[0].text == "It is sunny there."


def test_a_message_may_be_empty(scripted):
    body = {"messages": user([]), "max_tokens": 1}
    assert post(f"{scripted.url}/messages", body).status == 200


def test_tokens_are_counted(client):
    keywords = {"model": "claude-a", "messages": user("[[sunny]]"), "tools": CUSTOM}
    counted = client.messages.count_tokens(system="Be brief.", **keywords)
    message = client.messages.create(max_tokens=1, system="Be brief.", **keywords)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_models(client):
    assert [model.id for model in client.models.list()] == ["scripted"]


def test_errors_are_written_as_the_client_reads_them(client, scripted):
    with pytest.raises(anthropic.BadRequestError, match="top_k") as refused:
        client.messages.create(
            model="claude-a", max_tokens=5, messages=user("a"), extra_body={"top_k": -1}
        )
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError, match="gpt-5"):
        client.messages.create(model="gpt-5", max_tokens=5, messages=user("a"))
    # Claude Code knows by these words that it must shorten the conversation.
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: the prompt has"):
        client.messages.create(model="claude-a", max_tokens=5, messages=user("a b " * 270_000))
    for body, named in (
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "a", "strict": 1}]}, "tools[0].strict"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"tools": [CUSTOM[0] | {"input_schema": {"a": "\ud800"}}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": user([{"type": "image", "source": {}}])}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content[0].text"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_1"}]}}, "context_management"),
    ):
        for path in ("messages", "messages/count_tokens"):
            answered = post(f"{scripted.url}/{path}", {"messages": user("a")} | body)
            assert (answered.status, answered.error["param"]) == (400, named)
            assert answered.json["type"] == "error"


CLAUDE_CODE = {
    "model": "claude-opus-5",
    "max_tokens": 32000,
    "stream": True,
    "temperature": 1,
    "metadata": {"user_id": "user_0_account__session_0"},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "medium"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "tools": [
        {
            "name": f"Tool{i}",
            "description": "What it does, at length. " * 30,
            "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {f"key{k}": {"type": "string"} for k in range(6)},
                "required": ["key0"],
                "additionalProperties": False,
            },
        }
        for i in range(20)
    ],
}
"""Written by hand from the API's public schema, in the shape of what Claude Code sends."""

EPHEMERAL = {"type": "ephemeral"}
HEADERS = JSON | {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    "x-app": "cli",
    "x-api-key": "none",
}


def claude_code(turns, number):
    """A request after some turns with results of 10k characters each."""
    messages = user(
        [
            {"type": "text", "text": "<system-reminder>As you answer ...</system-reminder>"},
            {"type": "text", "text": "Look at the files.", "cache_control": EPHEMERAL},
        ]
    )
    for i in range(turns):
        use = {"type": "tool_use", "id": f"toolu_{i}", "name": "Tool1", "input": {"key0": "a.py"}}
        told = f"{i} " + "some line of a file\n" * 500
        result = {"type": "tool_result", "tool_use_id": f"toolu_{i}", "content": told}
        messages += [{"role": "assistant", "content": [use]}, *user([result])]
    messages[-1]["content"].append({"type": "text", "text": "[[sunny]]"})
    system = [
        {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={number:05x};"},
        {
            "type": "text",
            "text": "You are an agent. " * 400,
            "cache_control": {"type": "ephemeral"},
        },
    ]
    return CLAUDE_CODE | {"system": system, "messages": messages}


def events_of(answered):
    return [
        json.loads(line.removeprefix(b"data: "))
        for line in answered.body.splitlines()
        if line.startswith(b"data: ")
    ]


def test_claude_code_is_answered_and_cached(scripted):
    """serving.md 3.1: the billing line changes with each request, and no prefix is met again."""
    read = []
    for number, turns in enumerate((0, 1, 2)):
        body = claude_code(turns, number)
        answered = post(f"{scripted.url}/messages?beta=true", body, HEADERS)
        assert answered.status == 200, answered.body
        events = events_of(answered)
        assert events[0]["type"] == "message_start"
        said = [
            e["delta"]["text"] for e in events if e.get("delta", {}).get("type") == "text_delta"
        ]
        assert "".join(said) == "It is sunny there."
        read.append(events[-2]["usage"])
    for before, after in pairwise(read):
        whole = before["input_tokens"] + before["cache_read_input_tokens"]
        assert after["cache_read_input_tokens"] > 0.95 * whole
    counted = post(
        f"{scripted.url}/messages/count_tokens",
        CLAUDE_CODE | {key: claude_code(2, 9)[key] for key in ("system", "messages")},
    )
    assert counted.status == 400  # max_tokens and stream are no keys of it


def test_claude_code_is_cancelled_cleanly(scripted):
    """It leaves in the middle of a prompt or an answer, and the next request is answered."""
    body = claude_code(3, 77)
    body["messages"][0]["content"][0]["text"] = "Another beginning, which nobody has read."
    raw = json.dumps(body).encode()
    host, _, port = scripted.root.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        head = f"POST /v1/messages HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        received = connection.recv(1000)
    assert b"200" in received.splitlines()[0]
    deadline = time.monotonic() + PATIENCE
    while b"mlx_drift_running 0.0" not in fetch(f"{scripted.root}/metrics").body:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert post(f"{scripted.url}/messages", claude_code(0, 78)).status == 200


def test_pings_while_nothing_is_said(scripted):
    """serving.md 3.7: after 120 silent seconds clients give up."""
    body = claude_code(6, 79)
    body["messages"][0]["content"][0]["text"] = "A third beginning."
    events = events_of(post(f"{scripted.url}/messages", body))
    assert [event["type"] for event in events].count("ping") > 1


def test_keys(tmp_path):
    with server("--api-key", "sesame") as running:
        body = {"messages": user("a"), "max_tokens": 1}
        url = f"{running.url}/messages"
        for shown in ({}, {"x-api-key": "no"}, {"Authorization": "Bearer no", "x-api-key": "a"}):
            answered = post(url, body, JSON | shown)
            assert answered.error["type"] == "authentication_error"
        for shown in (
            {"x-api-key": "sesame"},
            {"Authorization": "Bearer sesame"},
            {"Authorization": "Bearer no", "x-api-key": "sesame"},
        ):
            assert post(url, body, JSON | shown).status == 200
