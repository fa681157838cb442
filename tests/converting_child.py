"""A process that converts when it is told to: `test_drafter_cache` races two and kills many.

    python converting_child.py REPOSITORY

says "ready", then reads orders and answers each with where the drafter is and whether it was
converted for it, a line of JSON each. An order names the cache, the moment to begin and, if it is
to run `mlx-drift convert` at the same time, a folder to write.
"""

# ruff: noqa: E402
import sys

sys.modules["torch"] = None  # or transformers imports it, where it is installed, for seconds

import json
import os
import time
from contextlib import redirect_stderr, suppress
from pathlib import Path
from threading import Thread

from mlx_drift.cli import main
from mlx_drift.files.hub import find_hub_folder
from mlx_drift.loading import convert_once
from mlx_drift.target.model import TargetShape
from tiny import HIDDEN, LAYERS, VOCAB

SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)


def obey(repository: str, order: dict) -> dict:
    os.environ["MLX_DRIFT_CACHE"] = order["cache"]
    found = find_hub_folder(repository, None, "drafter")
    answer = {"converted": False}

    def convert_into_the_cache() -> None:
        folder = convert_once(found, SHAPE, {}, on_convert=lambda _: answer.update(converted=True))
        answer.update(folder=str(folder))

    thread = Thread(target=convert_into_the_cache)
    time.sleep(max(0, order["at"] - time.time()))
    started = time.perf_counter()
    thread.start()
    if order["mlx_path"] is not None:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), suppress(SystemExit):
            main(["convert", repository, "--mlx-path", order["mlx_path"]])
    thread.join()
    return answer | {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(obey(sys.argv[1], json.loads(line))), flush=True)
