"""The fuzz's inputs: number n is the same in every run, and the first are the largest."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fuzz_bases import MTP, SHAPE, TARGET, TOKENIZER, Stored, Tensors, bases
from fuzz_files import safetensors, text, torch_file
from fuzz_mutations import (
    EVIL,
    ODD,
    SHARDS,
    Odd,
    Random,
    mutated,
    mutated_bytes,
    mutated_config,
    mutated_tensors,
)

SEED = "mlx-drift"

Files = dict[str, bytes | Odd]


@dataclass
class Input:
    """A checkpoint, and how to convert it.

    Attributes:
        said: What was done to which checkpoint.
        files: By path below a folder of its own; the checkpoint is `source/`.
        outside: Whether a file that is needed lies outside of `source/`.
        source: The path to give.
        keywords: Of `convert_drafter`; a target of `target` is that folder.
    """

    said: str
    files: Files
    outside: bool
    source: str
    keywords: dict[str, Any]


STAGES = ["config"] * 9 + ["tensors"] * 5 + ["header"] * 3 + ["pickle"] * 3 + ["bytes"] * 3
STAGES += ["index"] * 2 + ["odd", "target", "tokenizer", "name"]


def make(number: int) -> Input:
    """Makes an input, the same for the same number; the first are the `BOMBS`."""
    if number < len(BOMBS):
        name, bomb = list(BOMBS.items())[number]
        return Input(name, bomb(), False, "source", {"target": "target"})
    rng = Random(f"{SEED} {number}")
    base = rng.choice([*bases(), *[name for name in bases() if name.startswith("converted")] * 2])
    config, tensors = bases()[base]
    stages = sorted(rng.choices(STAGES, k=rng.choice([1, 1, 1, 2, 3])))
    for stage in stages:
        config = mutated_config(config, rng) if stage == "config" else config
        tensors = mutated_tensors(tensors, rng) if stage == "tensors" and tensors else tensors
    files: Files = {
        "source/config.json": text(config),
        "source/tokenizer.json": text(
            mutated(TOKENIZER, rng, EVIL) if "tokenizer" in stages else TOKENIZER
        ),
    }
    form, weights = written_weights(tensors, stages, rng)
    files |= weights
    options = keywords(rng)
    if base.startswith(MTP) or rng.random() < 0.01:
        options["mtp"] = True
    if options.get("target") == "target":
        files |= {
            "target/config.json": text(
                mutated(TARGET, rng, EVIL) if "target" in stages else TARGET
            ),
            "target/tokenizer.json": text(TOKENIZER),
            "target/model.safetensors": safetensors(
                {name: one for name, one in tensors.items() if name.endswith("d.weight")}
            ),
        }
    said, outside, source = [base, form, *stages], False, "source"
    for stage in stages:
        path = rng.choice([path for path in files if path.startswith("source/")])
        data = files[path]
        if not isinstance(data, bytes):
            continue
        if stage == "bytes":
            files[path] = mutated_bytes(data, rng)
        elif stage == "odd":
            odd = files[path] = rng.choice(ODD)
            files |= {"outside": data, "pipe": Odd("fifo")}
            outside |= odd.link == "../outside" and "tokenizer" not in path
            said.append(odd.link or odd.kind)
        elif stage == "name":
            source = rng.choice(["source", path, "source/config.json"])
            other = (
                f"source/{rng.choice(['a.gguf', 'a.safetensors', 'a.bin', 'medusa_lm_head.pt'])}"
            )
            files[rng.choice([other, path])] = files.pop(path)
            said.append(source)
        said.append(path)
    return Input(", ".join(said), files, outside, source, options)


def written_weights(tensors: Tensors, stages: list[str], rng: Random) -> tuple[str, Files]:
    """Writes the weights in some form, or in that which the stages are about."""
    binary = "pickle" in stages or ("header" not in stages and rng.random() < 0.15)
    sharded = "index" in stages or rng.random() < 0.1
    legacy = rng.random() < 0.5
    entry = "pytorch_model.bin" if binary else "model.safetensors"
    suffix = entry.rpartition(".")[2]
    shards = [f"model-{i}.{suffix}" for i in range(2)] if sharded else [entry]
    files: Files = {}
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        part = dict(list(tensors.items())[i :: len(shards)])
        weight_map |= dict.fromkeys(part, shard)
        files[f"source/{shard}"] = (
            torch_file(part, legacy, rng if "pickle" in stages else None)
            if binary
            else safetensors(part, rng if "header" in stages else None)
        )
    if sharded:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        index = mutated(index, rng, SHARDS) if "index" in stages else index
        files[f"source/{entry}.index.json"] = text(index)
    return f"{'legacy ' * (binary and legacy)}{'sharded ' * sharded}{suffix}", files


def keywords(rng: Random) -> dict[str, Any]:
    choices: dict[str, list[Any]] = {
        "target": [SHAPE, "target", None],
        "quantize": [True],
        "q_bits": [2, 3, 4, 8, 1, 7, 0],
        "q_group_size": [32, 32, 32, 64, 16, 0],
        "q_mode": ["mxfp4", "nvfp4", "mxfp8"],
        "dtype": ["float16", "bfloat16", "float32"],
        "taps": ["input", "output"],
        "feedback": ["pre", "post"],
        "rope_theta": [5e5, 0.0, -1.0, math.nan],
        "window": [0, 1, 8, 2**40],
        "slots": ["shifted", "unshifted"],
        "strict": [True],
    }
    likely = {"target": 0.8, "quantize": 0.2, "q_group_size": 0.9}
    drawn = {k: rng.choice(v) for k, v in choices.items() if rng.random() < likely.get(k, 0.06)}
    return {k: v for k, v in drawn.items() if "quantize" in drawn or not k.startswith("q_")}


# The largest inputs that are not refused for their size alone.


def bomb(base: str = "specforge 3.1", path: str = "", data: bytes = b"", **config: Any) -> Files:
    values, tensors = bases()[base]
    return {
        "source/config.json": text(values | config),
        "source/model.safetensors": safetensors(tensors),
        "source/tokenizer.json": text(TOKENIZER),
        "target/config.json": text(TARGET),
        "target/tokenizer.json": text(TOKENIZER),
    } | ({path: data} if path else {})


def lists(size: int) -> bytes:
    return b'{"a":[' + b",".join([b"[]"] * (size // 3 - 4)) + b"]}"


def many_tensors() -> Files:
    _, tensors = bases()["specforge 3.1"]
    return bomb() | {
        "source/model.safetensors": safetensors(
            tensors | {f"layers.{i:x}.x": Stored("F16", (0,), b"") for i in range(19_900)}
        )
    }


def index_alone() -> Files:
    files = bomb(path="source/model.safetensors.index.json", data=lists(16 << 20))
    del files["source/model.safetensors"]
    return files


LONGROPE = {"original_max_position_embeddings": 5, "short_factor": [1] * 10**6}
LARGEST = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "draft_vocab_size"), 2**24),
    **{"num_layers": 256, "head_dim": 2**20, "taps": list(range(10_001))},
    "target": {"hidden_size": 2**24, "vocab_size": 2**24, "num_layers": None},
}
BOMBS: dict[str, Callable[[], Files]] = {
    "a config of keys": lambda: bomb(**{f"{i:x}": 0 for i in range(350_000)}),
    "a list for RoPE": lambda: bomb(
        rope_scaling={"type": "longrope", "long_factor": [1], **LONGROPE}
    ),
    "the largest network": lambda: bomb("converted specforge 3.1", **LARGEST),
    "a header of lists": lambda: bomb(
        path="source/model.safetensors",
        data=struct.pack("<Q", len(lists(8 << 20))) + lists(8 << 20),
    ),
    "a header of tensors": many_tensors,
    "an index of lists": index_alone,
    "a tokenizer of lists": lambda: bomb(path="source/tokenizer.json", data=lists(20 << 20)),
}
