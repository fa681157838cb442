"""What goes wrong: malformed bodies, slow ones, kills, ends, and a thousand requests in a row."""

import copy
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_drift.demo import QUESTION
from serving import PATIENCE, fetch, post, said, server

HUGE = "9" * 400


@pytest.fixture(scope="module")
def running():
    with server("--max-tokens", "4", "--body-timeout", "0.5") as process:
        yield process
    assert "Traceback" not in process.err
    assert process.returncode == 0


HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    {
        "role": "assistant",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "b"},
]


CONVERSATION = {
    "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "a"},
                {"type": "tool_use", "id": "a", "name": "look", "input": {"b": 2}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "c"}]},
    ],
    "tools": [{"name": "look", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "none"},
    "thinking": {"type": "enabled", "budget_tokens": 2},
}


def valid():
    return {
        "/v1/chat/completions": said(
            QUESTION,
            max_tokens=2,
            stop=["a"],
            logit_bias={"5": 1},
            stream_options={},
            tools=[{"type": "function", "function": {"name": "look", "parameters": {}}}],
            tool_choice="none",
        )
        | {"messages": HISTORY},
        "/v1/completions": {"prompt": "def", "max_tokens": 2, "temperature": 0.5, "seed": 1},
        "/v1/responses": {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "a", "output": "b"},
            ],
            "max_output_tokens": 2,
            "tools": [
                {"type": "custom", "name": "look", "format": {"type": "text"}},
                {"type": "namespace", "name": "a", "tools": [{"type": "function", "name": "b"}]},
            ],
            "tool_choice": "none",
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "text"}},
        },
        "/v1/messages": CONVERSATION | {"max_tokens": 2, "stop_sequences": ["a"], "top_k": 2},
        "/v1/messages/count_tokens": CONVERSATION,
        "/tokenize": {"messages": [{"role": "user", "content": "a"}]},
    }


STRANGE = [
    None,
    True,
    -1,
    1.5,
    10**30,
    "",
    "x" * 520,  # longer than names may be
    [],
    {},
    [[]],
    {"a": {}},
    ["\ud800"],
    "\ud800",
]


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(rng, body):
    """Spoils one place of a body; or its bytes."""
    kind = rng.random()
    if kind < 0.6:
        spoilt = copy.deepcopy(body)
        path = rng.choice([*places(spoilt)])
        strange = rng.choice(STRANGE)
        if not path:
            return json.dumps(strange).encode()
        inner = spoilt
        for key in path[:-1]:
            inner = inner[key]
        if isinstance(inner, dict) and rng.random() < 0.3:
            inner[rng.choice(["tools", "suffix", "x\n", "n", "ſ", "__class__", "image_url"])] = (
                strange
            )
        else:
            inner[path[-1]] = strange
        return json.dumps(spoilt).encode()
    raw = json.dumps(body).encode()
    if kind < 0.75:
        return raw[: rng.randrange(len(raw))]
    if kind < 0.85:
        at = rng.randrange(len(raw))
        return raw[:at] + rng.randbytes(rng.randint(1, 4)) + raw[at + 1 :]
    if kind < 0.9:
        return b"[" * rng.choice([10, 5000, 200_000])
    if kind < 0.95:
        return raw.replace(b"2", HUGE.encode()).replace(b"0.5", b"1e999")
    return raw.replace(b"2", rng.choice([b"NaN", b"-Infinity", b"1e400", b"0x10", b"02"]))


def check_malformed(running, path, count, seed):
    """Posts them; returns how many were refused."""
    rng, refused, body = random.Random(seed), 0, valid()[path]
    for _ in range(count):
        raw = mutated(rng, body)
        answered = post(f"{running.root}{path}", raw)
        if answered.status == 200:  # what was spoilt says the same, or something else that is valid
            assert isinstance(json.loads(raw), dict)
            continue
        assert 400 <= answered.status < 500, (raw[:500], answered)
        assert answered.error["message"]
        refused += 1
        try:
            given = json.loads(raw.decode(), parse_constant=lambda name: 1 / 0)
        except (ValueError, RecursionError, ZeroDivisionError):
            continue
        if isinstance(given, dict):  # then it is a field, which is named
            field = answered.error["param"]
            assert field, (raw[:500], answered.body)
            assert field.partition("[")[0].partition(".")[0] in answered.error["message"]
    assert post(f"{running.url}/chat/completions", said(QUESTION)).status == 200
    return refused


@pytest.mark.parametrize("path", valid())
def test_malformed_bodies_are_refused_and_the_field_is_named(running, path):
    assert post(f"{running.root}{path}", valid()[path]).status == 200
    assert check_malformed(running, path, 100, 1) > 50


@pytest.mark.long
@pytest.mark.parametrize("path", valid())
def test_two_thousand_malformed_bodies(running, path):
    assert check_malformed(running, path, 2000, 2) > 1000


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}],
            },
            "image_url",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "input_audio"),
        ({"role": "user", "content": [{"type": "file", "file": {"file_id": "a"}}]}, "file"),
        ({"role": "tool", "content": "a"}, "tool_call_id"),
        ({"role": "function", "content": "a"}, "role"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "tool_calls[0].function"),
        ({"role": "user", "tool_calls": []}, "tool_calls"),
        ({"role": "user", "content": 5}, "content"),
        ({"role": "user"}, "messages"),
        ({"content": "a"}, "role"),
    ],
)
def test_messages_that_cannot_be_read_are_named(running, message, named):
    answered = post(f"{running.url}/chat/completions", {"messages": [message], "max_tokens": 1})
    if message == {"role": "user"}:  # nothing said is something a template can lay out
        assert answered.status == 200
        return
    assert answered.status == 400
    assert named in answered.error["message"]
    assert answered.error["param"].startswith("messages[0]")


def test_no_template_or_file_of_a_request_is_opened(running):
    for keyword in ("chat_template", "tokenize", "tools", "conversation", "return_tensors"):
        body = said("a", chat_template_kwargs={keyword: "{{ 1 }}"})
        answered = post(f"{running.url}/chat/completions", body)
        assert answered.status == 400
        assert keyword in answered.error["param"]
    for model in ("/etc", "../../demo/target", "mlx-community/Qwen3-8B-4bit"):
        assert post(f"{running.url}/chat/completions", said("a", model=model)).status == 404
    body = said("a", chat_template_kwargs={"add_generation": True, "messages": []})
    assert post(f"{running.url}/chat/completions", body).status == 400


def send(running, head, *parts, pause=0.0):
    """Sends bytes as they are; returns the status."""
    host, _, port = running.root.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(head.encode())
        for part in parts:
            time.sleep(pause)
            connection.sendall(part)
        return int(connection.recv(1000).split()[1])


def test_slow_and_endless_bodies(running):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert send(running, f"{head}Content-Length: 50\r\n\r\n", b"{") == 408
    assert send(running, f"{head}Content-Length: 20\r\n\r\n", b'{"prompt": "a",', b"  5  ") == 400
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    status = send(running, f"{head}Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 33)
    assert status in (408, 413)
    assert fetch(f"{running.root}/health").status == 200


@pytest.mark.long
def test_prompts_are_not_logged_unless_asked_for():
    secret = "open sesame"
    for flags in ([], ["--log-prompts"]):
        with server(*flags) as running:
            assert (
                post(f"{running.url}/completions", {"prompt": secret, "max_tokens": 1}).status
                == 200
            )
            bad = {"prompt": secret, "max_tokens": secret}
            assert post(f"{running.url}/completions", bad).status == 400
        assert (secret in running.err) == bool(flags)


@pytest.mark.long
def test_the_queue_is_bounded():
    with server("--running", "1", "--queue", "1") as small:
        answers = []
        body = said(QUESTION, max_tokens=300)
        threads = [
            threading.Thread(
                target=lambda: answers.append(post(f"{small.url}/chat/completions", body))
            )
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    busy = [answer for answer in answers if answer.status == 429]
    assert busy
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in busy)
    assert {answer.status for answer in answers} == {200, 429}


def test_sigterm_under_load_ends_within_its_deadline():
    with server("--shutdown-timeout", "2") as running:
        answers = []
        body = said(QUESTION, max_tokens=4000, logit_bias={"1": -100})  # it never ends by itself
        streamed = body | {"stream": True}
        threads = [
            threading.Thread(
                target=lambda b=b: answers.append(post(f"{running.url}/chat/completions", b))
            )
            for b in [body, streamed] * 6
        ]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        start = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.wait(PATIENCE)
        took = time.monotonic() - start
        for thread in threads:
            thread.join()
    assert running.returncode == 0, running.err
    assert took < 2 + 3  # and what the interpreter takes to end, beside other tests
    for answer in answers:
        assert answer.status in (200, 503)
        if answer.headers["content-type"].startswith("text/event-stream"):
            last = answer.body.strip().split(b"\n\n")[-1]
            assert b'"code":"shutdown"' in last or last == b"data: [DONE]"


def test_a_device_that_is_still_at_work_at_the_deadline_holds_up_nobody():
    stuck = "import threading\nfrom mlx_drift.serve import conversation\n" + (
        "conversation.Conversation.step = lambda self: threading.Event().wait()"
    )
    with server("--shutdown-timeout", "1", setup=stuck) as running:
        thread = threading.Thread(
            target=lambda: post(f"{running.url}/chat/completions", said(QUESTION)), daemon=True
        )
        thread.start()
        time.sleep(0.5)
        start = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.wait(PATIENCE)
        took = time.monotonic() - start
    assert running.returncode == 0, running.err
    assert "still at work" in running.err
    assert took < 1 + 3


@pytest.mark.long
def test_caches_survive_a_restart(tmp_path):
    folder = tmp_path / "caches"
    body = said(QUESTION, max_tokens=8)
    with server("--cache-dir", folder) as running:
        first = post(f"{running.url}/chat/completions", body).json
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(
        path.stat().st_mode & 0o077 == 0 for path in folder.iterdir() if path.name != ".lock"
    )
    with server("--cache-dir", folder) as running:
        again = post(f"{running.url}/chat/completions", body).json
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert again["choices"] == first["choices"]
    for path in folder.glob("*.safetensors"):  # damaged: read anew
        raw = bytearray(path.read_bytes())
        raw[-50] ^= 1
        path.write_bytes(raw)
    with server("--cache-dir", folder) as running:
        damaged = post(f"{running.url}/chat/completions", body).json
    assert damaged["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert damaged["choices"] == first["choices"]
    assert "damaged" in running.err


def test_a_folder_that_others_can_read_is_refused(tmp_path, refuses):
    tmp_path.chmod(0o755)
    refuses("chmod 700", "serve", "--port", 0, "--cache-dir", tmp_path)


@pytest.mark.long
def test_a_kill_while_caches_are_written_loses_that_entry_at_most(tmp_path):
    folder = tmp_path / "caches"
    for attempt in range(6):
        with server("--cache-dir", folder, stop=signal.SIGKILL) as running:
            for i in range(4):
                body = said(f"{attempt} {i} " + "word " * 300, max_tokens=2)
                assert post(f"{running.url}/chat/completions", body).status == 200
            time.sleep(0.15 * attempt)  # it writes while nothing is asked
        assert running.returncode == -signal.SIGKILL
        whole = {path.stem for path in folder.glob("*.json")}
        with server("--cache-dir", folder) as running:
            left = {path.stem for path in folder.glob("*.safetensors")}
            assert left == whole  # half written ones are gone, the others are not
            for i in range(4):
                body = said(f"{attempt} {i} " + "word " * 300, max_tokens=2)
                assert post(f"{running.url}/chat/completions", body).status == 200
        assert "damaged" not in running.err


@pytest.mark.long
def test_a_thousand_requests_leave_memory_level():
    with server("--cache-bytes", str(32 << 20)) as running:
        status = Path(f"/proc/{running.pid}/status")
        if not status.exists():
            pytest.skip("resident memory is read off /proc")
        sizes, device = [], []
        for i in range(1000):
            body = {"prompt": f"{i} is", "max_tokens": 4}
            assert post(f"{running.url}/completions", body).status == 200
            if i >= 300 and i % 50 == 0:
                (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
                sizes.append(int(line.split()[1]))
                metrics = fetch(f"{running.root}/metrics").body.decode().splitlines()
                (line,) = (x for x in metrics if x.startswith("mlx_drift_device_memory_bytes"))
                device.append(float(line.split()[1]) / 1024)
        slope = (sizes[-1] - sizes[0]) / 650  # KiB a request
        of_device = (device[-1] - device[0]) / 650
        print(f"RSS {sizes} KiB: {slope:.2f} KiB a request; MLX {of_device:.2f}")
        assert slope < 20
        assert of_device < 1  # past 300 requests the bound of the caches is reached


def test_without_the_extra_one_line_says_what_to_install():
    script = (
        "import sys\n"
        "for name in ('starlette', 'uvicorn', 'prometheus_client'): sys.modules[name] = None\n"
        "from mlx_drift.cli import main\n"
        "main(['serve'])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert "pip install 'mlx-drift[serve]'" in line
