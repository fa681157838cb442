"""Compares generated tokens with mlx-lm's own on a real model, and says how long it took.

    python tests/benchmarks/exact.py --model FOLDER --drafter FOLDER mt_bench.jsonl gsm8k.jsonl
    python tests/benchmarks/exact.py … --prompts 6 --num-draft-tokens 1 2 8

Greedy, 40 prompts: a third of each file's first turns, code, Chinese, emoji, two of about 1,500
tokens. Where a token differs, the two likeliest logits there tell whether it was a near-tie.
"""

import argparse
import inspect
import json
import textwrap
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm

from mlx_drift import load_drafter, stream_generate

OWN = [
    "Write a Python function that returns the n-th Fibonacci number.",
    "Fix this: `for i in range(10) print(i)`",
    "Write a bash one-liner that counts the lines of all .py files.",
    "Explain this regular expression: ^\\d{4}-\\d{2}-\\d{2}$",
    "SELECT the three customers with the most orders, in SQL.",
    "用中文介绍一下北京。",
    "把这句话翻译成英文：今天天气很好，我们去公园散步吧。",
    "写一首关于春天的短诗。",
    "Tell a story in emoji only: 🐶🏠🌧️",
    "What do 🚀, 🌍 and 👩‍🚀 have in common?",
    "Reply with 😀 and nothing else.",
]
NEAR_TIE = 1e-4
"""Of the largest logit: closer ones are a tie to an arithmetic of another order."""


def long_prompts(tokenizer):
    """Two prompts of about 1,500 tokens, out of this machine's own Python."""
    for module, question in ((textwrap, "What does this code do?"), (json, "Summarize this.")):
        ids = tokenizer.encode(inspect.getsource(module))[:1450]
        yield f"{question}\n\n{tokenizer.decode(ids)}"


def prompts(tokenizer, files, count):
    """As many prompts, a share of each kind."""
    own = [*OWN, *long_prompts(tokenizer)]
    asked = []
    rest = max(0, count - len(own))
    for number, file in enumerate(files):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        share = rest * (number + 1) // len(files) - rest * number // len(files)
        asked += [
            record["turns"][0] for record in records[:: max(1, len(records) // max(1, share))]
        ][:share]
    chosen = asked + own if rest else own[:: max(1, len(OWN) // count)][:count]
    for prompt in chosen:
        yield tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )


def tie(model, tokens):
    """How far the two likeliest logits behind tokens are apart, of the largest."""
    logits = model(mx.array([tokens]))[0, -1].astype(mx.float32)
    first, second = sorted(logits.tolist())[:-3:-1]
    return (first - second) / abs(first)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[4])
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    start = time.perf_counter()
    model, tokenizer = mlx_lm.load(args.model)
    drafter = load_drafter(args.drafter, model)
    same, differences, ties = 0, 0, 0
    for number, tokens in enumerate(prompts(tokenizer, args.questions, args.prompts)):
        plain = [r.token for r in mlx_lm.stream_generate(model, tokenizer, tokens, args.max_tokens)]
        for k in args.num_draft_tokens:
            said = [
                r.token
                for r in stream_generate(
                    model, tokenizer, tokens, args.max_tokens, drafter=drafter, num_draft_tokens=k
                )
            ]
            if said == plain:
                same += 1
                continue
            at = next(i for i, (a, b) in enumerate(zip(said, plain, strict=False)) if a != b)
            gap = tie(model, [*tokens, *plain[:at]])
            near = gap < NEAR_TIE
            differences, ties = differences + (not near), ties + near
            print(
                f"prompt {number}, K = {k}: token {at} differs, logits {gap:.1e} apart", flush=True
            )
    minutes = (time.perf_counter() - start) / 60
    print(
        f"{same} of {same + differences + ties} are mlx-lm's token for token; "
        f"{ties} differ at a near-tie, {differences} otherwise; {minutes:.1f} minutes"
    )
    raise SystemExit(differences > 0)


if __name__ == "__main__":
    main()
