"""Rows of tokens: chats packed whole into rows of one length, and what the target makes of a row.

Packed best fit first; no chat is cut in two unless it is longer than a row, so what the model sees
in training is what it sees when it is asked a question.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Text = tuple[list[int], list[bool]]
"""Token ids, and which of them the assistant says."""

LOOKAHEAD = 64  # chats to choose the best fit from


@dataclass(frozen=True)
class Row:
    """What the target makes of a row of L tokens, H wide.

    Attributes:
        ids: Its tokens `[L]`.
        said: The tokens that are the target's own words `[L]`.
        choice: What the target itself would say after each token `[L]`.
        taps: The target's low, middle and high tap, each `[1, L, H]`.
        final: The target's normed last state `[L, H]`.
    """

    ids: Tensor
    said: Tensor
    choice: Tensor
    taps: list[Tensor]
    final: Tensor


def pack(sequences: list[Text], length: int, pad_id: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (ids, mask) rows of `length`; padding is outside the mask."""
    waiting = [(ids[:length], mask[:length]) for ids, mask in reversed(sequences)]
    while waiting:
        ids, mask = waiting.pop()
        while True:
            candidates = range(max(0, len(waiting) - LOOKAHEAD), len(waiting))
            fitting = [i for i in candidates if len(waiting[i][0]) <= length - len(ids)]
            if not fitting:
                break
            more_ids, more_mask = waiting.pop(max(fitting, key=lambda i: len(waiting[i][0])))
            ids, mask = ids + more_ids, mask + more_mask
        padding = length - len(ids)
        yield torch.tensor(ids + [pad_id] * padding), torch.tensor(mask + [False] * padding)
