"""What a round costs a hybrid target, in plain steps, and how much of it puts its states back.

    python tests/benchmarks/hybrid.py [--family qwen3_next] [--bits 4]

A random model of a family with recurrent layers verifies K + 1 rows, of a chain or a small tree,
takes back those that were rejected, and computes the recurrent states anew from the accepted rows;
without a drafter, whose cost is another matter. In between, mlx-lm takes plain steps with the same
model. All of them take turns at the same context; each figure is a median of ratios to the plain
steps of the same turn.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import CONFIGS, VOCAB, build
from mlx_drift.target.model import Target
from mlx_drift.target.tree import Tree
from mlx_drift.target.tree_check import check_trees

LARGER = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 8,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
"""Sizes at which a step takes some milliseconds; three layers of four are recurrent."""
LENGTH = 256  # tokens of context
DRAFTS = (1, 2, 4)
PARENTS, PATH = [-1, -1, 0, 2], [0, 1, 3, 4]  # of a tree of four drafts, and the longer branch
WARM_UP = 2  # repeats that are not counted

Round = tuple[int, int, bool]
"""Drafts, how many of them are accepted, and whether they are a tree."""

Turn = tuple[float, float]
"""Seconds until the logits are there, and from then until the states are."""


def build_larger(family: str, bits: int | None) -> nn.Module:
    """Builds the tests' model of a family, larger."""
    config = CONFIGS[family].get("text_config", CONFIGS[family])
    config.update(LARGER)
    return build(family, bits=bits)


def saved(cache: list[Any]) -> Callable[[], None]:
    """Returns what brings a cache back to how it is now."""
    states = [list(one.cache) if isinstance(one, ArraysCache) else one.offset for one in cache]

    def restore() -> None:
        for one, state in zip(cache, states, strict=True):
            if isinstance(one, ArraysCache):
                one.cache = list(state)
            else:
                one.trim(one.offset - state)

    return restore


def plain_step(model: nn.Module, prompt: mx.array) -> Callable[[], Turn]:
    """Returns a step of mlx-lm's, which leaves its cache as it was."""
    cache = make_prompt_cache(model)
    model(prompt[None, :-1], cache=cache)
    mx.eval([one.state for one in cache])
    restore = saved(cache)

    def step() -> Turn:
        start = time.perf_counter()
        logits = model(prompt[None, -1:], cache=cache)[:, -1]
        log_probabilities = logits - mx.logsumexp(logits, keepdims=True)
        mx.eval(mx.argmax(log_probabilities, axis=-1))
        middle = time.perf_counter()
        mx.eval([one.state for one in cache])
        turn = middle - start, time.perf_counter() - middle
        restore()
        return turn

    return step


def round_of(target: Target, prompt: mx.array) -> Callable[[int, int, bool], Turn]:
    """Returns a round without a drafter, which leaves its cache as it was."""
    cache = target.make_cache()
    target(prompt[:-1], cache)
    mx.eval([one.state for one in cache])
    restore = saved(cache)

    def verify(k: int, accepted: int, branches: bool) -> Turn:
        path = PATH[: accepted + 1] if branches else range(accepted + 1)
        start = time.perf_counter()
        tree = Tree.of(mx.array(PARENTS)) if branches else None
        logits, taps = target.verify(prompt[-1 - k :], cache, tree)
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(mx.argmax(log_probabilities, axis=-1), taps)
        middle = time.perf_counter()
        target.keep(cache, path)
        mx.eval(cache.state)
        turn = middle - start, time.perf_counter() - middle
        restore()
        return turn

    return verify


def measure(
    step: Callable[[], Turn], verify: Callable[[int, int, bool], Turn], repeats: int
) -> dict[Round, list[Turn]]:
    """Returns, for every K and count of accepted drafts, turns in plain steps."""
    rounds = [(k, accepted, False) for k in DRAFTS for accepted in range(k + 1)]
    rounds += [(len(PARENTS), accepted, True) for accepted in range(len(PATH))]
    turns: dict[Round, list[Turn]] = {which: [] for which in rounds}
    for repeat in range(WARM_UP + repeats):
        start = repeat % len(rounds)
        timed = {which: (step(), verify(*which)) for which in rounds[start:] + rounds[:start]}
        if repeat >= WARM_UP:
            plain = statistics.median(sum(turn) for turn, _ in timed.values())
            for which, (_, (verifying, back)) in timed.items():
                turns[which].append((verifying / plain, back / plain))
    return turns


def spread(values: list[float]) -> str:
    """The median, and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def print_table(turns: dict[Round, list[Turn]]) -> None:
    """Prints a line for every K and count of accepted drafts."""
    print("\n| K | accepted | verifying | putting back | its share | round (quartiles) |")
    print("|---|---|---|---|---|---|")
    for (k, accepted, branches), pairs in turns.items():
        verifying, back = (statistics.median(side) for side in zip(*pairs, strict=True))
        share = statistics.median(back / (verifying + back) for verifying, back in pairs)
        whole = spread([sum(pair) for pair in pairs])
        drafts = f"{k}, a tree" if branches else k
        print(f"| {drafts} | {accepted} | {verifying:.2f} | {back:.2f} | {share:.0%} | {whole} |")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", default="qwen3_5")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    model = build_larger(arguments.family, arguments.bits)
    layers = len(make_prompt_cache(model))
    target = Target(model, (1, layers // 2, layers - 1))
    check_trees(target)
    prompt = mx.random.randint(0, VOCAB, (LENGTH,))
    step, verify = plain_step(model, prompt), round_of(target, prompt)
    preloaded = os.environ.get("LD_PRELOAD", "nothing")
    print(f"mlx {mx.__version__}, {mx.default_device()}, LD_PRELOAD {preloaded}; {vars(arguments)}")
    plain = statistics.median(sum(step()) for _ in range(10))
    print(f"{layers} layers, context {LENGTH}; a plain step takes about {1e3 * plain:.0f} ms.")
    print_table(measure(step, verify, arguments.repeats))


if __name__ == "__main__":
    main()
