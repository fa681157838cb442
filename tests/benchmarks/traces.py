"""Records what tests/decode/test_draft_length.py replays: acceptance, costs of the embedded pair.

For every position of an answer, how many of eight drafts a round would accept there: on a question
the target knows by heart and on one it makes its answer up for, greedily and at temperature 1. And
what rounds of each length cost: with the 5-bit target on MLX's CPU backend, and, run with OpenBLAS
preloaded, with its float32 form.

    python tests/benchmarks/traces.py
    LD_PRELOAD=…/libopenblas.so.0 python tests/benchmarks/traces.py --float32
"""

import argparse
import json
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx_lm.utils import dequantize_model

from mlx_drift import load_drafter, make_prompt_cache, stream_generate
from mlx_drift.decode.accept import read_verdict
from mlx_drift.decode.chooser import Chooser
from mlx_drift.decode.sampling import Sampling
from mlx_drift.demo import DEMO, TARGET
from mlx_drift.drafters.protocol import Draft
from mlx_drift.measure.speed.tune import tune

OUT = Path(__file__).parents[1] / "traces.json"
QUESTIONS = {
    "easy": "Show me the source of `functools.cmp_to_key`.",
    "hard": "Write a long story about a lighthouse keeper and the sea.",
}
DRAFTS, LENGTHS = 8, tuple(range(1, 9))


def laid_out(tokenizer, question: str) -> list[int]:
    """The question as the model reads it."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def acceptance(model, tokenizer, drafter, question: str, temp: float) -> list[int]:
    """How many of `DRAFTS` drafts are accepted at each position of the answer."""
    prompt = laid_out(tokenizer, question)
    answer = [
        r.token
        for r in stream_generate(model, tokenizer, prompt, 256, drafter=drafter, temp=temp, seed=1)
    ]
    cache = make_prompt_cache(model, drafter, max_snapshots=0)
    cache.read(prompt, step_size=2048, progress=lambda done, total: None)
    target, sampling = cache.target, Sampling(temp=temp)
    accepted = []
    last = mx.array(prompt[-1:])
    for position, token in enumerate(answer):
        chooser = Chooser(sampling, DRAFTS, mx.random.key(position))
        draft: Draft = drafter.propose(DRAFTS, cache.drafter_cache, chooser)
        rows = mx.concatenate([last, draft.tokens])
        logits, taps = target.verify(rows, cache.target_cache)
        decided, _ = chooser.verify(draft, logits)
        accepted.append(read_verdict(decided.tolist(), draft).accepted)
        target.rollback(cache.target_cache, DRAFTS)
        last = mx.array([token])
        drafter.ingest(last, taps[:1], cache.drafter_cache)
    return accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--float32", action="store_true", help="record the costs of that regime")
    arguments = parser.parse_args()
    model, tokenizer = mlx_lm.load(str(TARGET))
    drafter = load_drafter(DEMO / "eagle3.1", model)
    traces = json.loads(OUT.read_text()) if OUT.exists() else {"costs": {}, "accepted": {}}
    if arguments.float32:
        dequantize_model(model)
        model.set_dtype(mx.float32)
        drafter.network.set_dtype(mx.float32)
    else:
        for name, question in QUESTIONS.items():
            for temp in (0, 1):
                traces["accepted"][f"{name}, temperature {temp}"] = acceptance(
                    model, tokenizer, drafter, question, temp
                )
    prompt = laid_out(tokenizer, QUESTIONS["easy"])
    (costs,) = tune(model, drafter, prompt, contexts=[256], lengths=LENGTHS, turns=5).values()
    cache = make_prompt_cache(model, drafter, max_snapshots=0)
    cache.read(prompt, step_size=2048, progress=lambda done, total: None)
    rows = mx.array((prompt * 64)[:64])
    _, taps = cache.target.verify(rows, cache.target_cache)
    mx.eval(taps)
    start = time.perf_counter()
    drafter.ingest(rows, taps, cache.drafter_cache)
    mx.eval(cache.drafter_cache.state)
    traces["costs"]["float32, OpenBLAS" if arguments.float32 else "5 bits"] = {
        "rounds": [round(costs[k] / costs[0], 3) for k in (0, *LENGTHS)],
        "missed_row": round((time.perf_counter() - start) / 64 / costs[0], 3),
    }
    OUT.write_text(json.dumps(traces) + "\n")
    print(json.dumps(traces))


if __name__ == "__main__":
    main()
