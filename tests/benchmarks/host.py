"""What Python takes of a round, part by part, in the loop itself, beside the round's other work.

    python tests/benchmarks/host.py
    python tests/benchmarks/host.py --model FOLDER --drafter FOLDER

*Spelled out* is what goes into the operations that are one fused kernel on a GPU (norms,
rotations, attention) and up to twenty primitives on MLX's CPU backend: that part is this backend's.
*Replayed* is a whole pass of the target built by `mx.compile` from its own trace, for one length of
the cache: the least that building the pass can take. Nothing decodes so, since the next round's
cache has another length.

All are CPU seconds of the thread that runs the loop, so that other programs do not count.
"""

import argparse
import json
import statistics
from collections import defaultdict
from time import perf_counter, thread_time
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm

from mlx_drift import load_demo, load_drafter
from mlx_drift.decode import speculate as loop_module
from mlx_drift.decode.clock import Clock
from mlx_drift.decode.prompt_cache import make_prompt_cache
from mlx_drift.decode.speculate import speculate
from mlx_drift.measure.speed.rounds import Swayed
from mlx_drift.target.model import Target

FUSED = "rms_norm", "rope", "scaled_dot_product_attention"
ROUNDS, TURNS, WARM = 12, 6, 3
PARTS = "target's pass", "chain", "ingest"


class Watched:
    """Times calls by what they belong to; a fused operation also counts within its caller."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self.caller = None

    def part(self, name, function):
        def timed(*args, **kwargs):
            before, self.caller = self.caller, name
            start = thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += thread_time() - start
                self.caller = before

        return timed

    def fused(self, function):
        def timed(*args, **kwargs):
            start = thread_time()
            result = function(*args, **kwargs)
            self.seconds[f"{self.caller}, spelled out"] += thread_time() - start
            return result

        return timed


class Busy(Clock):
    """Counts the CPU seconds of this thread."""

    def __call__(self):
        return thread_time()


class Model:
    """The target's model, its calls timed."""

    def __init__(self, model, watched):
        self._model = model
        self._call = watched.part(PARTS[0], model)

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._model, name)


class Drafter:
    """A drafter, its calls timed."""

    def __init__(self, drafter, watched):
        self.taps, self.model, self.network = drafter.taps, drafter.model, drafter.network
        self.propose = watched.part(PARTS[1], drafter.propose)
        self.ingest = watched.part(PARTS[2], drafter.ingest)


def rounds(cache, drafter, prompt, k, watched, taken):
    """Runs some rounds of K drafts, half of them accepted, and notes what each part took."""
    target = Swayed(cache.target, k // 2)
    target.model = Model(cache.target.model, watched)
    loop = speculate(
        target,
        Drafter(drafter, watched),
        mx.array(prompt[-1:], dtype=mx.int32),
        cache.target_cache,
        cache.drafter_cache,
        num_draft_tokens=k,
        max_tokens=-1,
        stop_tokens=frozenset(),
        clock=Busy(),
    )
    for number in range(ROUNDS + WARM):
        watched.seconds.clear()
        start = perf_counter()
        round = next(loop)
        whole = perf_counter() - start
        if number < WARM:
            continue
        taken["round"].append(whole)
        taken["host"].append(round.host_seconds)
        taken["the rest"].append(round.host_seconds - sum(watched.seconds[p] for p in PARTS))
        for name, seconds in watched.seconds.items():
            taken[name].append(seconds)
    loop.close()


def replayed(model, prompt, rows):
    """Milliseconds of building a pass: by the model's own code, and replayed from its trace."""
    target = Target(model)
    cache = target.make_cache()
    mx.eval(target(mx.array(prompt), cache)[0], cache.state)
    tokens = mx.array([prompt[:rows]])

    def whole(tokens, arrays):
        for layer, (keys, values) in zip(cache, arrays, strict=True):
            layer.keys, layer.values = keys, values
        logits = model(tokens, cache=cache)
        after = [(layer.keys, layer.values) for layer in cache]
        for layer in cache:
            layer.trim(rows)
        return logits, after

    arrays = [(layer.keys, layer.values) for layer in cache]
    compiled = mx.compile(whole)
    start = perf_counter()
    mx.eval(compiled(tokens, arrays))
    first = perf_counter() - start
    times = {whole: [], compiled: []}
    for _ in range(200):
        for build, taken in times.items():
            start = thread_time()
            build(tokens, arrays)
            taken.append(thread_time() - start)
    return [1e3 * statistics.median(times[build]) for build in (whole, compiled)], first


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a target's folder; the embedded one")
    parser.add_argument("--drafter", help="its drafter's folder")
    options = parser.parse_args()
    if options.model is None:
        model, tokenizer, drafter = load_demo()
    else:
        model, tokenizer = mlx_lm.load(options.model)
        drafter = load_drafter(options.drafter, model)
    messages = [{"role": "user", "content": "Show me the source of `functools.cmp_to_key`."}]
    prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    (own, replay), first = replayed(model, prompt, 2)
    watched = Watched()
    loop_module.time = SimpleNamespace(perf_counter=thread_time)  # what it waits by
    for name in FUSED:
        setattr(mx.fast, name, watched.fused(getattr(mx.fast, name)))
    cache = make_prompt_cache(model, drafter, max_snapshots=0)
    cache.read(prompt, step_size=2048, progress=lambda done, total: None)
    taken = {k: defaultdict(list) for k in (1, 2, 4)}
    for _ in range(TURNS):
        for k, own_taken in taken.items():
            rounds(cache, drafter, prompt, k, watched, own_taken)
    table = {
        k: {name: round(1e3 * statistics.median(values), 3) for name, values in parts.items()}
        for k, parts in taken.items()
    }
    print(
        json.dumps(
            {
                "milliseconds": table,
                "pass of 2 rows": {
                    "built": own,
                    "replayed": replay,
                    "seconds of the first call": first,
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
