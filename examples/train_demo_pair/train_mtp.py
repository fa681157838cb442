"""Train the MTP head with EAGLE-3's train-time test, within a wall-clock budget.

The recipe of train_drafters.py with two differences: the target's states come from states.py, and
the head drafts from the target's whole vocabulary, with the target's own output layer.
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from acceptance import heldout_answers, measure
from data import read_jsonl
from mtp import MTP
from muon import Muon
from schedule import paced
from states import ROW, Row, endless_rows
from target import Llama
from train_drafters import STEP_DECAY


def chain_losses(head: MTP, target: Llama, row: Row, steps: int) -> Tensor:
    """Every step's soft cross-entropy against the target, `[steps]`.

    The target at position p predicts token p+1; at step s, row i reads token i+1+s and is compared
    with the target at that position. It counts where the target said the predicted token; a chain
    of which no step counts is not followed.
    """
    read = torch.arange(ROW)[:, None] + 1 + torch.arange(steps)  # [row, step]: the position read
    counts = (read < ROW - 1) & row.said[(read + 1).clamp(max=ROW - 1)]
    chains = counts.any(1).nonzero()[:, 0]
    read, counts = read[chains], counts[chains]
    with torch.no_grad():
        wanted = target.head(row.final).softmax(-1)

    def true_tokens(step: int, normed: Tensor | None) -> Tensor:
        ids = row.ids.roll(-1 - step)  # the rows that wrap around never count
        return target.model.embed_tokens(ids if step == 0 else ids[chains])[None]

    losses = []
    for step, (normed, _) in enumerate(head.unroll(row.final[None], true_tokens, steps, chains)):
        here = counts[:, step]
        predicted = target.head(normed[0, here])
        losses.append(F.cross_entropy(predicted, wanted[read[here, step]]))
    return torch.stack(losses)


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
    parameters = list(head.parameters())
    muon = Muon([p for p in parameters if p.dim() == 2], lr=args.lr, momentum=0.95)
    gains = [p for p in parameters if p.dim() == 1]
    adamw = torch.optim.AdamW(gains, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)

    by_split = heldout_answers(target, tokenizer, read_jsonl(args.heldout))
    heldout = [answer for answers in by_split.values() for answer in answers]
    weights = STEP_DECAY ** torch.arange(args.steps)
    rows = endless_rows(args.states, args.seed)
    reported, recent = time.monotonic(), []
    for step, elapsed in paced(args.minutes, [muon, adamw]):
        batch = islice(rows, args.rows)
        losses = torch.stack([chain_losses(head, target, row, args.steps) for row in batch]).mean(0)
        (losses * weights).sum().backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        recent.append(losses.detach())
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
