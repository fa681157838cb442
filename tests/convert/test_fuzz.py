"""Fuzz: a damaged or hostile checkpoint converts and loads, or is refused in one line.

All inputs of a run go through one child process: a watchdog ends it where a call computes too long,
or waits forever, and its peak memory is that of them all. Input number n is the same in every run:

    PYTHONPATH=tests python tests/convert/test_fuzz.py n

writes it to `fuzz-n/` and shows what becomes of it.
"""

import sys

if __name__ == "__main__":
    sys.modules["torch"] = None  # or transformers imports it, where it is installed, for seconds

import collections
import faulthandler
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from dialects import LAYERS
from fuzz_inputs import Files, Input, make
from fuzz_mutations import Odd
from mlx_drift.convert import convert_drafter, inspect_drafter
from mlx_drift.drafters.load import load_converted
from mlx_drift.drafters.protocol import Branches
from mlx_drift.errors import DriftError
from tiny import HIDDEN, VOCAB, tiny_llama

MAX_SECONDS, MAX_BYTES = 5.0, 2 * 10**9
WAIT = 60.0  # seconds, however busy the machine is: for what computes nothing


def write(root: Path, files: Files) -> None:
    for path, content in files.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        match content:
            case bytes():
                place.write_bytes(content)
            case Odd("fifo"):
                os.mkfifo(place)
            case Odd("folder"):
                place.mkdir()
            case Odd("link", link):
                place.symlink_to(link)


Tally = collections.Counter[str]


def attempt(tally: Tally, what: str, call: Callable[[], Any]) -> Any:
    """Calls, under the watchdog; returns None where a DriftError of one line refuses."""
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    try:
        found = call()
    except DriftError as error:
        line = str(error)
        assert line, "no reason"
        assert line.isprintable(), ascii(line)
        tally[f"{what}: refused"] += 1
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    tally[f"{what}: done"] += 1
    return found


def draft(folder: Path, model: nn.Module) -> None:
    """Loads and drafts: a chain, and a tree where there is one, of more than many heads make."""
    drafter = load_converted(folder, model)
    state = drafter.make_cache()
    drafter.ingest(mx.array([1, 2]), mx.ones((2, len(drafter.taps), HIDDEN)), state)
    drafts = [drafter.propose(7, state)]
    if isinstance(drafter, Branches):
        drafts.append(drafter.propose_tree(7, state))
    for draft in drafts:
        assert all(0 <= token < VOCAB for token in draft.tokens.tolist())


def survive(root: Path, it: Input, model: nn.Module, tally: Tally) -> None:
    """Does everything with an input that a user may do."""
    write(root, it.files)
    before = sorted(path.name for path in root.iterdir())
    source, options = str(root / it.source), dict(it.keywords)
    target = str(root / "target") if options.get("target") == "target" else None
    options["target"] = target or options.get("target")
    overrides = "mtp", "taps", "feedback", "rope_theta", "window", "slots"
    said = {k: options[k] for k in overrides if k in options}
    found = attempt(tally, "inspect", lambda: inspect_drafter(source, target, **said))
    if found is not None:
        json.dumps(found.to_dict())
        shown = [*found.unknown_keys, *found.notes, *found.provenance.values()]
        shown += [check.detail for check in found.checks] + [name for name, _, _ in found.tensors]
        assert all(map(str.isprintable, shown)), ascii(shown)
    converted = attempt(tally, "convert", lambda: convert_drafter(source, root / "out", **options))
    after = sorted(path.name for path in root.iterdir())
    assert after == (before if converted is None else sorted([*before, "out"]))
    assert not it.outside or converted is None
    if converted is not None:
        attempt(tally, "load converted", lambda: draft(root / "out", model))
    attempt(tally, "load as it is", lambda: draft(root / "source", model))
    assert peak() < MAX_BYTES


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(numbers: range, keep: bool) -> int:
    """Works through inputs, each told on stdout before it is tried; returns how many failed."""
    warnings.simplefilter("error")
    for watchdog in (signal.SIGPROF, signal.SIGALRM):
        faulthandler.register(watchdog, chain=True)  # and then the signal ends the process
    model, tally, failed, slowest = tiny_llama(num_hidden_layers=LAYERS), Tally(), 0, (0.0, 0)
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            it = make(number)
            print(number, ascii(it.said), it.keywords, flush=True)
            root = Path(f"fuzz-{number}" if keep else f"{folder}/{number}")
            root.mkdir()
            start = time.monotonic()
            try:
                survive(root, it, model, tally)
            except Exception:
                failed += 1
                print(f"\ninput {number}: {it.said!a}, {it.keywords}", file=sys.stderr)
                traceback.print_exc()
            slowest = max(slowest, (time.monotonic() - start, number))
            if not keep:
                shutil.rmtree(root)
    print(json.dumps({"tally": dict(sorted(tally.items())), "peak": peak(), "slowest": slowest}))
    return failed


def check(first: int, last: int) -> None:
    command = [sys.executable, __file__, str(first), str(last)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=last - first, env=environment
    )
    assert result.returncode == 0, f"{result.stdout[-1000:]}\n{result.stderr[-10_000:]}"
    print(summary := result.stdout.splitlines()[-1])
    tally = json.loads(summary)["tally"]
    assert tally["inspect: done"] + tally["inspect: refused"] == last - first
    for what in ("inspect", "convert", "load as it is"):  # or it would fuzz the first check only
        assert min(tally[f"{what}: done"], tally[f"{what}: refused"]) > (last - first) / 50


def test_fuzz():
    check(0, 1200)


@pytest.mark.long
def test_fuzz_long():
    check(1200, 7_200)


if __name__ == "__main__":
    first, *last = map(int, sys.argv[1:])
    sys.exit(main(range(first, *last) if last else range(first, first + 1), not last) > 0)
