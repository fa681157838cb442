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
from torch import Tensor

from attention_drift.arms import ARMS, MTP_ARMS, Run, runs
from recipe.drafter import Eagle3, Switches
from recipe.features import Features, draft_vocabulary, endless
from recipe.learner import Learner, save_whole
from recipe.loss import Drafter
from recipe.mtp import MTP
from recipe.rows import Row
from recipe.schedule import lr_factor
from recipe.target import Llama
from train_demo_pair.answers import load_sequences
from train_demo_pair.states import ROW, store_states

DRAFT_VOCAB = 2048
CHECKPOINT_EVERY = 120.0
"""Seconds."""


@dataclass(frozen=True)
class Recipe:
    """What all drafters of the study have in common."""

    study: Path
    target: Path
    answers: Path
    steps: int
    rows: int
    lr: float

    @property
    def features(self) -> Path:
        """The file of what the target makes of the training rows."""
        return self.study / "features.safetensors"


def batches(recipe: Recipe, draft_ids: Tensor, seed: int, start: int) -> Iterator[list[Row]]:
    """The rows of each step, from step `start` on.

    What counts is the same for all arms: tokens of the draft vocabulary, for MTP heads as well.
    """
    rows = endless(Features([recipe.features]), seed, start * recipe.rows)
    while True:
        batch = list(islice(rows, recipe.rows))
        for row in batch:
            row.said[1:] &= torch.isin(row.choice[:-1], draft_ids)
        yield batch


def make(run: Run, target: Llama, draft_ids: Tensor) -> Drafter:
    """A drafter of an arm, before its training."""
    if run.arm in MTP_ARMS:
        head = MTP(target.config, MTP_ARMS[run.arm])
        head.init_as_lens()
        return head
    drafter = Eagle3(target.config, draft_ids, Switches(**ARMS[run.arm]))
    drafter.init_from_target(target)
    return drafter


def train(run: Run, recipe: Recipe) -> str:
    """Trains one drafter, unless it is there; returns a line about it."""
    folder = recipe.study / run.name
    report, checkpoint = folder / "train.json", recipe.study / f"{run.name}.checkpoint"
    if report.exists():
        return f"{run.name}: is there"
    torch.set_num_threads(1)
    target = Llama.load(recipe.target).requires_grad_(False)
    sequences = load_sequences(recipe.answers)
    draft_ids = draft_vocabulary(sequences, DRAFT_VOCAB, target.config.vocab_size)
    torch.manual_seed(run.seed)
    drafter = make(run, target, draft_ids)
    learner = Learner(drafter, recipe.lr)

    losses: list[list[float]] = []
    seconds = 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        learner.load_state_dict(saved["learner"])
        losses, seconds = saved["losses"], saved["seconds"]

    started = saved_at = time.monotonic() - seconds
    ahead = batches(recipe, draft_ids, run.seed, len(losses))
    for rows in islice(ahead, recipe.steps - len(losses)):
        rate = lr_factor((len(losses) + 1) / (recipe.steps + 1))
        loss = learner.learn(target, rows, run.depth, rate)
        losses.append([round(value, 5) for value in loss.tolist()])
        if time.monotonic() - saved_at > CHECKPOINT_EVERY:
            saved_at = time.monotonic()
            seconds = saved_at - started
            state = {"learner": learner.state_dict(), "losses": losses, "seconds": seconds}
            save_whole(state, checkpoint)

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
    recipe = Recipe(args.study, args.target, args.answers, args.steps, args.rows, args.lr)
    if not recipe.features.exists():
        started = time.monotonic()
        store_states(args.target, args.answers, recipe.features)
        print(f"features: {time.monotonic() - started:.0f} s", flush=True)
    wanted = [run for run in runs() if args.only is None or run.name in args.only]
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for line in pool.map(partial(train, recipe=recipe), wanted):
            print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
