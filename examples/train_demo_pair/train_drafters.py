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
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from acceptance import heldout_answers, measure
from answers import load_sequences
from data import read_jsonl
from drafter import NORMALIZED, PLAIN, Eagle3
from muon import Muon
from rows import Sequence, pack
from schedule import paced
from target import Llama
from tokenizer import PAD, token_id

ROW, ROWS = 512, 2  # small batches: a short budget is short of steps, not of tokens
STEP_DECAY = 0.8  # EAGLE-3's weight of step s is 0.8**s


def draft_vocabulary(sequences: list[Sequence], size: int, vocab_size: int) -> Tensor:
    """The ids the target says most often, ascending."""
    spoken = [i for ids, mask in sequences for i, said in zip(ids, mask, strict=True) if said]
    counts = torch.bincount(torch.tensor(spoken), minlength=vocab_size)
    # Stable: among equally rare tokens the lower id (the earlier BPE merge) wins.
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def endless_batches(
    sequences: list[Sequence], pad_id: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    rng = random.Random(seed)
    while True:
        rng.shuffle(sequences)
        rows = list(pack(sequences, ROW, pad_id))
        for start in range(0, len(rows) - ROWS + 1, ROWS):
            ids, masks = zip(*rows[start : start + ROWS], strict=True)
            yield torch.stack(ids), torch.stack(masks)


def unrolled_losses(
    drafters: dict[str, Eagle3], target: Llama, ids: Tensor, said: Tensor, steps: int
) -> dict[str, Tensor]:
    """Every step's soft cross-entropy against the target, renormalised over the draft vocabulary.

    The target at position p predicts token p+1; at step s, row i reads token i+1+s and is compared
    with the target at that position. It counts where the target said the predicted token and its
    argmax is in the draft vocabulary.
    """
    embed = target.model.embed_tokens
    t2d, draft_ids = (getattr(next(iter(drafters.values())), n) for n in ("t2d", "draft_ids"))
    with torch.no_grad():
        states = target.hidden_states(ids)
        logits = target.logits(states[-1])
        wanted = logits[:, :-1][..., draft_ids].softmax(-1)
        counted = said[:, 1:] & t2d[logits[:, :-1].argmax(-1)]

    def true_tokens(step: int, normed: Tensor | None) -> Tensor:
        return embed(ids.roll(-1 - step, dims=1))  # the rows that wrap around never count

    losses = {}
    for name, drafter in drafters.items():
        taps = [states[tap] for tap in drafter.taps]
        of_steps = []
        for step, (normed, _) in enumerate(drafter.unroll(taps, true_tokens, steps)):
            rows = counted[:, 1 + step :]
            predicted = drafter.lm_head(normed[:, : rows.shape[1]][rows])
            of_steps.append(F.cross_entropy(predicted, wanted[:, 1 + step :][rows]))
        losses[name] = torch.stack(of_steps)
    return losses


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
    drafters = {}
    for name, switches in (("eagle3", PLAIN), ("eagle3.1", NORMALIZED)):
        torch.manual_seed(args.seed)
        if args.resume:
            drafters[name] = Eagle3.load(args.out / name, target.config)
        else:
            drafters[name] = Eagle3(target.config, draft_ids, switches)
            drafters[name].init_from_target(target)

    named = [pair for drafter in drafters.values() for pair in drafter.named_parameters()]
    matrices = [p for name, p in named if p.dim() == 2 and "lm_head" not in name]
    others = [p for name, p in named if p.dim() == 1 or "lm_head" in name]
    muon = Muon(matrices, lr=args.lr, momentum=0.95)
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)

    by_split = heldout_answers(target, tokenizer, read_jsonl(args.heldout))
    heldout = [answer for answers in by_split.values() for answer in answers]
    weights = STEP_DECAY ** torch.arange(args.steps)
    batches = endless_batches(sequences, token_id(tokenizer, PAD), args.seed)
    reported, tokens = time.monotonic(), 0
    for step, elapsed in paced(args.minutes, [muon, adamw]):
        ids, said = next(batches)
        losses = unrolled_losses(drafters, target, ids, said, args.steps)
        (torch.stack(list(losses.values())) * weights).sum().backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        tokens += ids.numel()
        if time.monotonic() - reported > args.report_every:
            print(f"{elapsed / 60:5.1f} min  step {step}  tokens {tokens}")
            for name, drafter in drafters.items():
                by_step = " ".join(f"{loss:.3f}" for loss in losses[name].tolist())
                measured = measure(drafter, target, heldout, args.steps)
                print(f"  {name}: loss {by_step}  {measured}", flush=True)
            reported = time.monotonic()
    print(f"{step + 1} steps, {tokens} tokens")
    for name, drafter in drafters.items():
        drafter.save(args.out / name, torch.float16)


if __name__ == "__main__":
    main()
