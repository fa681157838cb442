"""Answers of a target over several ranks, and what a round takes: against one process.

    python tests/benchmarks/ranks.py MODEL > one.json
    mlx.launch -n 3 -- python tests/benchmarks/ranks.py MODEL > three.json

Each prints the tokens of every case and the median seconds of its rounds; prompt lookup drafts.
"""

import json
import statistics
import sys

from rich.console import Console

from mlx_drift.cli.load import load_pair
from mlx_drift.generate import stream_generate
from mlx_drift.ranks.world import world

PROMPT = "one two three four five six seven\n" * 4 + "one two"
TOKENS = 16


def main(model: str) -> None:
    target, tokenizer, drafter = load_pair(model, "prompt-lookup", None, Console(stderr=True))
    told = {}
    for k in (1, 3):
        for temp in (0.0, 0.7):
            responses = [
                *stream_generate(
                    target,
                    tokenizer,
                    PROMPT,
                    TOKENS,
                    drafter=drafter,
                    num_draft_tokens=k,
                    temp=temp,
                    seed=4,
                )
            ]
            seen = responses[-1].statistics
            told[f"K={k} temp={temp}"] = {
                "tokens": [response.token for response in responses],
                "accepted": seen.acceptance_length,
                "round_seconds": statistics.median(seen.round_seconds),
            }
    ranks = world()
    ranks.finish()
    if ranks.rank == 0:
        print(json.dumps({"ranks": ranks.size, **told}))


if __name__ == "__main__":
    main(*sys.argv[1:])
