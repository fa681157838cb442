"""Train the drafters of the study with EAGLE-3's train-time test, a fixed number of steps each.

All drafters of a seed start from the same random numbers and see the same rows in the same order;
what they differ in is their arm and the depth of the chains they are trained on. A drafter that is
there is not trained again, and one that was interrupted goes on from its last checkpoint.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from arms import ARMS, MTP_ARMS, Run, runs
from features import ROW, Features, Row, store_features
from recipe import MTP, STEP_DECAY, Eagle3, Llama, Muon, Switches, lr_factor

CHECKPOINT_EVERY = 120.0
"""Seconds."""


@dataclass(frozen=True)
class Recipe:
    """What all drafters of the study have in common."""

    study: Path
    target: Path
    steps: int
    rows: int
    lr: float

    @property
    def features(self) -> Path:
        """The file of what the target makes of the training rows."""
        return self.study / "features.safetensors"


Drafter = Eagle3 | MTP


def chain_losses(drafter: Drafter, target: Llama, row: Row, depth: int) -> Tensor:
    """The soft cross-entropy of each step against the target over what is drafted from, `[depth]`.

    Row i of step s reads token i+1+s and is compared with what the target says next. A chain is
    followed only where some step of it counts.
    """
    length = len(row.ids)
    steps = torch.arange(depth)
    read = torch.arange(length)[:, None] + 1 + steps  # [row, step]: the position that is read
    counts = (read < length - 1) & row.counted[(read + 1).clamp(max=length - 1)]
    rows = counts.any(1).nonzero()[:, 0]
    read, counts = read[rows], counts[rows]
    head = target.model.embed_tokens.weight
    if isinstance(drafter, MTP):
        start, predict = row.final[None], target.head
    else:
        start, predict, head = row.taps, drafter.lm_head, head[drafter.draft_ids]
    with torch.no_grad():
        wanted = F.linear(row.final, head).softmax(-1)

    def true_tokens(step: int, normed: Tensor | None) -> Tensor:
        ids = row.ids.roll(-1 - step)  # the rows that wrap around never count
        return target.model.embed_tokens(ids if step == 0 else ids[rows])[None]

    losses = []
    for step, (normed, _) in enumerate(drafter.unroll(start, true_tokens, depth, rows)):
        here = counts[:, step]
        predicted = predict(normed[0, here])
        losses.append(F.cross_entropy(predicted, wanted[read[here, step]]))
    return torch.stack(losses)


def optimizers_of(drafter: Drafter, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for gains and head, as for the embedded pair."""
    named = list(drafter.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "lm_head" not in name]
    others = [p for name, p in named if p.dim() == 1 or "lm_head" in name]
    return [
        Muon(matrices, lr=lr, momentum=0.95),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batches(features: Features, recipe: Recipe, seed: int, start: int) -> Iterator[list[Row]]:
    """The rows of each step, from step `start` on."""
    rows = features.rows(seed)
    next(islice(rows, start * recipe.rows, start * recipe.rows), None)
    while True:
        yield list(islice(rows, recipe.rows))


def make(run: Run, target: Llama, features: Features) -> Drafter:
    """A drafter of an arm, before its training."""
    if run.arm in MTP_ARMS:
        head = MTP(target.config, MTP_ARMS[run.arm])
        head.init_as_lens()
        return head
    drafter = Eagle3(target.config, features.draft_ids, Switches(**ARMS[run.arm]))
    drafter.init_from_target(target)
    return drafter


def train(run: Run, recipe: Recipe) -> str:
    """Trains one drafter, unless it is there; returns a line about it."""
    folder = recipe.study / run.name
    report, checkpoint = folder / "train.json", recipe.study / f"{run.name}.checkpoint"
    if report.exists():
        return f"{run.name}: is there"
    torch.set_num_threads(1)
    features = Features(recipe.features)
    target = Llama.load(recipe.target).requires_grad_(False)
    torch.manual_seed(run.seed)
    drafter = make(run, target, features)
    optimizers = optimizers_of(drafter, recipe.lr)

    losses: list[list[float]] = []
    seconds = 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        drafter.load_state_dict(saved["drafter"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        losses, seconds = saved["losses"], saved["seconds"]

    weights = STEP_DECAY ** torch.arange(run.depth)
    started = saved_at = time.monotonic() - seconds
    for rows in islice(
        batches(features, recipe, run.seed, len(losses)), recipe.steps - len(losses)
    ):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor((len(losses) + 1) / (recipe.steps + 1))
        of_rows = torch.stack([chain_losses(drafter, target, row, run.depth) for row in rows])
        (of_rows.mean(0) * weights).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append([round(loss, 5) for loss in of_rows.detach().mean(0).tolist()])
        if time.monotonic() - saved_at > CHECKPOINT_EVERY:
            saved_at = time.monotonic()
            state = {
                "drafter": drafter.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "losses": losses,
                "seconds": saved_at - started,
            }
            whole = checkpoint.with_suffix(".partial")
            torch.save(state, whole)
            whole.rename(checkpoint)

    seconds = time.monotonic() - started
    if isinstance(drafter, MTP):
        drafter.save(folder, torch.float16)
    else:
        drafter.save(folder, torch.float16, also_bin=False)
    told = {
        **asdict(run),
        "switches": {} if isinstance(drafter, MTP) else asdict(drafter.switches),
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.rows * ROW,
        "tokens_per_step": recipe.rows * ROW,
        "lr": recipe.lr,
        "seconds": round(seconds, 1),
        "losses": losses,
    }
    report.write_text(json.dumps(told) + "\n")  # the last: it says that the drafter is whole
    checkpoint.unlink(missing_ok=True)
    last = torch.tensor(losses[-50:]).mean(0).tolist()
    return f"{run.name}: {seconds:.0f} s, loss " + " ".join(f"{loss:.3f}" for loss in last)


def main() -> None:
    """Trains all that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=Path("study"), help="where drafters go")
    parser.add_argument("--target", type=Path, default=Path("pair/target-dequantized"))
    parser.add_argument("--answers", type=Path, default=Path("pair/answers.safetensors"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=1, help=f"of {ROW} tokens, a step")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--only", nargs="+", help="names of drafters, as arm-ttt4-seed0")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of one thread each")
    args = parser.parse_args()
    recipe = Recipe(args.study, args.target, args.steps, args.rows, args.lr)
    if not recipe.features.exists():
        started = time.monotonic()
        store_features(args.target, args.answers, recipe.features)
        print(f"features: {time.monotonic() - started:.0f} s", flush=True)
    wanted = [run for run in runs() if args.only is None or run.name in args.only]
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for line in pool.map(partial(train, recipe=recipe), wanted):
            print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
