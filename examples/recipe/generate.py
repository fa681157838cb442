"""Batched decoding of prompts that are there, with a static cache."""

import torch

from recipe.rows import Text
from recipe.target import Cache, Llama


@torch.no_grad()
def generate(
    target: Llama,
    prompts: list[list[int]],
    temperatures: list[float],
    max_tokens: int,
    end: int,
    pad: int,
) -> list[Text]:
    """One batch, one temperature a row (0: greedy); an answer includes its end-of-turn token."""
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    heat = torch.tensor(temperatures)[:, None]
    cache = Cache.empty(target.config, padding, longest + max_tokens)
    running = torch.ones(len(prompts), dtype=torch.bool)
    columns: list[torch.Tensor] = []
    while running.any() and len(columns) < max_tokens:
        logits = target.logits(target.hidden_states(ids, cache)[-1][:, -1])
        sampled = torch.multinomial((logits / heat.clamp(min=0.01)).softmax(-1), 1)
        ids = torch.where(heat > 0, sampled, logits.argmax(-1, keepdim=True))
        columns.append(torch.where(running[:, None], ids, pad))
        running &= ids[:, 0] != end
    texts = []
    for prompt, row in zip(prompts, torch.cat(columns, dim=1).tolist(), strict=True):
        answer = row[: row.index(end) + 1] if end in row else row
        texts.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return texts
