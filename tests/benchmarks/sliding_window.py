"""Is speculative decoding exact past the wrap of a sliding window? Ours and mlx-lm's own loop.

    python tests/benchmarks/sliding_window.py

A tiny random Llama, once with full attention and once with every other layer sliding over 16 keys,
generates 96 tokens greedily: alone, with mlx-lm's `speculative_generate_step` and a draft model
that errs (the same weights with noise), and with mlx-drift and a drafter that errs.
"""

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.generate import speculative_generate_step

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_families import LENGTH, PROMPT, spoken, taps_of

from mlx_drift.target.model import Target
from tiny import plain_greedy, tiny_llama

WINDOW = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}


def noisy(model: nn.Module) -> nn.Module:
    """A draft model that is often right."""
    mx.random.seed(1)
    model.update(tree_map(lambda a: a + 0.03 * mx.random.normal(a.shape), model.parameters()))
    return model


def same(tokens: list[int], plain: list[int]) -> str:
    """How many tokens are plain decoding's, up to the first that is not."""
    wrong = (i for i, (a, b) in enumerate(zip(tokens, plain, strict=True)) if a != b)
    return f"{next(wrong, LENGTH)} of {LENGTH}"


def main() -> None:
    """Prints the table."""
    print("| target | K | mlx-lm's loop: equal up to the first difference | mlx-drift |")
    print("|---|---|---|---|")
    for name, arguments in (("full attention", {}), ("window of 16 and full", WINDOW)):
        model, draft = tiny_llama(**arguments), noisy(tiny_llama(**arguments))
        plain = plain_greedy(model, PROMPT, LENGTH + 8)
        for k in (1, 3):
            steps = speculative_generate_step(
                mx.array(PROMPT), model, draft, num_draft_tokens=k, max_tokens=LENGTH
            )
            theirs = same([int(token) for token, *_ in steps], plain[:LENGTH])
            ours = spoken(Target(model, taps_of(model)), PROMPT + plain, k)
            print(f"| {name} | {k} | {theirs} | {same(ours, plain[:LENGTH])} |")


if __name__ == "__main__":
    main()
