"""What the frozen target makes of the training rows, computed once for a whole training.

For the MTP head, and for every drafter of `../attention_drift`.
"""

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer

from recipe.features import read, store
from recipe.rows import pack
from recipe.target import Llama
from train_demo_pair.answers import load_sequences
from train_demo_pair.tokenizer import PAD, token_id

ROW = 512
PACKING_SEED = 0
BATCH = 4


def store_states(target_folder: Path, answers: Path, path: Path) -> None:
    """Runs the target over all rows; the file appears when it is whole."""
    target = Llama.load(target_folder).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    sequences = load_sequences(answers)
    random.Random(PACKING_SEED).shuffle(sequences)
    packed = pack(sequences, ROW, token_id(tokenizer, PAD))
    ids, said = map(torch.stack, zip(*packed, strict=True))
    batches = zip(ids.split(BATCH), said.split(BATCH), strict=True)
    store((row for batch in batches for row in read(target, *batch)), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("pair/target-dequantized"))
    parser.add_argument("--answers", type=Path, default=Path("pair/answers.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("pair/states.safetensors"))
    args = parser.parse_args()
    store_states(args.target, args.answers, args.out)


if __name__ == "__main__":
    main()
