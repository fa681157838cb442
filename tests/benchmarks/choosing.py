"""What choosing the tokens of a round takes, alone: the operations of a round, at its shapes.

    python tests/benchmarks/choosing.py
    python tests/benchmarks/choosing.py --vocabulary 151936 --draft-vocabulary 32000 --top-p 0.9

Milliseconds of choosing the drafts, and of the target's verdict over them; logits are random.
"""

import argparse
import json
import statistics
from time import perf_counter

import mlx.core as mx

from mlx_drift.decode.chooser import Chooser
from mlx_drift.decode.sampling import Sampling
from mlx_drift.drafters.head import HeadDrafter
from mlx_drift.drafters.protocol import Draft

TURNS, SPREAD = 40, 3.0  # of the logits


class Head(HeadDrafter):
    """A head of which only the vocabulary matters."""

    def __init__(self, vocabulary, drafted):
        self._vocab_size = vocabulary
        self._d2t = mx.sort(mx.random.permutation(vocabulary)[:drafted]).astype(mx.int32)

    def make_cache(self): ...
    def ingest(self, tokens, taps, cache): ...
    def propose(self, k, cache, chooser=None): ...


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=49_152, help="the target's tokens")
    parser.add_argument("--draft-vocabulary", type=int, default=8_192, help="the head's")
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--temp", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.0)
    options = parser.parse_args()
    k, head = options.num_draft_tokens, Head(options.vocabulary, options.draft_vocabulary)
    drafted = [SPREAD * mx.random.normal((1, options.draft_vocabulary)) for _ in range(k)]
    logits = SPREAD * mx.random.normal((k + 1, options.vocabulary))
    mx.eval(drafted, logits, head._d2t)
    ways = {"greedy": Sampling(), "sampled": Sampling(temp=options.temp, top_p=options.top_p)}
    times = {way: ([], []) for way in ways}
    for turn in range(TURNS):
        for way, sampling in ways.items():
            key = mx.random.key(turn) if sampling.is_random else None
            chooser = Chooser(sampling, k, key)
            start = perf_counter()
            tokens, log_q, _ = head._in_turn(k, chooser, lambda token, place: drafted[place])
            mx.eval(tokens, log_q)
            between = perf_counter()
            mx.eval(chooser.verify(Draft(tokens, log_q), logits))
            for taken, seconds in zip(
                times[way], (between - start, perf_counter() - between), strict=True
            ):
                taken.append(1e3 * seconds)
    found = {
        way: {
            part: {"median": round(statistics.median(taken), 2), "least": round(min(taken), 2)}
            for part, taken in zip(("drafts", "verdict"), both, strict=True)
        }
        for way, both in times.items()
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
