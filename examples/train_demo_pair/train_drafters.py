"""Train both drafters at once with EAGLE-3's train-time test, within a wall-clock budget.

They share the frozen target's forward pass, and with it data, batch order and step count; both
start from the same random numbers. Only the norms differ.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipe.acceptance import measure
from recipe.drafter import NORMALIZED, PLAIN, Eagle3
from recipe.features import draft_vocabulary, read
from recipe.learner import Learner
from recipe.rows import Text, pack
from recipe.schedule import lr_factor, paced
from recipe.target import Llama
from train_demo_pair.acceptance import heldout_answers
from train_demo_pair.answers import load_sequences
from train_demo_pair.data import read_jsonl
from train_demo_pair.tokenizer import PAD, token_id

ROW, ROWS = 512, 2  # small batches: a short budget is short of steps, not of tokens


def endless_batches(
    sequences: list[Text], pad_id: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    rng = random.Random(seed)
    while True:
        rng.shuffle(sequences)
        rows = list(pack(sequences, ROW, pad_id))
        for start in range(0, len(rows) - ROWS + 1, ROWS):
            ids, masks = zip(*rows[start : start + ROWS], strict=True)
            yield torch.stack(ids), torch.stack(masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("pair/target-dequantized"))
    parser.add_argument("--answers", type=Path, default=Path("pair/answers.safetensors"))
    parser.add_argument("--heldout", type=Path, default=Path(__file__).with_name("heldout.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("pair"))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--steps", type=int, default=3, help="of train-time test")
    parser.add_argument("--draft-vocab", type=int, default=2048)
    parser.add_argument("--resume", action="store_true", help="go on from the drafters in --out")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--report-every", type=float, default=180, help="seconds")
    args = parser.parse_args()

    target = Llama.load(args.target).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    sequences = load_sequences(args.answers)
    draft_ids = draft_vocabulary(sequences, args.draft_vocab, target.config.vocab_size)
    learners = {}
    for name, switches in (("eagle3", PLAIN), ("eagle3.1", NORMALIZED)):
        torch.manual_seed(args.seed)
        if args.resume:
            drafter = Eagle3.load(args.out / name, target.config)
        else:
            drafter = Eagle3(target.config, draft_ids, switches)
            drafter.init_from_target(target)
        learners[name] = Learner(drafter, args.lr)

    by_split = heldout_answers(target, tokenizer, read_jsonl(args.heldout))
    heldout = [answer for answers in by_split.values() for answer in answers]
    batches = endless_batches(sequences, token_id(tokenizer, PAD), args.seed)
    reported, tokens = time.monotonic(), 0
    for step, elapsed in paced(args.minutes):
        ids, said = next(batches)
        rows, rate = read(target, ids, said), lr_factor(elapsed / (60 * args.minutes))
        losses = {
            name: learner.learn(target, rows, args.steps, rate)
            for name, learner in learners.items()
        }
        tokens += ids.numel()
        if time.monotonic() - reported > args.report_every:
            print(f"{elapsed / 60:5.1f} min  step {step}  tokens {tokens}")
            for name, learner in learners.items():
                by_step = " ".join(f"{loss:.3f}" for loss in losses[name].tolist())
                measured = measure(learner.drafter, target, heldout, args.steps)
                print(f"  {name}: loss {by_step}  {measured}", flush=True)
            reported = time.monotonic()
    print(f"{step + 1} steps, {tokens} tokens")
    for name, learner in learners.items():
        learner.drafter.save(args.out / name, torch.float16)


if __name__ == "__main__":
    main()
