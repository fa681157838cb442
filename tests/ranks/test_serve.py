"""`serve` over two ranks: what many clients are answered is what one process answers."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from launch import mlx_drift, outcome, start

from mlx_drift.decode.sampling import Sampling
from mlx_drift.grammar.grammar import Grammar
from mlx_drift.serve.ranks import from_json, to_json
from mlx_drift.serve.request import Request
from mlx_drift.serve.said import Speech
from serving import JSON, server

REQUESTS, CLIENTS, LEAVES = 50, 4, 5
"""Of so many requests one is left in the middle of its answer."""


def body(number: int) -> dict[str, object]:
    """What the request of some number asks: greedy or drawn, some begin alike."""
    prompt = f"def f{number % 7}(x):\n    " + ("return x\n" * (number % 3))
    return {
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": 0.8 * (number % 2),
        "seed": number,
        "stream": True,
    }


def answer(base: str, number: int, leave: bool) -> str:
    """Asks; reads the answer, or only how it begins."""
    address = urlsplit(base)
    connection = HTTPConnection(address.hostname, address.port, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body(number)), JSON)
    text = ""
    response = connection.getresponse()
    assert response.status == 200
    for line in response:
        if line.startswith(b"data: {"):
            text += json.loads(line[6:])["choices"][0]["text"]
            if leave and text:
                break
    connection.close()
    return text


def ask_all(base: str) -> list[str | None]:
    """Asks all of it, four at a time; None for what was left."""

    def ask(number: int) -> str | None:
        leave = number % LEAVES == 4
        text = answer(base, number, leave)
        return None if leave else text

    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(ask, range(REQUESTS)))


@pytest.mark.hours
@pytest.mark.parametrize("k", ["3", "auto"])
def test_two_ranks_serve_as_one_process(tmp_path, k):
    drafts = "--num-draft-tokens", k
    with server(*drafts) as alone:
        expected = ask_all(alone.url)
    ranks = start(2, tmp_path, "-m", "mlx_drift", "serve", "--port", "0", "--json", *drafts)
    answers = ask_all(json.loads(ranks[0].stdout.readline())["url"])
    ranks[0].send_signal(signal.SIGTERM)
    told = outcome(ranks)
    assert answers == expected
    assert sum(answer is None for answer in answers) == REQUESTS // LEAVES
    assert len({answer for answer in answers if answer}) > 10
    assert [code for code, _, _ in told] == [0, 0], told
    assert told[1][1:] == ("", "")
    assert "error" not in told[0][2]


@pytest.mark.long
def test_a_rank_that_dies_ends_the_server(tmp_path):
    ranks = start(2, tmp_path, "-m", "mlx_drift", "serve", "--port", "0", "--json")
    assert ranks[0].stdout.readline()
    ranks[1].kill()
    (code, _, err), _ = outcome(ranks)
    assert code == 1
    assert "error: rank 1: ended before the answer was whole\n" in err  # MLX's ring may add to it


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--cache-dir", "x"], ["--idle-unload", "5"]])
def test_what_is_one_process_s_is_refused(tmp_path, flags):
    first, second = mlx_drift(2, tmp_path, "serve", "--port", "0", *flags)
    assert (first[0], second) == (1, (1, "", ""))
    assert first[2].startswith(f"error: {flags[0]} ")
    assert first[2].count("\n") == 1


def test_a_request_comes_whole_through_json():
    request = Request(
        [1, 2],
        7,
        sampling=Sampling(temp=0.5, top_k=3, xtc_special_tokens=(4, 5)),
        penalties={"repetition_penalty": 1.1, "logit_bias": {3: -1.0}},
        grammar=Grammar.regex("a+"),
        seed=1 << 60,
        stop=("x",),
        marks=(1,),
        expected=(6, 7),
        speech=Speech(tools=[{"type": "function"}], must_call="f"),
    )
    assert from_json(json.loads(json.dumps(to_json(request)))) == request
