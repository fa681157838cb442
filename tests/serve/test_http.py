"""Real HTTP to a real process: OpenAI's own client, what breaks others' servers, who may ask."""

import asyncio
import json
import socket
import threading
import time

import mlx_lm
import openai
import pytest
from starlette.requests import Request

from mlx_drift import load_demo
from mlx_drift.demo import QUESTION
from mlx_drift.serve.api.fields import BadRequest, Fields, Honoured
from mlx_drift.serve.api.kinds import Kind
from mlx_drift.serve.guard import Guard
from mlx_drift.serve.http import Server
from serving import JSON, PATIENCE, fetch, post, said, server

OTHER = "What does `shutil.copytree` do?"


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def running():
    flags = ["--any-model-name", "claude-*", "--keepalive", "0.02", "--max-tokens", "40"]
    flags += ["--lookup"]
    with server(*flags) as process:
        yield process
    assert process.returncode == 0, process.err


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=PATIENCE)


def expected(demo, text, count, system=None):
    """What mlx-lm says."""
    model, tokenizer, _ = demo
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=count)


def user(text):
    return [{"role": "user", "content": text}]


def test_chat_says_what_mlx_lm_says_and_again_from_the_cache(client, demo):
    answers = [
        client.chat.completions.create(
            model="mlx-drift-demo", messages=user(QUESTION), max_tokens=24
        )
        for _ in range(2)
    ]
    for answer in answers:
        assert answer.choices[0].message.content == expected(demo, QUESTION, 24)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 24
    assert answers[0].id != answers[1].id
    details = answers[1].usage.prompt_tokens_details
    assert details.cached_tokens == answers[1].usage.prompt_tokens - 2
    speculative = answers[1].usage.model_dump()["speculative"]
    assert speculative["rounds"] < 24
    assert 0 < speculative["acceptance_length"] <= 3


def test_streams_say_the_same(client, demo):
    stream = client.chat.completions.create(
        model="mlx-drift-demo",
        messages=user(OTHER),
        max_completion_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected(demo, OTHER, 24)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert [c.usage is not None for c in chunks].count(True) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    # serving.md 3.5: no piece is empty but the one that names the role and the last.
    assert all(c.choices[0].delta.content for c in chunks[1:-2])


def test_a_stream_ends_with_done_whatever_its_options_say(running):
    """mlx-lm's ends without `[DONE]` on `stream_options: {}`."""
    for options in ({}, None, {"include_usage": False}):
        body = said(QUESTION, stream=True, stream_options=options)
        answered = post(f"{running.url}/chat/completions", body)
        assert answered.body.endswith(b"data: [DONE]\n\n")
        assert answered.headers["content-type"].startswith("text/event-stream")
        assert b'"usage":{' not in answered.body


def test_completions(client, demo):
    model, tokenizer, _ = demo
    for prompt in ("def quote(s):", tokenizer.encode("def quote(s):", add_special_tokens=False)):
        answer = client.completions.create(model="mlx-drift-demo", prompt=prompt, max_tokens=12)
        tokens = prompt if isinstance(prompt, list) else tokenizer.encode(prompt)
        assert answer.choices[0].text == mlx_lm.generate(model, tokenizer, tokens, max_tokens=12)
    two = client.completions.create(model="mlx-drift-demo", prompt=["a", "b"], n=2, max_tokens=3)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text
    assert two.usage.completion_tokens == 12
    stream = client.completions.create(
        model="mlx-drift-demo", prompt="def quote(s):", max_tokens=12, stream=True
    )
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == mlx_lm.generate(model, tokenizer, "def quote(s):", max_tokens=12)
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="mlx-drift-demo", prompt="a", suffix="b")


def test_models(client):
    """serving.md 3.17: Xcode finds models by this list."""
    assert [model.id for model in client.models.list()] == ["mlx-drift-demo"]
    assert client.models.retrieve("mlx-drift-demo").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_names_of_models(client):
    """serving.md 3.3: `claude-*` gives 404; and mlx-lm drops its model on the way to one."""
    ask = {"messages": user(QUESTION), "max_tokens": 2}
    assert client.chat.completions.create(model="claude-x-1", **ask).model == "claude-x-1"
    assert client.chat.completions.create(model="default_model", **ask).choices
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.chat.completions.create(model="gpt-5", **ask)
    assert client.chat.completions.create(model="mlx-drift-demo", **ask).choices


def test_several_choices(client, demo):
    """mlx-lm ignores `n`."""
    answer = client.chat.completions.create(
        model="mlx-drift-demo", messages=user(QUESTION), n=3, max_tokens=20, temperature=2.0, seed=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens <= 60
    again = client.chat.completions.create(
        model="mlx-drift-demo", messages=user(QUESTION), max_tokens=20, temperature=2.0, seed=6
    )
    assert again.choices[0].message.content == answer.choices[1].message.content


def test_stop_texts(client, demo):
    whole = expected(demo, QUESTION, 40)
    stop = whole[20:23]
    answer = client.chat.completions.create(
        model="mlx-drift-demo", messages=user(QUESTION), max_tokens=40, stop=["no such", stop]
    )
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities(client):
    answer = client.chat.completions.create(
        model="mlx-drift-demo", messages=user(QUESTION), max_tokens=5, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 5
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.top_logprobs[0].logprob == token.logprob <= 0
        assert sorted((t.logprob for t in token.top_logprobs), reverse=True) == [
            t.logprob for t in token.top_logprobs
        ]
    legacy = client.completions.create(
        model="mlx-drift-demo", prompt="def", max_tokens=3, logprobs=2
    ).choices[0]
    assert len(legacy.logprobs.tokens) == len(legacy.logprobs.top_logprobs) == 3
    assert legacy.logprobs.text_offset[0] == 0


def test_penalties_and_bias(client, demo):
    _, tokenizer, _ = demo
    plain = client.chat.completions.create(
        model="mlx-drift-demo", messages=user(QUESTION), max_tokens=1
    )
    (token,) = tokenizer.encode(plain.choices[0].message.content, add_special_tokens=False)
    other = client.chat.completions.create(
        model="mlx-drift-demo", messages=user(QUESTION), max_tokens=8, logit_bias={str(token): -100}
    )
    assert not other.choices[0].message.content.startswith(plain.choices[0].message.content)
    keywords = {"repetition_penalty": 1.5, "top_k": 5, "min_p": 0.01, "xtc_probability": 0.1}
    answer = client.chat.completions.create(
        model="mlx-drift-demo",
        messages=user(QUESTION),
        max_tokens=8,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        extra_body=keywords,
    )
    assert answer.choices[0].finish_reason == "length"


def test_the_billing_line_is_no_part_of_the_prompt(client):
    """serving.md 3.1: it changes with each request, so that no prefix is ever met again."""
    asked = []
    for number in range(2):
        system = [
            {
                "type": "text",
                "text": f"x-anthropic-billing-header: cc_version={number}; cch=9f{number}",
            },
            {"type": "text", "text": "You answer briefly, about the standard library alone."},
        ]
        messages = [{"role": "system", "content": system}, *user(OTHER)]
        answer = client.chat.completions.create(
            model="mlx-drift-demo", messages=messages, max_tokens=4
        )
        asked.append(answer)
    usage = asked[1].usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 2  # 3.20, 3.22
    users = [{"role": "user", "content": "x-anthropic-billing-header: mine"}]
    kept = client.chat.completions.create(model="mlx-drift-demo", messages=users, max_tokens=1)
    assert kept.usage.prompt_tokens > 8


def test_the_default_number_of_tokens_is_the_servers(client):
    answer = client.completions.create(model="mlx-drift-demo", prompt="def f(", max_tokens=None)
    assert answer.usage.completion_tokens <= 40


def test_a_prompt_beyond_the_context_says_by_how_much(running):
    answered = post(f"{running.url}/completions", {"prompt": [5] * 5000})
    assert answered.status == 400
    assert answered.error["code"] == "context_length_exceeded"
    assert "5000 tokens, 905 more than fit" in answered.error["message"]


def test_tokenize(running, demo):
    _, tokenizer, _ = demo
    body = {"messages": user("hello"), "return_token_strs": True}
    answered = post(f"{running.root}/tokenize", body).json
    template = tokenizer.apply_chat_template(user("hello"), add_generation_prompt=True)
    assert answered["tokens"] == list(template)
    assert answered["count"] == len(template) == len(answered["token_strs"])
    assert answered["max_model_len"] == 4096
    text = post(f"{running.root}/tokenize", {"prompt": "hello"}).json
    assert text["tokens"] == tokenizer.encode("hello")
    assert post(f"{running.root}/tokenize", {}).status == 400


def test_a_model_without_tools_says_so(running):
    tools = [{"type": "function", "function": {"name": "look"}}]
    body = said(QUESTION, max_tokens=1, tools=tools)
    answered = post(f"{running.url}/chat/completions", body)
    assert (answered.status, answered.error["param"]) == (400, "tools")
    assert "mlx-drift-demo calls none" in answered.error["message"]
    answered = post(f"{running.url}/chat/completions", body | {"tool_choice": "none"})
    assert answered.status == 200


def test_health_and_metrics(running, client):
    assert fetch(f"{running.root}/health").json == {"status": "ok"}
    client.chat.completions.create(model="mlx-drift-demo", messages=user(QUESTION), max_tokens=8)
    answered = fetch(f"{running.root}/metrics")
    assert answered.headers["content-type"].startswith("text/plain")
    lines = dict(
        line.rsplit(" ", 1) for line in answered.body.decode().splitlines() if line[0] != "#"
    )
    name = 'mlx_drift_accepted_tokens_total{model="mlx-drift-demo",position="1",source="eagle3"}'
    assert float(lines[name]) > 0
    for gauge in ("running", "waiting", "cache_bytes", "cache_bytes_bound"):
        assert f"mlx_drift_{gauge}" in lines
    assert float(lines['mlx_drift_cached_tokens_total{model="mlx-drift-demo"}']) > 0


def test_a_prediction_is_drafted_from_and_counted(running, client, demo):
    """OpenAI's predicted outputs: whatever is predicted, the answer is the same."""
    right = expected(demo, OTHER, 40)
    rounds = {}
    for predicted in (right, [{"type": "text", "text": right[:50]}], "Something else.", ""):
        answer = client.chat.completions.create(
            model="mlx-drift-demo",
            messages=user(OTHER),
            max_tokens=40,
            prediction={"type": "content", "content": predicted},
        )
        assert answer.choices[0].message.content == right
        rounds[str(predicted)] = answer.usage.model_dump()["speculative"]["rounds"]
        if predicted == right:
            details = answer.usage.completion_tokens_details
            assert details.accepted_prediction_tokens > 25
            assert details.rejected_prediction_tokens < 10
            copied = answer.usage.model_dump()["speculative"]["copied"]
            assert copied["accepted"] > 20
    assert rounds[right] < 8 < rounds[""]
    lines = fetch(f"{running.root}/metrics").body.decode()
    assert 'mlx_drift_rounds_total{model="mlx-drift-demo",source="copy"}' in lines
    assert (
        'mlx_drift_accepted_tokens_total{model="mlx-drift-demo",position="9",source="copy"}'
        in lines
    )
    body = said(OTHER, prediction={"type": "content", "content": [{"type": "image_url"}]})
    refused = post(f"{running.url}/chat/completions", body)
    assert (refused.status, refused.error["param"]) == (400, "prediction.content[0].type")


def test_a_first_probing_request_crashes_nothing(running):
    """serving.md 3.18."""
    assert fetch(f"{running.root}/").status == 200  # the page
    assert fetch(f"{running.root}/favicon.ico").status == 200
    assert fetch(f"{running.url}/chat/completions").status == 405
    assert fetch(f"{running.url}/models", "HEAD").status == 200
    assert "message" in fetch(f"{running.root}/nothing").error


def lines_of(running, body):
    """Streams with the time of each line."""
    host, _, port = running.root.removeprefix("http://").partition(":")
    raw = json.dumps(body).encode()
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        start = time.monotonic()
        connection.sendall(head.encode() + raw)
        with connection.makefile("rb") as stream:
            for line in stream:
                yield time.monotonic() - start, line.strip()


def test_headers_come_at_once_and_comments_while_nothing_is_said(running):
    """serving.md 3.7: after 120 silent seconds clients give up."""
    busy = [
        lines_of(running, said("word " * 300 + str(i), max_tokens=100, stream=True))
        for i in range(3)
    ]
    for one in busy:
        next(one)
    lines = [line for _, line in lines_of(running, said(OTHER, max_tokens=2, stream=True))]
    assert b": keepalive" in lines  # while it waited for the others
    assert lines.index(b": keepalive") > lines.index(b"")
    assert b"data: [DONE]" in lines
    for one in busy:
        one.close()


def test_a_client_that_leaves_makes_room(running):
    for streamed in (True, False):
        body = json.dumps(said(QUESTION, max_tokens=4000, stream=streamed)).encode()
        host, _, port = running.root.removeprefix("http://").partition(":")
        connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        if streamed:
            connection.recv(100)
        else:
            time.sleep(0.1)
        connection.close()
    deadline = time.monotonic() + PATIENCE
    while b"mlx_drift_running 0.0" not in fetch(f"{running.root}/metrics").body:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert b'ended="cancelled"' in fetch(f"{running.root}/metrics").body


def test_who_may_ask(running):
    url = f"{running.url}/chat/completions"
    body = said(QUESTION, max_tokens=1)
    assert post(url, body, JSON | {"Host": "evil.example"}).status == 403
    assert post(url, body, JSON | {"Host": "localhost:9"}).status == 200
    assert post(url, body, {"Content-Type": "text/plain"}).status == 415
    assert post(url, body, {}).status == 415
    answered = post(url, body, JSON | {"Origin": "https://page.example"})
    assert "access-control-allow-origin" not in answered.headers
    assert post(url, body, JSON | {"Content-Length": str(1 << 40)}).status == 413


def test_keys_and_named_origins():
    flags = ["--api-key", "sesame", "--cors-origin", "https://page.example"]
    with server(*flags) as running:
        url = f"{running.url}/models"
        assert fetch(f"{running.root}/health").status == 200
        for headers in ({}, {"Authorization": "Bearer no"}, {"x-api-key": "ses"}):
            answered = fetch(url, headers=headers)
            assert answered.status == 401
            assert "sesame" not in answered.body.decode()
        assert fetch(f"{running.root}/metrics").status == 401
        assert fetch(url, headers={"Authorization": "Bearer sesame"}).status == 200
        answered = fetch(url, headers={"x-api-key": "sesame", "Origin": "https://page.example"})
        assert answered.status == 200
        assert answered.headers["access-control-allow-origin"] == "https://page.example"


def test_another_host_needs_a_key(refuses):
    refuses("--api-key", "serve", "--host", "0.0.0.0", "--port", 0)


def test_an_empty_key_is_none_and_is_refused(refuses, monkeypatch):
    refuses("is empty", "serve", "--host", "0.0.0.0", "--port", 0, "--api-key", "")
    monkeypatch.setenv("MLX_DRIFT_API_KEY", "")  # as of a container whose secret is not set
    refuses("is empty", "serve", "--host", "0.0.0.0", "--port", 0)


def test_defaults_that_no_request_could_have_are_one_line(refuses):
    refuses("--top-k is -1", "serve", "--port", 0, "--top-k", -1)
    refuses("temp is 1e-09", "serve", "--port", 0, "--temp", 1e-9)


def test_a_body_is_read_off_the_event_loop():
    threads = []
    seen = Kind("anything", lambda value: threads.append(threading.current_thread()) or True)
    fields = Fields("/a", {"a": Honoured(seen, "nothing")}, {})

    async def receive():
        return {"type": "http.request", "body": b'{"a": 1}', "more_body": False}

    asked = Server(engine=None, models=None, metrics=None, guard=Guard("127.0.0.1"))
    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    assert asyncio.run(asked.given(fields, request)) == {"a": 1}
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("key", ["sesame", "Müßiggang — 鍵"])
def test_a_key_is_the_bytes_of_its_header(key):
    guard = Guard("127.0.0.1", key)
    shown = key.encode().decode("latin-1")  # as ASGI servers hand headers over
    for headers in ({"authorization": f"Bearer {shown}"}, {"x-api-key": shown}):
        guard.check("GET", "/v1/models", {"host": "localhost"} | headers)
    for headers in ({}, {"authorization": "Bearer"}, {"x-api-key": f"{shown}x"}):
        with pytest.raises(BadRequest, match="a valid API key"):
            guard.check("GET", "/v1/models", {"host": "localhost"} | headers)


def test_a_port_in_use_is_one_line(refuses):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refuses("cannot listen", "serve", "--port", taken.getsockname()[1])
