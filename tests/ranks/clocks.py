"""Ranks whose clocks disagree wildly: `auto` decides by rank 0's on all of them.

As a program (`python clocks.py OUT`) it is one of the ranks.
"""

import json
import random
import sys
import time
from itertools import pairwise, product
from pathlib import Path

import mlx.nn as nn
from rank_cases import PROMPT, drafter_of

import families
from mlx_drift.generate import stream_generate
from mlx_drift.ranks.cut import shard
from mlx_drift.ranks.world import world
from tiny import NoText

TOKENS = 24


def answers_by_clock(model: nn.Module) -> dict[str, tuple[list[int], list[int]]]:
    """The tokens of answers whose lengths of draft go by the clock, and how many were tested.

    Two in turn with each drafter, the second with what the first learned.
    """
    told: dict[str, tuple[list[int], list[int]]] = {}
    for kind, tree, temps in ("eagle3.1", "auto", [0.0]), ("draft model", None, [0.0, 0.8]):
        drafter = drafter_of(kind, "llama", model)
        for turn, temp in product(range(2), temps):
            tokens, tested = [], {}
            for response in stream_generate(
                model,
                NoText(),
                [*PROMPT, turn],
                TOKENS,
                drafter=drafter,
                num_draft_tokens="auto" if tree is None else None,
                tree=tree,
                temp=temp,
                seed=5,
                compare_plain=True,
            ):
                tokens.append(response.token)
                seen = response.statistics
                tested[seen.rounds + seen.plain_tokens] = sum(seen.tested)
            so_far = [0, *tested.values()]
            told[f"{kind} tree={tree} temp={temp} turn={turn}"] = (
                tokens,
                [after - before for before, after in pairwise(so_far)],
            )
    return told


def main(out: str) -> None:
    ranks = world()
    if ranks.rank:
        noise, now = random.Random(ranks.rank), time.perf_counter
        time.perf_counter = lambda: 3 * now() + noise.random()
    model = families.build("llama")
    shard(model, ranks)
    told = answers_by_clock(model)
    ranks.check_same("the answers", {way: repr(answer) for way, answer in told.items()}, "")
    ranks.finish()
    if ranks.rank == 0:
        Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
