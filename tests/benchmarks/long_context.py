"""Memory and time of a sliding-window target at 16k tokens of context, against 1k.

    python tests/benchmarks/long_context.py [--bits 4] [--prefill]

A random Llama, every other layer sliding, decodes behind 1k and behind 16k tokens, in turns within
one process: plainly (`mlx_lm.generate.generate_step`, with mlx-lm's rotating caches) and with a
random EAGLE-3 drafter (`speculate`). The drafter does all its work, but what it drafts is set so
that the rounds of a block accept 0, 1, … K drafts, at 1k as at 16k, and a block of plain steps
gives the same tokens. Prints the bytes of the caches, and how much longer a round and a plain step
take at 16k.

Random keys and values go straight into the caches, in chunks as a prompt's would; `--prefill` reads
random prompts instead. That takes minutes on a Linux CPU, and hours with the BLAS that mlx-cpu
brings: set LD_PRELOAD to OpenBLAS's libopenblas.so.0, and OPENBLAS_NUM_THREADS=1 for steady times.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import KVCache, make_prompt_cache

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlx_drift.decode.speculate import every, prefill, speculate
from mlx_drift.drafters.chain import ChainDrafter, ChainState
from mlx_drift.drafters.chain_config import Eagle3Config
from mlx_drift.drafters.eagle3 import Eagle3Network
from mlx_drift.drafters.fold import fold
from mlx_drift.drafters.protocol import Choose, Draft
from mlx_drift.target.model import Target
from tiny import tiny_llama

VOCAB, DRAFT_VOCAB = 4096, 1024
HEAD_DIM = 64
CHUNK = 2048  # tokens of a prefill step, mlx-lm's default
WARM_UP = 2  # blocks that are not counted
SIZES = {"hidden": 512, "layers": 12, "heads": 2, "window": 512, "k": 3}
SIZES |= {"short": 1024, "long": 16384, "trained": 40960, "blocks": 20}


def build_target(arguments: argparse.Namespace) -> nn.Module:
    """A random Llama in float32 or quantized, every other layer sliding."""
    return tiny_llama(
        bits=arguments.bits,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        intermediate_size=4 * arguments.hidden,
        head_dim=HEAD_DIM,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads // 2,
        vocab_size=VOCAB,
        layer_types=["sliding_attention", "full_attention"] * (arguments.layers // 2),
        sliding_window=arguments.window,
    )


def build_drafter(model: nn.Module, arguments: argparse.Namespace) -> ChainDrafter:
    """A random EAGLE-3.1 drafter for it: one layer, a reduced vocabulary."""
    taps = (1, arguments.layers // 2, arguments.layers - 1)
    target = Target(model, taps)
    config = Eagle3Config(
        taps=taps,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_layers=1,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads // 2,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=arguments.trained,  # it sees no further
        target=target.shape,
        feedback="post",
        fc_norm=True,
        norm_before_fc=False,
        norm_before_residual=True,
        draft_vocab_size=DRAFT_VOCAB,
    )
    network = Eagle3Network(config)
    fold(network)  # as when it is loaded
    if arguments.bits is not None:
        nn.quantize(network, group_size=32, bits=arguments.bits)
    mx.eval(network.parameters())
    d2t = mx.arange(DRAFT_VOCAB) * (VOCAB // DRAFT_VOCAB)
    return ChainDrafter(config, network, target, d2t.astype(mx.int32))


class Scripted:
    """A drafter that does its work, but whose drafts are right as often as a script says."""

    def __init__(self, drafter: ChainDrafter, text: list[int], script: Iterator[int]):
        self.drafter = drafter
        self.text = text
        self.script = script
        self.taps = drafter.taps
        self.ingest = drafter.ingest
        self.make_cache = drafter.make_cache

    def propose(self, k: int, cache: ChainState, chooser: Choose | None = None) -> Draft:
        """Drafts; then the tokens are replaced, but still wait for those drafted."""
        draft = self.drafter.propose(k, cache, chooser)
        accepted, start = next(self.script), cache.layers[0].offset + 1
        right = self.text[start : start + k]
        tokens = [t if i < accepted else (t + 1) % VOCAB for i, t in enumerate(right)]
        return replace(draft, tokens=0 * draft.tokens + mx.array(tokens, mx.int32))


def held(caches: list[Any], *, sliding: bool) -> int:
    """Bytes that the caches of the sliding layers, or of the others, hold."""
    return sum(cache.nbytes for cache in caches if (type(cache) is not KVCache) == sliding)


@dataclass
class Conversation:
    """One context: mlx-lm decodes it plainly and mlx-drift with a drafter, in turns."""

    text: list[int]  # the prompt, and what plain decoding says
    plain_cache: list[Any]
    target_cache: list[Any]
    drafter_cache: ChainState
    steps: Iterator[Any] | None = None
    rounds: Iterator[Any] | None = None
    plain_most: int = 0  # bytes of the sliding layers, after any chunk of the prompt
    most: int = 0
    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {"plain": [0.0], "round": [0.0]}  # one of each, by blocks
    )
    spoken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.length = len(self.text)

    def count_bytes(self, *_: Any) -> None:
        """Notes the bytes of the sliding layers if they are more than before."""
        self.plain_most = max(self.plain_most, held(self.plain_cache, sliding=True))
        self.most = max(self.most, held(self.target_cache, sliding=True))

    def plain(self, tokens: int) -> None:
        """Decodes plainly, and waits for the step that is under way at the end."""
        self.text += [int(next(self.steps)[0]) for _ in range(tokens)]
        mx.synchronize(generation_stream)

    def speculative(self) -> None:
        """Decodes a round, and waits for what is under way at its end."""
        self.spoken += next(self.rounds).tokens
        mx.synchronize()


def fill(together: list[list[Any]], rows: int, heads: int, progress: Callable[[], None]) -> None:
    """Feeds random rows, in a prompt's chunks, to caches that hold the same layers."""
    for start in range(0, rows, CHUNK):
        shape = (1, heads, min(CHUNK, rows - start), HEAD_DIM)
        for layer in zip(*together, strict=True):
            for cache in layer:
                mx.random.seed(start)
                cache.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
            mx.eval([cache.state for cache in layer])
        progress()


def prepare(
    model: nn.Module, drafter: ChainDrafter, length: int, arguments: argparse.Namespace
) -> Conversation:
    """Fills the caches, those of each way of decoding, and is ready to decode."""
    prompt = mx.random.randint(0, VOCAB, (length,), key=mx.random.key(length))
    target = Target(model, drafter.taps)
    one = Conversation(
        prompt.tolist(), make_prompt_cache(model), target.make_cache(), drafter.make_cache()
    )
    scripted = Scripted(drafter, one.text, itertools.cycle(range(arguments.k + 1)))
    caches = one.target_cache, one.drafter_cache
    if arguments.prefill:
        for done in prefill(target, scripted, prompt, *caches, cut=every(CHUNK)):
            one.count_bytes(done, length)
    else:
        heads = drafter.config.num_key_value_heads
        fill([one.plain_cache, one.target_cache], length - 1, heads, one.count_bytes)
        fill([one.drafter_cache], length - 2, heads, one.count_bytes)
        taps = mx.random.normal((1, len(target.taps), arguments.hidden))
        drafter.ingest(prompt[-1:], taps, one.drafter_cache)
    one.steps = generate_step(
        prompt if arguments.prefill else prompt[-1:],
        model,
        max_tokens=-1,
        prompt_cache=one.plain_cache,
        prefill_step_size=CHUNK,
        prompt_progress_callback=one.count_bytes,
    )
    one.rounds = speculate(
        target,
        scripted,
        prompt[-1:],
        *caches,
        num_draft_tokens=arguments.k,
        max_tokens=-1,
        stop_tokens=frozenset(),
    )
    return one


def measure(conversations: list[Conversation], k: int, blocks: int) -> None:
    """Lets all take turns: a round each, or as many plain steps as it gives tokens."""
    for one in conversations:
        one.plain(2 * k)  # it stays ahead, for the drafts to be right
    turns = [(one, what) for one in conversations for what in one.seconds]
    for block in range(WARM_UP + blocks):
        for tokens in range(1, k + 2):
            for one, what in turns[block % 4 :] + turns[: block % 4]:
                start = time.perf_counter()
                one.plain(tokens) if what == "plain" else one.speculative()
                one.seconds[what][-1] += time.perf_counter() - start
        for one in conversations:
            one.seconds["plain"].append(0.0)
            one.seconds["round"].append(0.0)
    for one, what in turns:
        count = k + 1 if what == "round" else (k + 1) * (k + 2) // 2
        one.seconds[what] = [seconds / count for seconds in one.seconds[what][WARM_UP:-1]]


def print_memory(conversations: list[Conversation], arguments: argparse.Namespace) -> None:
    """Prints the bytes of the caches, and the bound of those of the sliding layers."""
    width = 2 * arguments.heads // 2 * HEAD_DIM  # of keys and values
    row = arguments.layers // 2 * width * 4  # a row of all sliding layers, float32

    def bound(longest: int) -> int:
        return (arguments.window - 1 + max(KVCache.step, longest)) * row

    reading = [(one.most, bound(min(CHUNK, one.length - 1))) for one in conversations]
    decoding = [
        (held(one.target_cache, sliding=True), bound(arguments.k + 1)) for one in conversations
    ]
    lines = [
        ("sliding layers, after the prompt's largest chunk", [size for size, _ in reading]),
        ("– the stated bound", [most for _, most in reading]),
        ("– mlx-lm's `RotatingKVCache`", [one.plain_most for one in conversations]),
        ("sliding layers, decoding", [size for size, _ in decoding]),
        ("– the stated bound", [most for _, most in decoding]),
        (
            "– mlx-lm's `RotatingKVCache`",
            [held(one.plain_cache, sliding=True) for one in conversations],
        ),
        ("full layers", [held(one.target_cache, sliding=False) for one in conversations]),
        ("drafter", [one.drafter_cache.nbytes for one in conversations]),
    ]
    print(f"\n| caches, MB | {' | '.join(f'{one.length} tokens' for one in conversations)} |")
    print("|---|---|---|")
    for name, sizes in lines:
        print(f"| {name} | {' | '.join(f'{size / 1e6:.2f}' for size in sizes)} |")
    within = all(size <= most for size, most in reading + decoding)
    print(f"\nThe sliding layers {'stay within' if within else 'EXCEED'} the bound.")


def spread(values: list[float]) -> str:
    """The median, and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def print_times(short: Conversation, long: Conversation, k: int) -> None:
    """Prints the times and how they grow, with the quartiles of the blocks."""
    print(f"\n| ms | {short.length} tokens | {long.length} tokens | growth (quartiles) |")
    print("|---|---|---|---|")
    growths = {}
    for what, name in (("plain", "plain step"), ("round", f"round, K={k}")):
        pairs = list(zip(short.seconds[what], long.seconds[what], strict=True))
        growths[what] = [b / a for a, b in pairs]
        at_short, at_long = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"| {name} | {at_short:.1f} | {at_long:.1f} | {spread(growths[what])} |")
    ratios = [b / a for a, b in zip(growths["plain"], growths["round"], strict=True)]
    print(f"\nA round's growth over a plain step's: {spread(ratios)}, {len(ratios)} blocks.")
    for one in (short, long):
        expected = one.text[one.length :][: len(one.spoken)]
        wrong = (i for i, (a, b) in enumerate(zip(one.spoken, expected, strict=True)) if a != b)
        equal = next(wrong, len(expected))
        print(f"At {one.length}: {equal} of {len(expected)} tokens are plain decoding's.")


def main() -> None:
    """Fills the caches, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bits", type=int)
    parser.add_argument("--prefill", action="store_true")
    arguments = parser.parse_args()
    model = build_target(arguments)
    drafter = build_drafter(model, arguments)
    preloaded = os.environ.get("LD_PRELOAD", "nothing")
    print(f"mlx {mx.__version__}, {mx.default_device()}, LD_PRELOAD {preloaded}; {vars(arguments)}")
    begin = time.perf_counter()
    lengths = arguments.short, arguments.long
    conversations = [prepare(model, drafter, length, arguments) for length in lengths]
    measure(conversations, arguments.k, arguments.blocks)
    print_memory(conversations, arguments)
    print_times(*conversations, arguments.k)
    print(f"All in all {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    main()
