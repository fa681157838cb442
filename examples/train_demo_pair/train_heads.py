"""Train the heads that feed nothing back: DFlash, which fills a block, and Medusa.

On the rows of train_mtp.py, in the same order; by default as many steps, so that equal training is
equal data.
The learning rate follows the steps, so a training that was stopped goes on exactly.
"""

import argparse
import os
import time
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from recipe.acceptance import measure
from recipe.dflash import DFlash
from recipe.features import Features, draft_vocabulary, endless
from recipe.learner import Learner, save_whole
from recipe.medusa import Medusa
from recipe.schedule import lr_factor
from recipe.target import Llama
from train_demo_pair.acceptance import heldout_answers
from train_demo_pair.data import read_jsonl
from train_demo_pair.states import ROW
from train_demo_pair.tokenizer import PAD, token_id

BLOCK, LAYERS = 8, 2  # of dflash
BLOCKS_OF_A_ROW = 64  # that are learned from: each costs as much as eight chains of a step
HEADS = 4  # of medusa


def build(kind: str, target: Llama, draft_ids: torch.Tensor, mask: int) -> DFlash | Medusa:
    """An untrained head."""
    if kind == "dflash":
        head: DFlash | Medusa = DFlash(target.config, draft_ids, LAYERS, BLOCK, mask)
    else:
        head = Medusa(target.config, draft_ids, HEADS)
    head.init_from_target(target)
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["dflash", "medusa"])
    parser.add_argument("--target", type=Path, default=Path("pair/target-dequantized"))
    parser.add_argument("--states", type=Path, default=Path("pair/states.safetensors"))
    parser.add_argument("--heldout", type=Path, default=Path(__file__).with_name("heldout.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("pair"))
    parser.add_argument("--steps", type=int, default=4690, help=f"of one row of {ROW} tokens")
    parser.add_argument("--draft-vocab", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--report-every", type=float, default=300, help="seconds")
    args = parser.parse_args()

    target = Llama.load(args.target).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    features = Features([args.states])
    draft_ids = draft_vocabulary(features.texts(), args.draft_vocab, target.config.vocab_size)
    torch.manual_seed(args.seed)
    head = build(args.kind, target, draft_ids, token_id(tokenizer, PAD))
    depth, most = (BLOCK - 1, BLOCKS_OF_A_ROW) if args.kind == "dflash" else (HEADS, None)
    learner, step, seconds = Learner(head, args.lr), 0, 0.0
    checkpoint = args.out / f"{args.kind}.checkpoint"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        learner.load_state_dict(saved["learner"])
        step, seconds = saved["step"], saved["seconds"]
        torch.set_rng_state(saved["random"])

    by_split = heldout_answers(target, tokenizer, read_jsonl(args.heldout))
    heldout = [answer for answers in by_split.values() for answer in answers]
    reported, started, recent = time.monotonic(), os.times().user, []

    def report() -> None:
        spent = seconds + os.times().user - started
        mean = " ".join(f"{loss:.3f}" for loss in torch.stack(recent).mean(0).tolist())
        print(f"{spent / 60:5.1f} min of CPU  step {step}  tokens {step * ROW}")
        print(f"  loss {mean}  {measure(head, target, heldout, depth)}", flush=True)
        going = {"step": step, "seconds": spent, "random": torch.get_rng_state()}
        save_whole({"learner": learner.state_dict()} | going, checkpoint)

    for row in islice(endless(features, args.seed, start=step), args.steps - step):
        rate = lr_factor((step + 1) / (args.steps + 1))
        recent.append(learner.learn(target, [row], depth, rate, most))
        step += 1
        if time.monotonic() - reported > args.report_every:
            report()
            reported, recent = time.monotonic(), []
    if recent:
        report()
    head.save(args.out / args.kind, torch.float16)


if __name__ == "__main__":
    main()
