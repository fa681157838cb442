"""Two threads on one prompt cache: each answer is right as far as it goes, or DriftError says why.

The trials run in a process of their own: what would end a process is a failed test, not a dead one.

    PYTHONPATH=tests python tests/decode/test_two_threads.py FIRST LAST
"""

import faulthandler
import os
import random
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_drift import DriftError, make_prompt_cache, save_prompt_cache, stream_generate
from mlx_drift.decode import thread_end
from mlx_drift.errors import DriftWarning
from tiny import VOCAB, NoText, plain_greedy, tiny_drafter, tiny_llama

LONGEST = 8
HANGS = 120  # seconds


class Trial:
    """One cache, and what two threads do to it."""

    def __init__(self, seed, model, drafter, expected, folder):
        self.seed, self.drafter, self.expected, self.folder = seed, drafter, expected, folder
        self.model = model
        self.cache = make_prompt_cache(model, drafter)
        self.answers = []
        self.wrong = []
        self.told = self.right = 0

    def start(self, cache, rng):
        prompt = rng.choice(list(self.expected))
        k = rng.choice([1, 3, "auto"])
        answer = stream_generate(
            self.model,
            NoText(),
            list(prompt),
            LONGEST,
            drafter=self.drafter,
            num_draft_tokens=k,
            prompt_cache=cache,
            prefill_step_size=rng.choice([2, 64]),
        )
        self.answers.append((prompt, answer))
        return prompt, answer

    def go_on(self, rng, count):
        if self.answers:
            prompt, answer = rng.choice(self.answers)
            self.read(prompt, answer, count)

    def read(self, prompt, answer, count):
        for _ in range(count):
            response = next(answer, None)
            if response is None:
                return
            token = self.expected[prompt][response.generation_tokens - 1]
            if response.token != token:
                self.wrong.append(f"{response.token} in place of {token}")
            self.right += 1

    def act(self, rng):
        what = rng.choice(["prompt", "prompt", "start", "next", "next", "close", "save", "fork"])
        if what == "prompt":
            self.read(*self.start(self.cache, rng), rng.randrange(1, LONGEST + 2))
        elif what == "start":
            self.start(self.cache, rng)
        elif what == "next":
            self.go_on(rng, rng.randrange(1, 4))
        elif what == "close" and self.answers:
            rng.choice(self.answers)[1].close()
        elif what == "save":
            save_prompt_cache(self.folder / f"{threading.get_ident()}.safetensors", self.cache)
        elif what == "fork":
            self.read(*self.start(self.cache.fork(), rng), LONGEST)

    def run(self, together, which):
        rng = random.Random(self.seed * 2 + which)
        together.wait()
        for _ in range(rng.randrange(2, 6)):
            try:
                self.act(rng)
            except DriftError:
                self.told += 1
            except BaseException:
                self.wrong.append(traceback.format_exc())


def main(first, last):
    faulthandler.dump_traceback_later(HANGS + (last - first), exit=True)
    warnings.simplefilter("ignore", DriftWarning)
    sys.setswitchinterval(1e-5)
    model = tiny_llama()
    drafter = tiny_drafter(model)
    rng = random.Random(0)
    stem = [rng.randrange(VOCAB) for _ in range(9)]
    prompts = [stem, [*stem, 5, 7, 11], [*stem[:6], 3, 1], [rng.randrange(VOCAB) for _ in range(7)]]
    expected = {tuple(p): plain_greedy(model, p, LONGEST) for p in prompts}
    told = right = 0
    # The same two threads all along: MLX keeps a thread for every one that ever computed.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for seed in range(first, last):
            trial = Trial(seed, model, drafter, expected, Path(folder))
            together = threading.Barrier(2)
            for done in [pool.submit(trial.run, together, which) for which in range(2)]:
                done.result()
            # However it was left, the cache answers the next prompt.
            trial.read(*trial.start(trial.cache, random.Random(seed)), LONGEST)
            if trial.wrong:
                print(seed, *trial.wrong, sep="\n")
                return 1
            told, right = told + trial.told, right + trial.right
    print(last - first, "trials:", right, "tokens right,", told, "times told")
    return 0 if told and right else 1


def check(first, last):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, str(first), str(last)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(result.stdout)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"


def test_two_threads_on_one_cache():
    check(0, 60)


@pytest.mark.long
def test_two_threads_on_one_cache_5000_times():
    check(60, 5060)


def test_closing_an_answer_from_another_thread_while_it_reads():
    model = tiny_llama()
    inside, outside = threading.Event(), threading.Event()

    def wait(done, total):
        inside.set()
        outside.wait(60)

    answer = stream_generate(
        model, NoText(), [1, 2, 3], 4, drafter=tiny_drafter(model), prompt_progress_callback=wait
    )
    reader = threading.Thread(target=lambda: list(answer))
    reader.start()
    inside.wait(60)
    with pytest.raises(DriftError, match="another thread"):
        answer.close()
    with pytest.raises(DriftError, match="another thread"):
        next(answer)
    outside.set()
    reader.join(60)


THREADS_END = """
import threading, warnings
warnings.simplefilter("ignore")
from mlx_drift import stream_generate
from tiny import NoText, tiny_drafter, tiny_llama
model = tiny_llama()
drafter = tiny_drafter(model)
def answer():
    return sum(1 for _ in stream_generate(model, NoText(), [1, 2, 3], 4, drafter=drafter))
for _ in range(12):
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
"""


def test_a_thread_that_answered_clears_its_streams_once_and_as_it_ends(monkeypatch):
    model = tiny_llama()
    drafter = tiny_drafter(model)
    cleared, alive = [], []

    def answer():
        for _ in range(2):
            list(stream_generate(model, NoText(), [1, 2, 3], 4, drafter=drafter))
        alive.append(threading.get_ident() in cleared)

    clear = thread_end.mx.clear_streams
    monkeypatch.setattr(
        thread_end.mx, "clear_streams", lambda: (clear(), cleared.append(threading.get_ident()))
    )
    thread = threading.Thread(target=answer)
    thread.start()
    ident = thread.ident
    thread.join()
    assert alive == [False]
    assert cleared.count(ident) == 1
    answer()
    assert threading.get_ident() not in cleared, "the main thread goes on with its streams"


@pytest.mark.long
def test_a_process_ends_cleanly_beside_threads_that_have_just_answered():
    """Without `thread_end` about one process in ten aborts."""
    for _ in range(15):
        result = subprocess.run(
            [sys.executable, "-c", THREADS_END],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
