"""Shares of the device while serving, and what the engine costs beside `stream_generate`.

Random targets: a tiny one with a long context, and one whose rounds take 10 ms or more; over HTTP
the embedded pair. `--load FOLDER` has a server load another model while it answers, instead:

    python tests/benchmarks/serving.py
    python tests/benchmarks/serving.py --load FOLDER

Ratios of medians, the ways interleaved: absolute speeds say nothing on a busy machine.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlx_drift import load_demo, stream_generate
from mlx_drift.demo import QUESTION
from mlx_drift.serve.request import Piece
from serving import JSON, ask, engine, loaded, post, said, server
from tiny import VOCAB, tiny_drafter, tiny_llama

PROMPT_TOKENS, CLIENTS, RUNS, TOKENS = 16_000, 8, 5, 200


def target():
    """A Llama whose rounds take about 10 ms."""
    model = tiny_llama(
        hidden_size=512,
        num_hidden_layers=8,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
    )
    return loaded(model, tiny_drafter(model))


def rounds_a_second(heard, since, until):
    """Rounds of one conversation between two times."""
    return sum(since <= at < until for at in heard.times) / (until - since)


def timed(heard):
    """Notes when pieces come."""
    heard.times = []
    heard.on_event = lambda e: isinstance(e, Piece) and heard.times.append(time.perf_counter())
    return heard


def while_a_prompt_is_read(model):
    """Rounds a second of an answer while a long prompt is read, over those it has alone."""
    with engine() as running:
        heard, ticket = ask(running, model, [1, 2, 3], 100_000)
        timed(heard)
        time.sleep(4)
        start = time.perf_counter()
        reader, _ = ask(running, model, [i * 7 % VOCAB for i in range(PROMPT_TOKENS)], 1)
        assert reader.over.wait(600)
        end = time.perf_counter()
        time.sleep(4)
        running.cancel([ticket])
        heard.wait()
    before = rounds_a_second(heard, start - 3, start)
    after = rounds_a_second(heard, end + 0.5, end + 3.5)
    during = rounds_a_second(heard, start, end)
    gaps = [b - a for a, b in zip(heard.times, heard.times[1:], strict=False) if start <= a < end]
    return {
        "ratio": during / statistics.mean([before, after]),
        "seconds": end - start,
        "longest_gap": max(gaps),
        "chunks": len(reader.chunks),
    }


def of_equal_clients(model):
    """Tokens of the slowest of equal clients over their mean."""
    with engine() as running:
        asked = [ask(running, model, [i, 2, 3], 100_000) for i in range(CLIENTS)]
        heard = [timed(h) for h, _ in asked]
        time.sleep(2)
        start = time.perf_counter()
        time.sleep(8)
        end = time.perf_counter()
        running.cancel([ticket for _, ticket in asked])
        for one in heard:
            one.wait()
    rates = [rounds_a_second(one, start, end) for one in heard]
    return min(rates) / statistics.mean(rates)


def beside_stream_generate(model):
    """Tokens a second of one client over those of `stream_generate`."""
    ratios = []
    with engine() as running:
        for run in range(RUNS):
            prompt = [run, 1, 2]
            speeds = {}
            for way in ("alone", "served") if run % 2 else ("served", "alone"):
                if way == "served":
                    heard = timed(ask(running, model, prompt, TOKENS)[0])
                    heard.wait()
                    times = heard.times
                else:
                    times = [
                        time.perf_counter()
                        for _ in stream_generate(
                            model.model, model.tokenizer, prompt, TOKENS, drafter=model.drafter
                        )
                    ]
                speeds[way] = 1 / (times[-1] - times[0])
            ratios.append(speeds["served"] / speeds["alone"])
    return statistics.median(ratios)


def streamed(url, **keywords):
    """Yields the time of each piece of an answer over HTTP."""
    connection = HTTPConnection(urlsplit(url).netloc)
    body = said(QUESTION, max_tokens=TOKENS, stream=True, **keywords)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
    for line in connection.getresponse():
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get(
            "content"
        ):
            yield time.perf_counter()
    connection.close()


def over_http():
    """Tokens a second of one streaming client over those of `stream_generate`, and a round's ms."""
    model, tokenizer, drafter = load_demo()
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ratios, rounds = [], []
    with server() as process:
        list(streamed(process.url))
        for run in range(RUNS):
            taken = {}
            for way in ("alone", "served") if run % 2 else ("served", "alone"):
                if way == "served":
                    times = list(streamed(process.url))
                else:
                    times = [
                        time.perf_counter()
                        for _ in stream_generate(model, tokenizer, prompt, TOKENS, drafter=drafter)
                    ]
                    rounds += [b - a for a, b in pairwise(times) if b - a > 1e-3]
                taken[way] = times[-1] - times[0]
            ratios.append(taken["alone"] / taken["served"])
    return {"ratio": statistics.median(ratios), "round ms": 1e3 * statistics.median(rounds)}


def while_a_model_is_loaded(folder):
    """The longest wait of an answer under way, before and while another model is loaded."""
    with server("--allow-models", folder) as process:
        times, asked = [], []

        def answer():
            while not asked or time.perf_counter() < asked[-1] + 2:
                times.extend(streamed(process.url))

        def ask_other():
            body = said("Hello", max_tokens=1, model=Path(folder).name)
            assert post(f"{process.url}/chat/completions", body).status == 200
            asked.append(time.perf_counter())

        thread = threading.Thread(target=answer)
        thread.start()
        time.sleep(4)
        start = time.perf_counter()
        ask_other()
        thread.join()
    gaps = [(a, b - a) for a, b in pairwise(times)]
    return {
        "median": statistics.median(gap for _, gap in gaps),
        "longest before": max(gap for at, gap in gaps if at < start - 0.5),
        "longest meanwhile": max(gap for at, gap in gaps if start - 0.5 <= at <= asked[0]),
        "seconds until it answered": asked[0] - start,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--load", metavar="FOLDER", help="measure how loading it is felt, instead")
    if folder := parser.parse_args().load:
        print("an answer while a model is loaded:", while_a_model_is_loaded(folder), flush=True)
        sys.exit()
    print("one client over HTTP:", over_http(), flush=True)
    tiny = tiny_llama(max_position_embeddings=32_768)
    tiny = loaded(tiny, tiny_drafter(tiny))
    print("an answer while a prompt is read:", while_a_prompt_is_read(tiny), flush=True)
    print("slowest of equal clients over the mean:", of_equal_clients(tiny), flush=True)
    print("one client over stream_generate:", beside_stream_generate(target()))
