"""Measure every finished drafter of the study: acceptance and drift, one small JSON file each.

What is stored are counts and means of each prompt, so that a report can draw prompts again and
compare drafters prompt by prompt. What is in a file is not measured again.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

import mlx_drift
from attention_drift import texts
from attention_drift.arms import DEPTH, DEPTH_ARMS, MTP_ARMS, Run
from attention_drift.convert_all import convert_finished, finished
from attention_drift.findings import TEXTS
from attention_drift.replay import Rounds, add_up_rows, replay, rounds, unroll
from attention_drift.settings import EMBEDDED, SMOLLM2, Setting
from attention_drift.texts import HELD_OUT, Text
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.load import load_converted
from mlx_drift.measure.acceptance.context import windows
from mlx_drift.measure.inside.intervene import intervention
from mlx_drift.watch.around import root_mean_square
from mlx_drift.watch.sums import CLASSES, Sums

DRAFTS, DEEP = 8, 16
"""Drafts a round; and where chains are deep, which is also where drift is measured."""

EVERY_DRIFT = 2
"""Drift is measured on every second question."""

INTERVENTIONS = "pin", "normalize", "noise-hidden:0.5"

DIGITS = 3
"""Significant ones, of what is stored."""

LAST = 50
"""Steps of training whose mean loss is told."""


Array = npt.NDArray[np.float64]

Asked = Callable[[ChainDrafter, Text], Rounds]
"""The rounds of one drafter on one text."""


def at_once(drafter: ChainDrafter, text: Text, k: int = DRAFTS) -> Rounds:
    """Returns the rounds of a drafter that sees everything."""
    return rounds(unroll(drafter, text, k)[0], text, k)[0]


def conditions(
    said: dict[str, list[Text]], run: Run, setting: Setting
) -> Iterator[tuple[str, list[Text], Asked, int]]:
    """Yields all that acceptance is measured under: name, texts, rounds and drafts a round.

    Long contexts, which cost most, are for the two ends of the arms only.
    """
    held_out = said[HELD_OUT]
    yield HELD_OUT, held_out, at_once, DRAFTS
    yield deep(HELD_OUT), held_out, partial(at_once, k=DEEP), DEEP
    for wording in setting.others:
        yield wording, said[wording], at_once, DRAFTS

    def treated(name: str, drafter: ChainDrafter, text: Text) -> Rounds:
        return at_once(intervention(name)(drafter, len(text.tokens)), text)

    for name in INTERVENTIONS:
        yield name, held_out[:: setting.every_perturbed], partial(treated, name), DRAFTS

    def seeing(attention: str, drafter: ChainDrafter, text: Text) -> Rounds:
        return list(replay(windows(drafter, setting.window, text.head)[attention], text, DRAFTS))

    two_ends = run.depth == DEPTH and run.arm in DEPTH_ARMS
    for name, (length, attention) in setting.long.items() if two_ends else ():
        yield name, said[texts.context(length)], partial(seeing, attention), DRAFTS


def deep(name: str) -> str:
    """Names a condition with deep chains."""
    return f"{name}, {DEEP} drafts"


def drift(drafter: ChainDrafter, said: Sequence[Text]) -> dict[str, Any]:
    """Measures free-running rounds of `DEEP` drafts, and how the teacher-forced chain goes on."""
    free, forced = [], []
    for text in said:
        drafts, chain = unroll(drafter, text, DEEP)
        _, whole = rounds(drafts, text, DEEP)  # the first one is: every answer has room for it
        free.append(add_up_rows(chain, text, whole))
        if rows := forced_rows(text):
            forced.append((len(rows), *forced_means(drafter, text, rows)))
    chains, rms, agreement = zip(*forced, strict=True)
    return {
        "free_running": means(free),
        "teacher_forced": {
            "chains": chains,
            "rms": rounded(rms),
            "agreement": rounded(agreement),
        },
    }


def forced_rows(text: Text) -> list[int]:
    """Returns the rows whose teacher-forced chains draft the answer, to its end at most."""
    return list(range(text.prompt - 2, len(text.tokens) - 1 - DEEP))


def forced_means(drafter: ChainDrafter, text: Text, rows: list[int]) -> tuple[Array, Array]:
    """Returns the RMS of each step of the teacher-forced chain, and how often it is right."""
    drafts, chain = unroll(drafter, text, DEEP, forced=True)
    rms = [root_mean_square(step.states[mx.array(rows)]).mean() for step in chain.steps]
    # Of the chain behind row i, step s is right if it is token i + 2 + s.
    wanted = np.array([text.tokens[row + 2 : row + 2 + DEEP] for row in rows])
    return np.array(mx.stack(rms)), (drafts[rows] == wanted).mean(axis=0)


def counts(prompts: Iterable[Rounds], k: int) -> dict[str, Any]:
    """Counts rounds, and drafts tested and accepted at each position; a list element a prompt."""
    told: dict[str, Any] = {"rounds": [], "tested": [], "accepted": []}
    for found in prompts:
        told["rounds"].append(len(found))
        told["tested"].append([sum(tested > at for tested, _ in found) for at in range(k)])
        told["accepted"].append([sum(right > at for _, right in found) for at in range(k)])
    return told


def means(prompts: Sequence[Sums]) -> dict[str, Any]:
    """Takes means over the chains of each prompt; a list element a prompt.

    Those of attention are means over heads, too.
    """

    def over_chains(sums_of: Callable[[Sums], Any]) -> Any:
        return rounded([np.asarray(sums_of(sums)) / sums.chains for sums in prompts])

    return {
        "chains": [sums.chains for sums in prompts],
        "taps": over_chains(lambda sums: sums.taps),
        "fused": over_chains(lambda sums: sums.fused),
        **{
            name: over_chains(lambda sums, i=i: sums.states[:, i])
            for i, name in enumerate(("rms", "cosine", "update"))
        },
        "entropy": over_chains(lambda sums: sums.entropy.mean(axis=1)),
        "attention": {
            name: over_chains(lambda sums, i=i: sums.attention.mean(axis=1)[:, i])
            for i, name in enumerate(CLASSES)
        },
    }


def rounded(values: Any) -> Any:
    """Returns nested lists of the digits that are worth keeping."""
    if np.ndim(values):
        return [rounded(value) for value in values]
    return float(f"{values:.{DIGITS}g}")


def measure(run: Run, study: Path, setting: Setting) -> str:
    """Measures what is not in a drafter's file yet; returns a line about it."""
    path = setting.results / f"{run.name}.json"
    started = time.monotonic()
    if path.exists():
        told = json.loads(path.read_text())
    else:
        told = json.loads((study / run.name / "train.json").read_text())
        told["loss"] = rounded(np.mean(told.pop("losses")[-LAST:], axis=0))
        told["acceptance"] = {}
    said = texts.recorded(study / "texts", setting)
    drafter = load_converted(study / "mlx" / run.name, target(setting.target))
    if run.arm in MTP_ARMS:
        drafter = with_float_head(drafter)
    for name, asked, of, k in conditions(said, run, setting):
        if name not in told["acceptance"]:
            told["acceptance"][name] = counts((of(drafter, text) for text in asked), k)
    if "drift" not in told:
        told["drift"] = drift(drafter, said[HELD_OUT][::EVERY_DRIFT])
    whole = path.with_suffix(".partial")
    whole.write_text(json.dumps(told, separators=(",", ":")) + "\n")
    whole.rename(path)
    return f"{run.name}: {time.monotonic() - started:.0f} s"


def with_float_head(drafter: ChainDrafter) -> ChainDrafter:
    """Unpacks the target's head, where a drafter borrows it.

    The numbers are the same, but MLX's CPU code for packed ones takes as long for each row as for
    one, and `unroll` has thousands.
    """
    table = drafter.model.model.embed_tokens
    weights = mx.dequantize(table.weight, table.scales, table.biases, table.group_size, table.bits)
    faster = copy.copy(drafter)
    faster._head = lambda states: states @ weights.T
    return faster


@cache
def target(folder: Path) -> nn.Module:
    """Loads the target, once a process."""
    return mlx_drift.load(str(folder))[0]


def main() -> None:
    """Measures all that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=Path("study"), help="where drafters are")
    parser.add_argument("--results", type=Path, help="where figures go")
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="that target, in float32")
    parser.add_argument("--questions", type=Path, nargs="+", help="what it is asked")
    parser.add_argument("--limit", type=int, help="questions of each file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    setting = EMBEDDED
    if args.smollm2:
        asked = tuple(args.questions or ())
        setting = replace(SMOLLM2, target=args.smollm2, questions=asked, limit=args.limit)
    if args.results:
        setting = replace(setting, results=args.results)
    texts.record(args.study / "texts", setting)
    setting.results.mkdir(parents=True, exist_ok=True)
    about = {
        name: {
            "prompt_tokens": [text.prompt for text in said],
            "answer_tokens": [len(text.tokens) - text.prompt for text in said],
        }
        for name, said in texts.recorded(args.study / "texts", setting).items()
    }
    (setting.results / TEXTS).write_text(json.dumps(about) + "\n")
    for _ in convert_finished(args.study, setting.target):
        pass
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        one = partial(measure, study=args.study, setting=setting)
        for line in pool.map(one, finished(args.study)):
            print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
