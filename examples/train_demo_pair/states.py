"""What the frozen target makes of the training rows, computed once for a whole training.

An MTP head reads nothing of the target but its final normed state, so a row of 512 tokens is
256 kB in float16, and a step of training does without the target's forward pass.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from answers import load_sequences
from rows import pack
from target import Llama
from tokenizer import PAD, token_id

ROW = 512
PACKING_SEED = 0
BATCH = 4


@dataclass(frozen=True)
class Row:
    ids: Tensor  # [512]
    said: Tensor  # [512]: the tokens that are the target's own words
    final: Tensor  # [512, hidden size]: the target's final normed state


@torch.no_grad()
def store_states(target: Llama, tokenizer: Tokenizer, answers: Path, path: Path) -> None:
    """Run the target over all rows; the file appears when it is whole."""
    sequences = load_sequences(answers)
    random.Random(PACKING_SEED).shuffle(sequences)
    packed = pack(sequences, ROW, token_id(tokenizer, PAD))
    ids, said = map(torch.stack, zip(*packed, strict=True))
    final = [
        target.model.norm(target.hidden_states(batch)[-1]).half() for batch in ids.split(BATCH)
    ]
    partial = path.with_suffix(".partial")
    save_file({"ids": ids, "said": said, "final": torch.cat(final)}, partial)
    partial.rename(path)


def endless_rows(path: Path, seed: int) -> Iterator[Row]:
    """All rows without end, each epoch in an order of its own."""
    stored = load_file(path)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(stored["ids"]), generator=generator).tolist():
            ids, said, final = (stored[name][index] for name in ("ids", "said", "final"))
            yield Row(ids, said, final.float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("pair/target-dequantized"))
    parser.add_argument("--answers", type=Path, default=Path("pair/answers.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("pair/states.safetensors"))
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    store_states(Llama.load(args.target), tokenizer, args.answers, args.out)


if __name__ == "__main__":
    main()
