"""Chats packed whole into rows of fixed length, best fit first.

Every row starts with a BoS token and no chat is cut in two unless it is longer than a row, so
what the model sees in training is what it sees when it is asked a question.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

Sequence = tuple[list[int], list[bool]]  # token ids, and which of them the assistant says

LOOKAHEAD = 64  # chats to choose the best fit from


def pack(sequences: list[Sequence], length: int, pad_id: int) -> Iterator[tuple[Tensor, Tensor]]:
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
