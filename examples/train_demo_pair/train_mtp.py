"""Train the MTP head with EAGLE-3's train-time test, within a wall-clock budget.

The recipe of train_drafters.py with two differences: the target's states come from states.py, and
the head drafts from the target's whole vocabulary, with the target's own output layer.
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from recipe.acceptance import measure
from recipe.features import Features, endless
from recipe.learner import Learner
from recipe.mtp import MTP
from recipe.schedule import lr_factor, paced
from recipe.target import Llama
from train_demo_pair.acceptance import heldout_answers
from train_demo_pair.data import read_jsonl
from train_demo_pair.states import ROW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("pair/target-dequantized"))
    parser.add_argument("--states", type=Path, default=Path("pair/states.safetensors"))
    parser.add_argument("--heldout", type=Path, default=Path(__file__).with_name("heldout.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("pair/mtp"))
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--steps", type=int, default=4, help="of train-time test")
    parser.add_argument("--rows", type=int, default=1, help=f"of {ROW} tokens, a step")
    parser.add_argument("--feedback", choices=["post", "pre"], default="post")
    parser.add_argument("--resume", action="store_true", help="go on from the head in --out")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--report-every", type=float, default=300, help="seconds")
    args = parser.parse_args()

    target = Llama.load(args.target).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    torch.manual_seed(args.seed)
    if args.resume:
        head = MTP.load(args.out, target.config)
    else:
        head = MTP(target.config, args.feedback)
        head.init_as_lens()
    learner = Learner(head, args.lr)

    by_split = heldout_answers(target, tokenizer, read_jsonl(args.heldout))
    heldout = [answer for answers in by_split.values() for answer in answers]
    rows = endless(Features([args.states]), args.seed)
    reported, recent = time.monotonic(), []
    for step, elapsed in paced(args.minutes):
        batch, rate = list(islice(rows, args.rows)), lr_factor(elapsed / (60 * args.minutes))
        recent.append(learner.learn(target, batch, args.steps, rate))
        if time.monotonic() - reported > args.report_every:
            mean = " ".join(f"{loss:.3f}" for loss in torch.stack(recent).mean(0).tolist())
            print(f"{elapsed / 60:5.1f} min  step {step}  tokens {(step + 1) * args.rows * ROW}")
            print(f"  loss {mean}  {measure(head, target, heldout, args.steps)}", flush=True)
            head.save(args.out, torch.float16)  # to go on from, should the training be cut short
            reported, recent = time.monotonic(), []
    print(f"{step + 1} steps, {(step + 1) * args.rows * ROW} tokens")
    head.save(args.out, torch.float16)


if __name__ == "__main__":
    main()
