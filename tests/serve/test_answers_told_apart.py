"""chat/completions with tools and reasoning: OpenAI's own client, and what breaks others' servers.

The model is scripted (`tests/scripted.py`): a prompt that ends in a cue is answered by its script.
"""

import json

import openai
import pytest
from scripts import CITY, SCRIPTS, TOOLS, WRITTEN

from scripted import scripted_checkpoint
from serving import PATIENCE, post, server


@pytest.fixture(scope="module")
def client(scripted):
    return openai.OpenAI(base_url=scripted.url, api_key="none", max_retries=0, timeout=PATIENCE)


def ask(client, text, **keywords):
    keywords = {"tools": TOOLS, "max_tokens": 400} | keywords
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return client.chat.completions.create(model="scripted", messages=messages, **keywords)


def stream(client, text, **keywords):
    """Streams an answer; returns its chunks, and the message that the client makes of them."""
    keywords = {"tools": TOOLS, "max_tokens": 400} | keywords
    messages = [{"role": "user", "content": text}]
    with client.chat.completions.stream(model="scripted", messages=messages, **keywords) as events:
        chunks = [event.chunk for event in events if event.type == "chunk"]
        return chunks, events.get_final_completion().choices[0]


def test_a_round_trip_of_tools(client):
    question = {"role": "user", "content": "How is it? [[weather]]"}
    choice = ask(client, [question]).choices[0]
    # serving.md 3.12: "tool_call" or "stop" in its place
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look it up."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == CITY
    answer = choice.message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": call.id, "content": "[[sunny]]"}
    second = ask(client, [question, answer, result])
    assert second.choices[0].message.content == "It is sunny there."
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].message.tool_calls is None
    assert second.usage.prompt_tokens_details.cached_tokens > 100  # 3.20, 3.22


def test_streams_of_calls(client):
    for text in ("[[weather]]", "[[both]]", "[[think-call]]"):
        whole = ask(client, text).choices[0]
        chunks, streamed = stream(client, text)
        assert streamed.finish_reason == whole.finish_reason == "tool_calls"
        assert (streamed.message.content or None) == whole.message.content
        calls = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls]
        assert [
            (c.function.name, c.function.arguments) for c in streamed.message.tool_calls
        ] == calls
        deltas = [c.choices[0].delta for c in chunks if c.choices]
        parts = [part for delta in deltas for part in delta.tool_calls or []]
        # serving.md 3.11: `index` missing, empty `id`
        assert [part.index for part in parts] == sorted(part.index for part in parts)
        assert {part.index for part in parts} == {*range(len(calls))}
        ids = [part.id for part in parts if part.id]
        assert len({*ids}) == len(ids) == len(calls)
        # serving.md 3.5: empty deltas during calls
        for delta in deltas[1:-1]:
            assert delta.content or delta.tool_calls or delta.model_extra.get("reasoning_content")


def test_arguments_are_streamed(client):
    """serving.md 3.6: one long argument, and nothing heard of it until its end."""
    chunks, choice = stream(client, "[[write]]")
    parts = [part for c in chunks if c.choices for part in c.choices[0].delta.tool_calls or []]
    assert len(parts) > 50
    arguments = json.loads(choice.message.tool_calls[0].function.arguments)
    assert arguments["content"].count("\n") == 60


def test_a_call_cut_by_the_limit_ends_cleanly(client):
    """serving.md 3.8."""
    for limit in (4, 30, 60):
        whole = ask(client, "[[write]]", max_tokens=limit)
        chunks, _ = stream_raw(client, "[[write]]", max_tokens=limit)
        assert whole.choices[0].finish_reason == "length"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert whole.usage.completion_tokens == limit
        for call in whole.choices[0].message.tool_calls or []:
            with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
                json.loads(call.function.arguments)


def stream_raw(client, text, **keywords):
    keywords = {"tools": TOOLS, "max_tokens": 400} | keywords
    messages = [{"role": "user", "content": text}]
    chunks = list(
        client.chat.completions.create(model="scripted", messages=messages, stream=True, **keywords)
    )
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    return chunks, said


def test_a_payload_that_is_no_json_is_text(client):
    """serving.md 3.10: it crashes the request."""
    for cue in ("[[garbled]]", "[[broken]]"):
        choice = ask(client, cue).choices[0]
        assert choice.finish_reason == "stop"
        assert choice.message.tool_calls is None
        assert choice.message.content == SCRIPTS[cue]
        chunks, said = stream_raw(client, cue)
        assert said == choice.message.content
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_a_call_without_an_end_marker(client):
    """serving.md 3.9."""
    choice = ask(client, "[[unended]]").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Bern"}


def test_one_call_alone(client):
    assert len(ask(client, "[[both]]").choices[0].message.tool_calls) == 2
    choice = ask(client, "[[both]]", parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
    assert choice.finish_reason == "tool_calls"


def test_whether_a_tool_is_called(client, scripted):
    none = ask(client, "[[weather]]", tool_choice="none")
    assert none.choices[0].message.content == SCRIPTS["[[weather]]"]
    assert none.usage.prompt_tokens < ask(client, "[[weather]]").usage.prompt_tokens - 50
    forced = ask(client, "Anything.", tool_choice="required").choices[0]
    assert forced.finish_reason == "tool_calls"
    assert json.loads(forced.message.tool_calls[0].function.arguments) == {"zone": "forced"}
    named = {"type": "function", "function": {"name": "get_weather"}}
    forced = ask(client, "Anything.", tool_choice=named).choices[0]
    assert forced.message.tool_calls[0].function.name == "get_weather"
    assert json.loads(forced.message.tool_calls[0].function.arguments) == {"city": "forced"}
    thought = ask(
        client,
        "Anything.",
        tool_choice="required",
        extra_body={"chat_template_kwargs": {"open_thinking": True}, "thinking_budget": 2},
    ).choices[0]
    assert thought.message.model_extra["reasoning_content"]
    assert thought.finish_reason == "tool_calls"
    for tools, choice, named in (
        ([], "required", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "gone"}}, "gone"),
        ([TOOLS[0], TOOLS[0]], "auto", "get_weather"),
        ([{"type": "web_search"}], "auto", "tools[0].type"),
        ([{"type": "function", "function": {"name": "a b"}}], "auto", "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "a", "strict": 1}}], "auto", "strict"),
    ):
        body = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
        answered = post(f"{scripted.url}/chat/completions", body | {"tool_choice": choice})
        assert answered.status == 400
        assert named in answered.error["message"]


def test_reasoning_is_told_under_both_names(client):
    """serving.md 3.14: the field's name; 3.13: a marker of calls within reasoning."""
    message = ask(client, "[[think]]").choices[0].message
    reasoning = "First <tool_call> second third fourth."
    assert message.content == "So it is five."
    assert message.model_extra == {"reasoning_content": reasoning, "reasoning": reasoning}
    chunks, said = stream_raw(client, "[[think]]")
    assert said == "So it is five."
    for name in message.model_extra:
        parts = [c.choices[0].delta.model_extra.get(name) or "" for c in chunks if c.choices]
        assert "".join(parts) == reasoning
    thought = {"role": "assistant", "content": "So it is five.", "reasoning_content": reasoning}
    history = [{"role": "user", "content": "a"}, thought, {"role": "user", "content": "[[sunny]]"}]
    assert ask(client, history).choices[0].message.content == "It is sunny there."


def test_reasoning_that_the_prompt_begins(client):
    body = {"chat_template_kwargs": {"open_thinking": True}}
    message = ask(client, "Is five odd?", extra_body=body).choices[0].message
    assert message.model_extra["reasoning"] == "It is asked whether five is odd or even."
    assert message.content == "Five is odd."
    quiet = ask(client, "[[sunny]]", extra_body=body, reasoning_effort="none").choices[0].message
    assert quiet.content == "It is sunny there."
    for budget in (0, 2, 50):
        message = ask(client, "Odd?", extra_body=body | {"thinking_budget": budget}).choices[0]
        reasoning = message.message.model_extra.get("reasoning", "")
        assert "It is asked whether five is odd or even.".startswith(reasoning)
        assert bool(reasoning) == bool(budget)
        said = "Five is odd." if budget == 50 else "Enough of that."
        assert message.message.content == said


def test_a_conversation_with_a_broken_call_goes_on(client):
    """A call that was cut comes back in the history, and templates write arguments themselves."""
    call = {"name": "write", "arguments": '{"path": "a.txt", "con'}
    history = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "not valid JSON [[sunny]]"},
    ]
    assert ask(client, history).choices[0].message.content == "It is sunny there."


@pytest.mark.long
@pytest.mark.parametrize("parser", ["mistral", "qwen3_coder", "kimi_k2"])
def test_calls_of_other_families(tmp_path, parser):
    folder = scripted_checkpoint(tmp_path / "other", {"[[call]]": WRITTEN[parser]}, parser)
    tools = [{"type": "function", "function": {"name": "look"}}]
    with server("--model", folder, "--drafter", "prompt-lookup") as running:
        body = {"messages": [{"role": "user", "content": "[[call]]"}], "tools": tools}
        answered = post(f"{running.url}/chat/completions", body).json["choices"][0]
    assert answered["finish_reason"] == "tool_calls"
    (call,) = answered["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["a"] in (5, "5")  # no schema told the type
