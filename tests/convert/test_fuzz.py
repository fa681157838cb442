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
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from block_dialects import BLOCK_VARIANTS
from dialects import EAGLE4, LAYERS, VARIANTS
from hydra_heads import ARCHITECTURES as HYDRA_KINDS
from hydra_heads import BASE as HYDRA_BASE
from hydra_heads import write_hydra
from medusa_heads import CONFIGS as MEDUSA_SPELLINGS
from medusa_heads import medusa, write_medusa
from mlx_drift.convert import convert_drafter, inspect_drafter
from mlx_drift.convert.read.source import read_checkpoint
from mlx_drift.convert.read.stored import DTYPES, itemsize
from mlx_drift.convert.rope import KINDS
from mlx_drift.drafters.load import load_converted
from mlx_drift.drafters.protocol import Branches
from mlx_drift.errors import DriftError
from mlx_drift.target.model import TargetShape
from mtp_heads import FAMILIES, config_of, head, write_repository, written
from tiny import HIDDEN, VOCAB, tiny_llama
from torch_files import Global, Persistent, dumps, storage, stream, tensor, zip_archive

SEED = "mlx-drift"
MTP = "mtp "  # what the names of heads begin with that `mtp=True` takes out of their files
MAX_SECONDS, MAX_BYTES = 5.0, 2 * 10**9
WAIT = 60.0  # seconds, however busy the machine is: for what computes nothing
SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)

Random = random.Random
Config = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Odd:
    """What stands in a file's place: a `fifo`, a `folder`, or a `link` to a path."""

    kind: str
    link: str = ""


Tensors = dict[str, Stored]
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


# What is mutated: a head in every spelling, and converted ones.


@cache
def bases() -> dict[str, tuple[Config, Tensors]]:
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for name, variant in (VARIANTS | BLOCK_VARIANTS | {"eagle4": EAGLE4}).items():
            variant.spell(variant.made, Path(root, name))
            found[name] = read_back(Path(root, name))
        for name in MEDUSA_SPELLINGS:
            write_medusa(medusa(), Path(root, f"medusa {name}"), name)
            found[f"medusa {name}"] = read_back(Path(root, f"medusa {name}"))
        for name in HYDRA_KINDS:
            write_hydra(name, Path(root, f"hydra {name}"), **HYDRA_BASE)
            found[f"hydra {name}"] = read_back(Path(root, f"hydra {name}"))
        heads = (
            "medusa vllm",
            "hydra mlp",
            "hydra prefix-mlp",
            "hydra eagle-attn",
            "eagle4",
            "specforge 3.1",
            "specforge with embedding",
            "modelopt no aux state",
            "eagle-1 bin",
            "p-eagle speculators",
            "dflash z-lab sliding",
            "dflash speculators",
            "dspark speculators",
            "dspark deepspec",
            "dspark modelopt",
        )
        for name, quantize in itertools.product(heads, (False, True)):
            out = Path(root, f"converted {name}{' -q' * quantize}")
            how = {"quantize": True, "q_group_size": 32} if quantize else {}
            convert_drafter(f"{root}/{name}", out, target=SHAPE, **how)
            found[out.name] = read_back(out)
        sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
        for name in FAMILIES:
            source, out = Path(root, MTP + name), Path(root, f"converted {MTP}{name}")
            tensors = written(name, head(name, **sizes), **sizes)
            write_repository(source, config_of(name, **sizes), tensors)
            how = {"quantize": True, "q_group_size": 32} if "moe" in name else {}
            convert_drafter(str(source), out, mtp=True, **how)
            found |= {folder.name: read_back(folder) for folder in (source, out)}
    return found


def read_back(folder: Path) -> tuple[Config, Tensors]:
    checkpoint = read_checkpoint(str(folder))
    return checkpoint.config, {
        name: Stored(stored.stored, stored.shape, np.array(stored.whole()).tobytes())
        for name, stored in checkpoint.tensors.items()
    }


TARGET = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "</s>"}]}

# What it is mutated with.

KEYS = """
    architectures attention_factor block_size draft_vocab_size drafter_type eagle_config
    eagle_aux_hidden_state_layer_ids fc fc_bias fc_norm feedback format_version
    full_attention_layers head_dim hidden_act hidden_norm hidden_size layer_types
    max_position_embeddings model_type norm_before_fc norm_before_residual norm_output
    num_attention_heads num_key_value_heads num_layers own_embedding own_head parallel_draft_step
    partial_rotary_factor provenance qk_norm quantization return_hidden_post_norm rms_norm_eps
    rope_parameters rope_scaling rope_theta sliding_attention sliding_window source
    speculators_config speculators_model_type taps target target_hidden_size
    target_num_hidden_layers text_config transformer_layer_config use_aux_hidden_state
    use_sliding_window block hidden_first kv_lora_rank mlx_lm_extra_tensors mtp_file mtp_feedback
    n_routed_experts num_experts num_experts_per_tok moe_intermediate_size num_hidden_layers
    qk_nope_head_dim v_head_dim vocab_size weight_map __metadata__ dtype shape data_offsets model
    added_tokens rope_type type factor repo path sha256 \ud800 \x1b[31m
    num_heads num_blocks num_candidates candidate_rank input_norm hydra_num_heads hydra_head_arch
    hidden_state_offset efficient_lm_head_config rank markov confidence slots mask_token_id
    causal_layers window_rule markov_rank max_drafts block_bias candidate_rank dflash_config
    is_causal causal sliding_window_non_causal sample_from_anchor shift_label projector_type
    markov_head_type ptd_token_id parallel_drafting num_target_layers medusa medusa_num_heads
    logit_scale original_lm_head attention_sink_bias input_embedding_scale grounded_heads
""".split()
NAMES = """
    d2t t2d fc.bias fc.weight input_norm.weight embed_tokens.weight lm_head.weight norm.weight
    lm_head.bias layers.1.mlp.up_proj.weight midlayer.mlp.up_proj.weight model.norm.weight
    layers.0.hidden_norm.weight layers.0.self_attn.q_norm.weight layers.0.self_attn.q_proj.bias
    fc_norm.1.weight fc_norm.9.weight midlayer.1.norm.weight mtp.x layers layers. layers.x.y
    mtp.layers.0.mlp.experts.0.up_proj.weight mtp.layers.0.mlp.experts.gate_up_proj
    model.layers.12.self_attn.kv_b_proj.weight model.layers.12.eh_proj.weight_scale_inv
    model.mtp_layers.1.fc.weight mtp.layers.0.self_attn.q_norm.weight mtp.fc.scales mtp.norm.weight
    layers.0.mlp.up_proj.scales verifier_norm.weight rotary_emb.inv_freq [/] \x1b[31m \ud800
    heads.0.linear.weight heads.0.residual.weight hydra_mlp.0.2.linear.bias hydra_lm_head.3.bias
    hydra_mlp.0.0.res_connection.weight attn.self_attn.q_proj.weight candidate_up.weight
    prefix_embeding_layer.norm.weight efficient_lm_head.weight efficient_lm_head_down_proj.weight
    mask_hidden context_norm.weight markov_head.markov_w1.weight markov_head.gate_proj.weight
    markov.joint.weight markov.w2.weight confidence.weight confidence_head.proj.bias token_map
    heads.0.blocks.2.weight heads.7.lm_head.weight lm_heads.1.weight medusa_heads.1.0.linear.bias
""".split()
RAW = {  # JSON that json.dumps does not write, by a string that stands for it
    "@nested": "[" * 300 + "]" * 300,
    "@nested objects": '{"a":' * 200 + "1" + "}" * 200,
    "@nested far": "[" * 100_000 + "]" * 100_000,
    "@many lists": "[" + ",".join(["[]"] * 10**5) + "]",
    "@many keys": "{" + ",".join(f'"k{i}":{i}' for i in range(10**4)) + "}",
    "@10**4299": "1" + "0" * 4299,
    "@10**5000": "1" + "0" * 5000,
    "@1e999": "1e999",
}
NUMBERS = [0, -1, 1, 2, 3, 5, 8, 31, 33, 64, 10_001, 2**24, 2**31, 2**53, 2**63, -(2**63), 10**400]
FLOATS = [0.5, -0.0, 1e-320, 1e18, 1e308, math.nan, math.inf, -math.inf]
STRINGS = ["", "x", "32", "\0\x1b[31m\n", "\u2028\ud800", "[/]", "..", "/etc/passwd", "x" * 10**5]
PLAIN = [None, True, False, *NUMBERS, *STRINGS, [], {}]
EVIL = [
    *(*PLAIN, *FLOATS, *RAW, "full_attention", {"a": 1}, list(range(3000))),
    *([None], [1, 2, 3], [[1, 2], [3]], [0.5], ["x"], ["sliding_attention"]),
]
PICKLED = [*PLAIN, (), (1,), (2, 3), Global("os", "system"), Global("torch", "Size"), tensor()]
SHARDS = [*EVIL, "../model.safetensors", "./model.safetensors", "/etc/hosts", "model-9.safetensors"]
ODD = [
    *(Odd("fifo"), Odd("folder"), Odd("link", "../outside"), Odd("link", "../pipe")),
    *(Odd("link", "config.json"), Odd("link", "missing"), Odd("link", "/dev/zero")),
]
STORAGES = {"F16": "Half", "BF16": "BFloat16", "F32": "Float", "F64": "Double", "I64": "Long"}
STORAGES |= {"I32": "Int", "I16": "Short", "I8": "Char", "BOOL": "Bool"}


# How it is mutated.


def mutated(tree: Any, rng: Random, evil: list[Any]) -> Any:
    """Replaces, leaves out, doubles, renames, swaps or adds a node of a tree, seldom its root."""
    how = rng.randrange(20)
    if isinstance(tree, dict) and tree and how:
        key, other = rng.choices(list(tree), k=2)
        if how == 1:
            return {k: value for k, value in tree.items() if k != key}
        if how == 2:
            return tree | {key: tree[other]}
        if how == 3:
            return {rng.choice(KEYS) if k == key else k: value for k, value in tree.items()}
        if how in (4, 5):
            return tree | {rng.choice(KEYS): rng.choice(evil)}
        return tree | {key: mutated(tree[key], rng, evil)}
    if isinstance(tree, list | tuple) and tree and how:
        items, i = list(tree), rng.randrange(len(tree))
        if how == 1:
            del items[i]
        elif how == 2:
            items[i] = rng.choice(items)
        elif how == 3:
            items.insert(i, rng.choice(items))
        else:
            items[i] = mutated(items[i], rng, evil)
        return type(tree)(items)
    if is_dataclass(tree) and how:
        name = rng.choice(fields(tree)).name
        return replace(tree, **{name: mutated(getattr(tree, name), rng, evil)})
    if type(tree) is int and how < 8:
        return rng.choice([tree + 1, tree - 1, -tree, 2 * tree, tree * 10**6])
    return rng.choice(evil)


def mutated_config(config: Any, rng: Random) -> Any:
    if not isinstance(config, dict) or rng.random() < 0.85:
        return mutated(config, rng, EVIL)
    kinds = {"full_attention": rope(rng), "sliding_attention": rope(rng)}
    return config | {
        "rope_scaling": rng.choice([None, rope(rng)]),
        "rope_parameters": rng.choice([None, rope(rng), kinds]),
    }


def rope(rng: Random) -> Config:
    """A RoPE scaling of some kind, most of its values of the right type."""
    lists = [[1.0] * 4, [2, 1, 1], [0.0] * 5]
    kind = rng.choice([*KINDS, "x"])
    scaling: Config = {rng.choice(["rope_type", "type"]): kind}
    for key in [*sorted(KINDS.get(kind, ())), "attention_factor", "truncate"]:
        if rng.random() < 0.8:
            likely = lists if key in ("short_factor", "long_factor", "mrope_section") else NUMBERS
            scaling[key] = rng.choice(likely if rng.random() < 0.8 else [*FLOATS, *lists, True])
    return mutated(scaling, rng, EVIL) if rng.random() < 0.3 else scaling


def mutated_tensors(tensors: Tensors, rng: Random) -> Tensors:
    """Drops, renames, doubles, retypes, reshapes, fills or replaces a tensor of a whole file."""
    name = rng.choice(list(tensors))
    one, rest = tensors[name], {key: value for key, value in tensors.items() if key != name}
    as_wide = [dtype for dtype in DTYPES if itemsize(dtype) == itemsize(one.dtype)]
    dtype = rng.choice([*as_wide, *DTYPES, "F8_E8M0"])
    shapes = [(), one.shape[::-1], (*one.shape, 1), (0, *one.shape), (1,) * 32, (2**31 - 1, 0)]
    new_name = rng.choice([*NAMES, *tensors, f"model.{name}", f"layers.1.{name}"])
    return rng.choice(
        [
            rest,
            rest | {new_name: one},
            tensors | {new_name: one},
            tensors | {name: sized(dtype, one.shape, one.data)},
            tensors | {name: sized(one.dtype, rng.choice(shapes), one.data)},
            tensors | {name: replace(one, data=rng.randbytes(len(one.data)))},
            tensors | {name: rng.choice(list(tensors.values()))},
        ]
    )


def sized(dtype: str, shape: tuple[int, ...], data: bytes) -> Stored:
    """Repeats or cuts the data to what shape and dtype ask for."""
    size = math.prod(shape) * (itemsize(dtype) if dtype in DTYPES else 1)
    return Stored(dtype, shape, (data * (size // max(1, len(data)) + 1))[:size])


def mutated_bytes(data: bytes, rng: Random) -> bytes:
    """Cuts, replaces, inserts, takes out or flips bytes, most of them where headers are."""
    at = min(rng.randrange(len(data) + 1), rng.randrange(2000))
    bits = [b"{", b"[", b'"', b"1e999,", b"\xff", b"\0", b"PK\3\4", b"\x80\2"]
    flipped = bytearray(data)
    for _ in range(rng.randrange(1, 5) if data else 0):
        flipped[rng.randrange(len(data)) if rng.random() < 0.5 else at - 1] = rng.randrange(256)
    return rng.choice(
        [
            *([bytes(flipped)] * 3),
            data[:at],
            data[:at] + rng.choice(bits) + data[at:],
            data[:at] + data[at + rng.randrange(1, 100) :],
            rng.randbytes(rng.choice([0, 1, 8, 100, 10_000])),
        ]
    )


# How it is written; with `rng`, with something wrong in it.


def text(tree: Any) -> bytes:
    found = json.dumps(tree)
    for name, raw in RAW.items():
        found = found.replace(f'"{name}"', raw)
    return found.encode()


def safetensors(tensors: Tensors, rng: Random | None = None) -> bytes:
    header, at = {}, 0
    for name, one in tensors.items():
        span = [at, at := at + len(one.data)]
        header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": span}
    found = text(header if rng is None else mutated(header, rng, EVIL))
    length = len(found)
    if rng is not None:
        twice = found.replace(b"{", b'{"fc.weight":{},', 1)
        found = rng.choice([*([found] * 6), twice, found.decode().encode("utf-16")])
        length = rng.choice([*([len(found)] * 8), 0, 7, 10**8, 2**63, 2**64 - 1])
    return struct.pack("<Q", length) + found + b"".join(one.data for one in tensors.values())


def torch_file(tensors: Tensors, legacy: bool, rng: Random | None = None) -> bytes:
    state, storages = {}, []
    for key, (name, one) in enumerate(tensors.items()):
        kind, numel = f"{STORAGES.get(one.dtype, 'Byte')}Storage", math.prod(one.shape)
        strides = tuple(math.prod(one.shape[i + 1 :]) for i in range(len(one.shape)))
        state[name] = tensor(storage(kind, str(key), numel), 0, one.shape, strides)
        storages.append((str(key), numel, one.data))
    value = state if rng is None else mutated(state, rng, [*PICKLED, Persistent("x")])
    if legacy:
        return stream(value, *storages)
    members = {f"archive/data/{key}": data for key, _, data in storages}
    return zip_archive({"archive/data.pkl": dumps(value)} | members)


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


# What must come of it.


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
