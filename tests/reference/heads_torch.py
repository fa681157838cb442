"""EAGLE-1/2 and MTP heads in plain PyTorch: the train-time test, written to be trusted by reading.

The same second writing as ``eagle3_torch.py``, whose attention, MLP and norms these heads share
(their blocks are Llama layers); only what stands around the block is theirs. Sources: EAGLE-1
SafeAILab/EAGLE ``cnets1.py`` (no input norm, no final norm, the target's head); MTP arXiv
2412.19437 section 2.2 (two norms, a projection, a block, a norm).

    EAGLE-1/2   x = fc(concat[embed(token), g]);  h = x + attn(x);  h = h + mlp(norm(h))
                logits = head(h);  next g = h
    MTP         x = fc(concat[norm(embed(token)), norm(g)]);  h = x + attn(norm(x));  ...
                y = norm(h);  logits = head(y);  next g = y, or h before the norm
"""

from __future__ import annotations

import torch
from eagle3_torch import Eagle3Reference
from torch import Tensor


def teacher_forced(tokens: Tensor, rows: int, step: int) -> list[int]:
    """The tokens that a step embeds: ``tokens[i + 1 + step]``, token 0 beyond the text."""
    indices = [i + 1 + step for i in range(rows)]
    return [int(tokens[i]) if i <= rows else 0 for i in indices]


class EagleReference(Eagle3Reference):
    """An EAGLE-1 or EAGLE-2 head; ``config`` as of ``Eagle3Reference``, ``tied`` being true."""

    def train_time_test(self, tokens: Tensor, taps: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """As of ``Eagle3Reference``; taps [L, 1, H], the target's final normed states."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        logits, states = [], []
        g = taps[:, 0]
        for step in range(steps):
            embedded = self.embed[teacher_forced(tokens, len(taps), step)]
            x = self.linear(torch.cat([embedded, g], dim=-1), "fc")
            h = x + self.attention(0, x, step, keys, values)
            g = h + self.mlp(0, self.norm(h, "layers.0.post_attention_layernorm"))
            logits.append(g @ self.head.T)
            states.append(g)
        return torch.stack(logits), torch.stack(states)


class MtpReference(Eagle3Reference):
    """An MTP head around a Llama block; ``norm_output`` says which state is fed back."""

    def train_time_test(self, tokens: Tensor, taps: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """As of ``Eagle3Reference``; taps [L, 1, H]."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        logits, states = [], []
        g = taps[:, 0]
        for step in range(steps):
            embedded = self.embed[teacher_forced(tokens, len(taps), step)]
            e, n = self.norm(embedded, "embedding_norm"), self.norm(g, "hidden_norm")
            x = self.linear(torch.cat([e, n], dim=-1), "fc")
            normed = self.norm(x, "layers.0.input_layernorm")
            h = x + self.attention(0, normed, step, keys, values)
            h = h + self.mlp(0, self.norm(h, "layers.0.post_attention_layernorm"))
            y = self.norm(h, "norm")
            g = y if self.config["norm_output"] else h
            logits.append(y @ self.head.T)
            states.append(g)
        return torch.stack(logits), torch.stack(states)
