"""The page's files, and what the API tells it: who said each token of an answer."""

import json
import re
from collections import Counter
from importlib.resources import files

import pytest

from mlx_drift import load_demo
from mlx_drift.demo import QUESTION
from mlx_drift.measure.inside.drift import Settings, drift
from mlx_drift.serve.page import FILES
from mlx_drift.watch.sums import CLASSES
from serving import fetch, post, said, server


@pytest.fixture(scope="module")
def running():
    with server("--api-key", "secret", "--max-tokens", "40") as process:
        yield process


KEY = {"Content-Type": "application/json", "Authorization": "Bearer secret"}


def ask(running, **keywords):
    answered = post(f"{running.url}/chat/completions", said(QUESTION, **keywords), KEY)
    assert answered.status == 200, answered.body
    return answered


def chunks(answered):
    lines = answered.body.decode().splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES)
def test_files_come_without_a_key_and_under_a_policy(running, path):
    answered = fetch(running.root + path)
    assert answered.status == 200
    assert answered.body == files("mlx_drift.serve.page").joinpath(FILES[path]).read_bytes()
    policy = answered.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answered.headers["x-content-type-options"] == "nosniff"
    kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    expected = kind.get(FILES[path].rpartition(".")[2], "text/html")
    assert answered.headers["content-type"].startswith(expected)


def test_what_is_no_file_of_the_page_is_not_shown(running):
    for path in ("/page/", "/page/__init__.py", "/page/../guard.py", "/page/%2e%2e/guard.py", "/x"):
        assert fetch(running.root + path).status == 401  # nobody but who has the key is told more
        assert fetch(running.root + path, headers=KEY).status == 404
    assert post(f"{running.root}/", {}, KEY).status == 405
    assert fetch(f"{running.url}/models").status == 401
    for path in FILES:
        assert fetch(running.root + path, headers={"Host": "evil.example"}).status == 403


def test_every_file_is_packaged_and_refers_to_this_server_alone():
    page = files("mlx_drift.serve.page")
    there = {file.name for file in page.iterdir() if not file.name.startswith("__")}
    assert there == {*FILES.values()}
    for name in FILES.values():
        text = page.joinpath(name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.|@import|\burl\(", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", text), name
    html = page.joinpath("index.html").read_text()
    assert {*re.findall(r'(?:src|href)="([^"]+)"', html)} < FILES.keys()
    assert re.findall(r"<script(.*?)>(.*?)</script>", html) == [
        (' type="module" src="/page/main.js"', "")
    ]


def test_every_field_has_a_label():
    html = files("mlx_drift.serve.page").joinpath("index.html").read_text()
    ids = re.findall(r'<(?:textarea|select|input) [^>]*?id="([a-z]+)"', html)
    assert len(ids) == 10
    for name in ids:
        in_label = rf"<label class=\"check\"><input [^>]*?id=\"{name}\""
        assert f'<label for="{name}">' in html or re.search(in_label, html), name


# --- who said what ----------------------------------------------------------------------------


def agree(rounds, content, usage):
    """Checks rounds against the answer and its usage."""
    tokens = [token for round in rounds for token in round["tokens"]]
    assert "".join(token["text"] for token in tokens) == content
    assert len(tokens) == usage["completion_tokens"]
    speculative = usage["speculative"]
    met = Counter(token["position"] for token in tokens if token["by"] != "target")
    accepted = speculative["accepted_by_position"]
    assert [met[i + 1] for i in range(len(accepted))] == accepted
    tested = Counter(i for round in rounds for i in range(round["tested"]))
    assert [tested[i] for i in range(len(tested))] == speculative["tested_by_position"]
    assert sum(round["seconds"] for round in rounds) == pytest.approx(speculative["seconds"])
    assert speculative["plain_step_seconds"] > 0


@pytest.mark.parametrize("keywords", [{}, {"temperature": 1, "seed": 3}, {"stop": ["quote"]}])
def test_streams_and_whole_answers_tell_who_said_what(running, keywords):
    plain = ask(running, **keywords).json
    assert "speculative" not in plain["choices"][0]
    whole = ask(running, speculative={"tokens": True}, **keywords).json
    choice = whole["choices"][0]
    assert choice["message"] == plain["choices"][0]["message"]
    if "stop" not in keywords:  # a stop text ends an answer within a round
        agree(choice["speculative"], choice["message"]["content"], whole["usage"])
    streamed = chunks(
        ask(
            running,
            speculative={"tokens": True},
            stream=True,
            stream_options={"include_usage": True},
            **keywords,
        )
    )
    choices = [c for chunk in streamed for c in chunk["choices"]]
    rounds = [round for c in choices for round in c.get("speculative", [])]
    text = "".join(c["delta"].get("content", "") for c in choices)
    assert text == choice["message"]["content"]
    assert "".join(t["text"] for round in rounds for t in round["tokens"]) == text
    if "stop" not in keywords:
        agree(rounds, text, streamed[-1]["usage"])


def test_without_drafts(running):
    whole = ask(running, speculative={"tokens": True}, num_draft_tokens=0).json
    rounds = whole["choices"][0]["speculative"]
    assert {token["by"] for round in rounds for token in round["tokens"]} == {"target"}
    assert {round["tested"] for round in rounds} == {0}
    assert whole["usage"]["speculative"]["plain_tokens"] == len(rounds)
    drafted = ask(running, speculative={"tokens": True}).json
    assert whole["choices"][0]["message"] == drafted["choices"][0]["message"]


def test_several_choices_tell_each_of_its_own(running):
    whole = ask(running, speculative={"tokens": True}, n=2, temperature=2, seed=1).json
    for choice in whole["choices"]:
        texts = [token["text"] for round in choice["speculative"] for token in round["tokens"]]
        assert "".join(texts) == choice["message"]["content"]


def test_what_else_is_in_the_key_is_refused(running):
    answered = post(
        f"{running.url}/chat/completions", said(QUESTION, speculative={"who": True}), KEY
    )
    assert answered.status == 400
    assert "expected an object: `tokens`, `drift`" in answered.error["message"]


def test_the_drift_of_rounds(running):
    """The figures of a round are those of `mlx_drift drift`, and the answer is the same."""
    plain = ask(running, num_draft_tokens=4).json
    whole = ask(running, speculative={"drift": True}, num_draft_tokens=4).json
    assert whole["choices"][0]["message"] == plain["choices"][0]["message"]
    rounds = whole["choices"][0]["speculative"]
    agree(rounds, whole["choices"][0]["message"]["content"], whole["usage"])
    model, tokenizer, drafter = load_demo()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    measured = drift(
        model,
        tokenizer,
        {"eagle3.1": drafter},
        [prompt],
        Settings(steps=4, max_tokens=16, teacher_forced=False),
    )
    figures = measured.arms[0].free_running
    drifts = [round["drift"] for round in rounds if len(round["drift"]["rms"]) == 4]
    assert len(drifts) == figures.chains
    for step in range(4):
        mean = sum(one["rms"][step] for one in drifts) / len(drifts)
        assert mean == pytest.approx(figures.rms[step].value, rel=1e-5)
        for name in CLASSES:
            mean = sum(one["attention"][name][step] for one in drifts) / len(drifts)
            assert mean == pytest.approx(figures.attention[name][step].value, abs=1e-6)
    again = ask(running, num_draft_tokens=4, speculative={"tokens": True}).json
    assert all("drift" not in round for round in again["choices"][0]["speculative"])


def test_a_drafter_without_a_state_has_no_drift():
    with server("--drafter", "prompt-lookup") as process:
        answered = post(
            f"{process.url}/chat/completions", said(QUESTION, speculative={"drift": True})
        )
        assert answered.status == 400
        assert "recycles no state that could drift" in answered.error["message"]
