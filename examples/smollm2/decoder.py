"""Batched decoding where every row is at a position of its own: one that ends is refilled.

A token at a time for all rows, prompts included: of a prompt a row is told its tokens instead of
choosing them. Attention is what costs most on a CPU, so rows are kept in groups of like length, and
a group looks no further back than its longest row: a row that starts anew goes to the first group,
and one row of each group between moves up. The query heads that share keys are rows of one product,
several times faster here than PyTorch's fused attention with a mask.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from recipe.target import Llama, rope_table

TOP = 256
"""Of so many likeliest tokens nucleus sampling chooses."""


class Decoder:
    """The keys and values of all rows, and how long each row is.

    Args:
        target: The model, in whatever dtype is fast; keys and values are float32.
        rows: How many rows are decoded at once.
        context: Tokens of a row at most.
        groups: How many groups of like length they make up.
    """

    def __init__(self, target: Llama, rows: int, context: int, groups: int = 8) -> None:
        config = target.config
        shape = (rows, config.num_key_value_heads, context, config.head_dim)
        self.target, self.context = target, context
        self.keys = [torch.zeros(shape) for _ in target.model.layers]
        self.values = [torch.zeros(shape) for _ in target.model.layers]
        self.lengths = torch.zeros(rows, dtype=torch.long)
        edges = [rows * i // groups for i in range(groups + 1)]
        self.groups = [slice(*edge) for edge in pairwise(edges)]

    def restart(self, row: int) -> list[tuple[int, int]]:
        """Forgets a row, and moves others up so that groups stay groups of like length.

        Returns:
            The moves, (from, to), in order. The new row is where the last one came from.
        """
        moves, new = [], row
        for group in reversed(self.groups):
            if group.stop <= new:  # below the row's own
                longest = group.start + int(self.lengths[group].argmax())
                moves.append((longest, new))
                new = longest
        for source, to in moves:
            length = self.lengths[source]
            for stored in (*self.keys, *self.values):
                stored[to, :, :length] = stored[source, :, :length]
            self.lengths[to] = length
        self.lengths[new] = 0
        return moves

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Reads one token a row, `[rows]`; returns logits `[rows, vocabulary]` float32."""
        target, rows = self.target, torch.arange(len(ids))
        stops = [int(self.lengths[group].max()) + 1 for group in self.groups]
        unseen = [
            (torch.arange(stop) > self.lengths[group, None])[:, None, None]
            for group, stop in zip(self.groups, stops, strict=True)
        ]
        rope = rope_table(target.config, self.lengths[:, None, None])
        x = target.model.embed_tokens(ids)[:, None]
        for layer, keys, values in zip(target.model.layers, self.keys, self.values, strict=True):
            attention, normed = layer.self_attn, _normed(layer.input_layernorm, x)
            q = attention.queries(normed, rope)[:, :, 0].unflatten(1, (attention.kv_heads, -1))
            k, v = attention.keys_values(normed, rope)
            keys[rows, :, self.lengths] = k[:, :, 0].float()
            values[rows, :, self.lengths] = v[:, :, 0].float()
            q, heads = q.float() * attention.head_dim**-0.5, []
            for group, stop, hidden in zip(self.groups, stops, unseen, strict=True):
                scores = q[group] @ keys[group, :, :stop].mT
                weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
                heads.append(weights @ values[group, :, :stop])
            x = x + attention.o_proj(torch.cat(heads).flatten(1)[:, None].to(x.dtype))
            x = x + layer.mlp(_normed(layer.post_attention_layernorm, x))
        self.lengths += 1
        return target.head(_normed(target.model.norm, x))[:, 0].float()


def _normed(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A norm, which is made in float32, in the dtype that the model multiplies in."""
    return norm(x).to(x.dtype)


def draw(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """Draws a token a row, `[rows]`, of the likeliest that make up `top_p`."""
    best, ids = logits.topk(TOP)
    chances = best.softmax(-1)
    chances = chances.masked_fill(chances.cumsum(-1) - chances > top_p, 0)
    return ids.gather(1, torch.multinomial(chances, 1, generator=generator))[:, 0]
