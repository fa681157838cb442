"""Train both heads on chats that are still being written, as long as there is time.

`eagle3` and `eagle3.1` take every step together: same rows, same order, same start. An epoch is
over all chats that the target has read when it begins, so the next has those that came meanwhile.
A training that was stopped goes on from its last checkpoint as if it had not been: weights,
optimizers, averages, order.
"""

import argparse
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipe.acceptance import measure
from recipe.average import Average
from recipe.drafter import NORMALIZED, PLAIN, Eagle3
from recipe.features import Features, draft_vocabulary
from recipe.learner import Learner, save_whole
from recipe.rows import Row
from recipe.target import Llama
from smollm2.texts import SHARD, asked, chats, extend, held_out, store_answers

HEADS = {"eagle3": PLAIN, "eagle3.1": NORMALIZED}
WARMUP = 40  # steps
WINDOW = 512
"""Answer tokens that are learned of a row at once: behind a long context the chains need memory."""

CHECKPOINT_EVERY = 180.0  # seconds


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: Steps taken.
        said: Answer tokens they were of: what the loss is over.
        read: Tokens of their rows, prompts included.
        seconds: They took.
        epoch: Epochs begun, less one.
        rows: How many rows this epoch is over.
        at: How many of them were taken.
        curve: What was measured on the way.
    """

    step: int = 0
    said: int = 0
    read: int = 0
    seconds: float = 0.0
    epoch: int = 0
    rows: int = 0
    at: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


def window(row: Row, generator: torch.Generator) -> Row:
    """A row cut to some consecutive answer tokens of it, behind all that comes before them."""
    positions = row.said.nonzero()[:, 0]
    if len(positions) <= WINDOW:
        first, stop = 0, int(positions[-1]) + 1
    else:
        start = int(torch.randint(len(positions) - WINDOW + 1, (), generator=generator))
        first, stop = int(positions[start]), int(positions[start + WINDOW - 1]) + 1
    said = row.said[:stop].clone()
    said[:first] = False
    taps = [tap[:, :stop] for tap in row.taps]
    return Row(row.ids[:stop], said, row.choice[:stop], taps, row.final[:stop])


class Training:
    """Both heads, and the rows they learn from."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.target = Llama.load(args.target).requires_grad_(False)
        self.features = Features()
        self.paths: list[Path] = []
        self.progress = Progress()
        self.checkpoint = args.run / "checkpoint.pt"
        args.run.mkdir(parents=True, exist_ok=True)
        saved = torch.load(self.checkpoint) if self.checkpoint.exists() else None
        self.find_rows()
        if saved:
            self.draft_ids = saved["draft_ids"]
        else:
            texts = (text for file in args.chats for text in chats(file))
            size = self.target.config.vocab_size
            self.draft_ids = draft_vocabulary(texts, args.draft_vocab, size)
        self.learners, self.averages = {}, {}
        for name in args.heads:
            torch.manual_seed(args.seed)
            head = Eagle3(self.target.config, self.draft_ids, HEADS[name])
            head.init_from_target(self.target)
            self.learners[name] = Learner(head, args.lr, args.threads)
            self.averages[name] = Average(head)
        if saved:
            self.progress = Progress(**saved["progress"])
            for name in args.heads:
                self.learners[name].load_state_dict(saved["learners"][name])
                self.averages[name].model.load_state_dict(saved["averages"][name])
        self.questions = dict(self.find_questions())

    def find_rows(self) -> None:
        """Takes in the chats that came since; with `--rows` no more than that many."""
        if self.args.rows and len(self.features) >= self.args.rows:
            return
        for path in extend(self.target, self.args.chats, self.args.features, self.args.new_files):
            if path not in self.paths:
                self.paths.append(path)
                self.features.add(path)

    def find_questions(self) -> Iterator[tuple[str, Features]]:
        """What is measured on: held-out chats, and whatever files of questions were given."""
        tokenizer = Tokenizer.from_file(str(self.args.target / "tokenizer.json"))
        for file in (None, *self.args.questions):
            name = file.stem if file else "held-out"
            path = self.args.features / "questions" / f"{name}.safetensors"
            if not path.exists():
                limit = self.args.limit
                prompts = asked(tokenizer, file, limit) if file else held_out(self.args.chats[0])
                store_answers(self.target, prompts, path)
            yield name, Features([path])

    def batches(self) -> Iterator[list[Row]]:
        """Rows without end, of so many answer tokens a step."""
        progress, batch, said = self.progress, [], 0
        while True:
            if progress.at == progress.rows:
                if progress.rows:
                    progress.epoch += 1
                self.find_rows()
                progress.rows = min(len(self.features), self.args.rows or len(self.features))
                progress.at = 0
                if not progress.rows:
                    raise SystemExit(f"no features yet: {SHARD} tokens of chats make the first")
            order = self.generator(progress.epoch)
            indices = torch.randperm(progress.rows, generator=order).tolist()
            while progress.at < progress.rows:
                row = self.features[indices[progress.at]]
                row = window(row, self.generator(progress.epoch, progress.at))
                progress.at += 1
                progress.said += int(row.said.sum())
                progress.read += len(row.ids)
                batch.append(row)
                said += int(row.said.sum())
                if said >= self.args.batch:
                    yield batch
                    batch, said = [], 0

    def generator(self, *numbers: int) -> torch.Generator:
        """Random numbers that depend on the seed and where the training stands alone."""
        seed = hash((self.args.seed, *numbers)) % 2**63  # of integers: the same in every process
        return torch.Generator().manual_seed(seed)

    def measured(self) -> dict[str, Any]:
        """Measures the averaged heads on every set of questions; a line of the curve."""
        found = {
            name: {
                head: asdict(measure(average.model, self.target, questions, self.args.drafts))
                for head, average in self.averages.items()
            }
            for name, questions in self.questions.items()
        }
        where = asdict(self.progress)
        return {key: where[key] for key in ("step", "said", "read", "seconds", "epoch")} | found

    def save(self) -> None:
        """Writes what a training goes on from, and the averaged heads in SpecForge's layout."""
        state = {
            "progress": asdict(self.progress),
            "draft_ids": self.draft_ids,
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
            "averages": {name: a.model.state_dict() for name, a in self.averages.items()},
        }
        save_whole(state, self.checkpoint)
        (self.args.run / "curve.json").write_text(json.dumps(self.progress.curve, indent=1) + "\n")
        for name, average in self.averages.items():
            average.model.save(self.args.run / name, torch.float16, also_bin=False)


def main() -> None:
    """Trains until enough is learned, or a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="the float32 folder")
    parser.add_argument("--chats", type=Path, nargs="+", required=True, help="files of chats.py")
    parser.add_argument("--features", type=Path, required=True, help="a folder, 4.6 kB a token")
    parser.add_argument("--run", type=Path, required=True, help="a folder for this training")
    parser.add_argument(
        "--questions", type=Path, nargs="*", default=[], help="to measure on as well"
    )
    parser.add_argument(
        "--heads", nargs="+", choices=HEADS, default=[*HEADS], help="one left out ends where it is"
    )
    parser.add_argument("--limit", type=int, default=40, help="questions of each file")
    parser.add_argument("--rows", type=int, help="learn from so many chats, the first, and no more")
    parser.add_argument(
        "--new-files",
        type=int,
        default=4,
        help="of features that are added before an epoch, at most, each a minute's work of a core",
    )
    parser.add_argument("--tokens", type=float, default=10e6, help="answer tokens to learn in all")
    parser.add_argument(
        "--cooldown",
        type=float,
        default=0.15,
        help="share of them, the last, in which the rate falls",
    )
    parser.add_argument("--batch", type=int, default=1024, help="answer tokens a step")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="that share a step's rows (two cores: a fifth faster)",
    )
    parser.add_argument("--depth", type=int, default=4, help="steps of the train-time test")
    parser.add_argument("--drafts", type=int, default=4, help="a round, when it is measured")
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-every", type=int, default=200, help="steps")
    args = parser.parse_args()
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))

    training = Training(args)
    progress = training.progress
    started = saved = time.monotonic()
    before, recent = progress.seconds, []
    batches = training.batches()
    while progress.said < args.tokens and not stopped:
        rows = next(batches)
        rate = min(1.0, (progress.step + 1) / WARMUP)
        if args.cooldown:
            left = 1 - progress.said / args.tokens
            rate = min(rate, max(left, 0.01) / args.cooldown)
        losses: dict[str, Tensor] = {}
        for name, learner in training.learners.items():
            losses[name] = learner.learn(training.target, rows, args.depth, rate)
            training.averages[name].follow(learner.drafter, progress.step)
        recent.append(torch.stack([*losses.values()]))
        progress.step += 1
        progress.seconds = before + time.monotonic() - started
        if progress.step % args.measure_every == 0:
            progress.curve.append(training.measured())
            report(progress, args.heads, recent)
            recent.clear()
        if time.monotonic() - saved > CHECKPOINT_EVERY:
            training.save()
            saved = time.monotonic()
    training.save()


def report(progress: Progress, heads: list[str], recent: list[Tensor]) -> None:
    """Prints where a training stands, on one line a head."""
    print(
        f"step {progress.step}, {progress.said} answer tokens, epoch {progress.epoch} "
        f"of {progress.rows} chats, {progress.seconds / 60:.0f} min",
    )
    line = progress.curve[-1]
    for index, head in enumerate(heads):
        losses = " ".join(f"{loss:.3f}" for loss in torch.stack(recent).mean(0)[index].tolist())
        accepted = ", ".join(
            f"{name} {found[head]['acceptance_length']:.3f}"
            for name, found in line.items()
            if isinstance(found, dict)
        )
        print(f"  {head}: loss {losses}; accepted {accepted}", flush=True)


if __name__ == "__main__":
    main()
