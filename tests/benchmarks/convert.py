"""How much memory and time a conversion takes, against copying the files.

    python tests/benchmarks/convert.py [--repeats 5]

Writes random bfloat16 heads of Qwen3-8B's shapes, without the embedding (0.8 GB) and with it
(2 GB), and converts each, unquantized and to 4 bits, in a process of its own. There the conversion
and a plain copy of the same files take turns, the cache warm; the figures are medians, and the
peak is the process's own resident memory (`ru_maxrss`), interpreter and MLX included.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

H, T, INNER, V, D = 4096, 4096, 12288, 151936, 32000
SHAPES = {
    "fc.weight": (H, 3 * T),
    "layers.0.self_attn.q_proj.weight": (4096, 2 * H),
    "layers.0.self_attn.k_proj.weight": (1024, 2 * H),
    "layers.0.self_attn.v_proj.weight": (1024, 2 * H),
    "layers.0.self_attn.o_proj.weight": (H, 4096),
    "layers.0.mlp.gate_proj.weight": (INNER, H),
    "layers.0.mlp.up_proj.weight": (INNER, H),
    "layers.0.mlp.down_proj.weight": (H, INNER),
    "lm_head.weight": (D, H),
    "layers.0.hidden_norm.weight": (H,),
    "layers.0.input_layernorm.weight": (H,),
    "layers.0.post_attention_layernorm.weight": (H,),
    "norm.weight": (H,),
}
CONFIG = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "draft_vocab_size": D,
    "norm_before_residual": True,
    "eagle_aux_hidden_state_layer_ids": [2, 18, 33],
    "transformer_layer_config": {
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "vocab_size": V,
    },
}


def write_head(folder: Path, embedding: bool) -> int:
    """Writes a head by blocks; returns the bytes of its largest tensor."""
    shapes = SHAPES | ({"embed_tokens.weight": (V, H)} if embedding else {})
    header, size = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + nbytes]}
        size += nbytes
    header["d2t"] = {"dtype": "I64", "shape": (D,), "data_offsets": [size, size + 8 * D]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 23).astype(np.float32)
    bits = (block.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = 2 * int(np.prod(shape))
            while left:
                left -= file.write(bits[:left])
        file.write(np.zeros(D, np.int64).tobytes())
    return max(2 * int(np.prod(shape)) for shape in shapes.values())


def measure(head: Path, quantize: bool, repeats: int) -> dict[str, float]:
    """Runs in a process of its own: conversion and copy take turns."""
    from mlx_drift import convert_drafter

    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    conversions, copies = [], []
    for _ in range(repeats):
        out = head.parent / "out"
        start = time.perf_counter()
        convert_drafter(str(head), out, quantize=quantize)
        conversions.append(time.perf_counter() - start)
        shutil.rmtree(out)
        out.mkdir()
        start = time.perf_counter()
        for file in head.iterdir():
            shutil.copyfile(file, out / file.name)
        copies.append(time.perf_counter() - start)
        shutil.rmtree(out)
    return {
        "baseline": baseline,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "convert_seconds": statistics.median(conversions),
        "copy_seconds": statistics.median(copies),
        "ratio": statistics.median(a / b for a, b in zip(conversions, copies, strict=True)),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        head, quantize = arguments.measure
        print(json.dumps(measure(Path(head), quantize == "True", arguments.repeats)))
        return
    print("| head | quantized | largest tensor | peak memory | bound | convert | copy | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for embedding in (False, True):
            head = Path(folder) / f"head-{embedding}"
            largest = write_head(head, embedding)
            size = (head / "model.safetensors").stat().st_size
            for quantize in (False, True):
                command = [sys.executable, __file__, "--repeats", str(arguments.repeats)]
                command += ["--measure", str(head), str(quantize)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                m = json.loads(done.stdout)
                print(
                    f"| {size / 1e9:.2f} GB | {'4 bits' if quantize else 'no'} "
                    f"| {largest / 1e9:.2f} GB | {m['peak'] / 1e9:.2f} GB "
                    f"(at start {m['baseline'] / 1e9:.2f}) | {(largest + 0.5e9) / 1e9:.2f} GB "
                    f"| {m['convert_seconds']:.2f} s | {m['copy_seconds']:.2f} s "
                    f"| {m['ratio']:.2f} |",
                    flush=True,
                )
            shutil.rmtree(head)


if __name__ == "__main__":
    main()
