"""Quantize the target with mlx-lm at the smallest width that keeps its held-out perplexity.

Also writes the dequantized weights as an fp32 Hugging Face directory: what the drafters must
learn to predict is the quantized model, and PyTorch cannot read MLX's packed weights. The loss is
measured on the dequantized weights too: same numbers, and a CPU multiplies them far faster.

Scales, norms and activations are float32: MLX's CPU backend has no fast half-precision kernels.
"""

import argparse
import math
import shutil
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm import convert
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load

from train_demo_pair.data import read_jsonl

WIDTHS = (4, 5, 6)
GROUP_SIZE = 64
TIMED_BLOCKS, TIMED_STEPS = 5, 10


def heldout_losses(
    model: nn.Module, tokenizer: TokenizerWrapper, records: list[dict[str, Any]]
) -> dict[str, float]:
    """Mean loss per assistant token, for each split."""
    sums: dict[str, list[float]] = {}
    for record in records:
        answer = {"role": "assistant", "content": record["answer"]}
        prompt = tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True)
        ids = mx.array(tokenizer.apply_chat_template([*record["messages"], answer]))
        logits = model(ids[None, :-1])[0].astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, ids[1:])[len(prompt) - 1 :]
        sums.setdefault(record["split"], []).extend(losses.tolist())
    return {split: sum(losses) / len(losses) for split, losses in sums.items()}


def decode_milliseconds(model: nn.Module) -> float:
    """One-row decode steps, as plain generation takes them; the fastest of a few blocks."""
    cache, blocks = make_prompt_cache(model), []
    token = mx.array([0])
    for _ in range(TIMED_BLOCKS):
        start = time.perf_counter()
        for _ in range(TIMED_STEPS):
            token = mx.argmax(model(token[None], cache=cache)[:, -1], axis=-1)
            mx.eval(token)
        blocks.append((time.perf_counter() - start) / TIMED_STEPS)
    return 1000 * min(blocks)


def save_dequantized(model: nn.Module, reference: Path, out: Path) -> None:
    weights = tree_flatten(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
    shutil.copytree(reference, out)
    mx.save_safetensors(str(out / "model.safetensors"), dict(weights), metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("pair/target-hf"))
    parser.add_argument("--out", type=Path, default=Path("pair"))
    parser.add_argument("--heldout", type=Path, default=Path(__file__).with_name("heldout.jsonl"))
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of the perplexity")
    args = parser.parse_args()
    records = read_jsonl(args.heldout)

    def report(name: str, folder: Path, milliseconds: float, losses: dict[str, float]) -> None:
        size = (folder / "model.safetensors").stat().st_size / 1e6
        by_split = ", ".join(f"{split} {loss:.4f}" for split, loss in losses.items())
        print(f"{name}: {size:.2f} MB, {milliseconds:.2f} ms a token, {by_split}", flush=True)

    model, tokenizer = load(str(args.target))
    full = heldout_losses(model, tokenizer, records)
    report("unquantized", args.target, decode_milliseconds(model), full)
    for width in WIDTHS:
        candidate = args.out / f"target-mlx-{width}bit"
        convert(
            str(args.target),
            str(candidate),
            quantize=True,
            q_bits=width,
            q_group_size=GROUP_SIZE,
            dtype=args.dtype,
        )
        model, tokenizer = load(str(candidate))
        milliseconds = decode_milliseconds(model)
        model = dequantize_model(model)
        losses = heldout_losses(model, tokenizer, records)
        report(f"{width} bits, {args.dtype}", candidate, milliseconds, losses)
        if all(losses[split] <= full[split] + math.log1p(args.tolerance) for split in full):
            break
    candidate.rename(args.out / "target-mlx")
    save_dequantized(model, args.target, args.out / "target-dequantized")
    print(f"chosen: {width} bits")


if __name__ == "__main__":
    main()
