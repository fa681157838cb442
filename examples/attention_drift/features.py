"""What the frozen target makes of the training rows, computed once for all drafters.

A row is 512 tokens of whole chats. For each token the taps and the final normed state are stored
in float16 (2 kB a token), and whether the target said it and its own choice of it is in the draft
vocabulary: only such tokens count in the loss.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from recipe import PAD, Llama, draft_vocabulary, load_sequences, pack, tap_layers, token_id

ROW = 512
DRAFT_VOCAB = 2048
PACKING_SEED = 0
BATCH = 4


@dataclass(frozen=True)
class Row:
    """One row of L tokens, H wide.

    Attributes:
        ids: Its tokens `[L]`.
        counted: The tokens whose prediction counts `[L]`.
        taps: The target's low, middle and high tap, each `[1, L, H]`.
        final: The target's normed last state `[L, H]`.
    """

    ids: Tensor
    counted: Tensor
    taps: list[Tensor]
    final: Tensor


@torch.no_grad()
def store_features(target_folder: Path, answers: Path, path: Path) -> None:
    """Runs the target over all rows; the file appears when it is whole."""
    target = Llama.load(target_folder)
    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    sequences = load_sequences(answers)
    draft_ids = draft_vocabulary(sequences, DRAFT_VOCAB, target.config.vocab_size)
    in_vocabulary = torch.zeros(target.config.vocab_size, dtype=torch.bool)
    in_vocabulary[draft_ids] = True
    random.Random(PACKING_SEED).shuffle(sequences)
    packed = pack(sequences, ROW, token_id(tokenizer, PAD))
    ids, said = map(torch.stack, zip(*packed, strict=True))

    states, counted = [], torch.zeros_like(said)
    for start in range(0, len(ids), BATCH):
        batch = slice(start, start + BATCH)
        streams = target.hidden_states(ids[batch])
        taps = [streams[tap] for tap in tap_layers(target.config.num_hidden_layers)]
        states.append(torch.stack([*taps, target.model.norm(streams[-1])], dim=1).half())
        choices = target.logits(streams[-1])[:, :-1].argmax(-1)
        counted[batch, 1:] = said[batch, 1:] & in_vocabulary[choices]
    tensors = {"ids": ids, "counted": counted, "states": torch.cat(states), "draft_ids": draft_ids}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)


class Features:
    """The stored rows, read from the file one by one."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._ids, self._counted = (self._file.get_tensor(name) for name in ("ids", "counted"))
        self._states = self._file.get_slice("states")
        self.draft_ids: Tensor = self._file.get_tensor("draft_ids")

    def rows(self, seed: int) -> Iterator[Row]:
        """All rows without end, each epoch in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(len(self._ids), generator=generator).tolist():
                *taps, final = self._states[index].float()
                yield Row(
                    self._ids[index], self._counted[index], [tap[None] for tap in taps], final
                )
