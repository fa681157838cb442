"""Write what the public package ``speculators`` answers: its MTP checkpoints and its own logits.

    /tmp/spec-venv/bin/python tests/mtp_reference/make_speculators_references.py           # write
    /tmp/spec-venv/bin/python tests/mtp_reference/make_speculators_references.py --check

with the environment of ``speculators_reference/make_references.py``. Run ``make_references.py``
afterwards: it compares the package with ``mtp_torch.py`` and adds the engine convention.

What is the package's own:

- The checkpoints. A tiny verifier with native ``mtp.*`` tensors, embedding and head is written as
  the Hub has it, and ``MTPConverter.convert`` takes the module out (numbered experts become fused
  ones). Qwen3 has no native module: the package only trains one. Its verifier is given one.
- The answers. ``MTPDraftModel.from_pretrained`` reads the checkpoint kept here and the verifier's
  embedding and head; its ``forward`` runs in float32 with eager attention, and once more with sdpa,
  the package's default, which must agree.

Its ``forward`` is the training one: each step is a fresh causal pass over the L rows at positions
0 .. L-1. Positions do not advance from step to step and no keys are kept: see "package" in
``mtp_torch.py``. Its tokens are the true ones throughout.

speculators_NAME/config.json, speculators_NAME/model.safetensors
    The checkpoint. ``verifier`` names a target that exists only while this runs.
speculators.safetensors
    ``speculators_NAME/logits`` [steps, L, V] and ``speculators_NAME/states`` [steps, L, H], the
    normed outputs that a step hands to the next. float32. The inputs are those in
    ``references.safetensors``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from loguru import logger
from mtp_cases import (
    HIDDEN,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_NEXT,
    SIZES,
    STEPS,
    VOCAB,
    Config,
    Tensors,
    checkpoint,
    inputs,
)
from safetensors.torch import load_file, save_file
from speculators.convert.mtp.converter import MTPConverter
from speculators.models.mtp import MTPDraftModel, MTPSpeculatorConfig
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
TENSORS_FILE = HERE / "speculators.safetensors"
TARGET = "tiny-target"
TOLERANCE = 2e-5

QWEN3: Config = {
    **SIZES,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "max_window_layers": 4,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 500,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
}

CONFIGS: dict[str, Config] = {
    "speculators_qwen3": QWEN3,
    "speculators_qwen3_next": QWEN3_NEXT,
    "speculators_qwen3_next_dense": {**QWEN3_NEXT, "num_experts": 0},
    "speculators_qwen3_5": QWEN3_5,
    "speculators_qwen3_5_moe": QWEN3_5_MOE,
}


def write_target(config: Config, given: Tensors) -> None:
    """Write to the current folder as much of a verifier as the package reads."""
    folder = Path(TARGET)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    prefix = "model.language_model." if "text_config" in config else "model."
    tensors = checkpoint(config) | {
        f"{prefix}embed_tokens.weight": given[f"{HIDDEN}/embed"].bfloat16(),
        f"{prefix}norm.weight": torch.zeros(HIDDEN).bfloat16(),
        "lm_head.weight": given[f"{HIDDEN}/head"].bfloat16(),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_checkpoint(name: str) -> None:
    """Let the package take the module out of the target in the current folder."""
    made = Path("made").absolute()
    shutil.rmtree(made, ignore_errors=True)
    MTPConverter().convert(TARGET, made, TARGET, num_speculative_steps=STEPS, validate=False)
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(made / file, HERE / name / file)


def run(name: str, given: Tensors, attention: str) -> Tensors:
    """The package's training forward: logits and states of every step."""
    config = MTPSpeculatorConfig.from_pretrained(HERE / name)
    config.transformer_layer_config._attn_implementation = attention
    config.transformer_layer_config._experts_implementation = "eager"
    model = MTPDraftModel.from_pretrained(HERE / name, config=config, dtype=torch.float32).eval()
    for own, key in ((model.embed_tokens, "embed"), (model.lm_head, "head")):
        if not torch.equal(own.weight, given[f"{HIDDEN}/{key}"]):
            raise SystemExit(f"{name}: the package has another {key}")
    states: list[torch.Tensor] = []
    hook = model.mtp_layers[0].register_forward_hook(lambda _m, _x, out: states.append(out[0]))
    # One more token, only for the loss; as many states, of which it takes the first L.
    tokens = torch.cat([given["tokens"], given["tokens"][:1]])[None]
    hidden = torch.zeros(1, tokens.shape[1], HIDDEN)
    rows = given[f"{HIDDEN}/hidden"]
    hidden[0, : len(rows)] = rows
    with torch.no_grad():
        logits, _, _ = model(tokens, hidden)
    hook.remove()
    return {"logits": torch.cat(logits), "states": torch.stack(states)}


def answer(name: str) -> Tensors:
    """What a committed checkpoint answers."""
    given = inputs(HIDDEN)
    write_target(CONFIGS[name], given)
    answers = run(name, given, "eager")
    for key, tensor in run(name, given, "sdpa").items():
        if not (error := float((tensor - answers[key]).abs().max())) <= TOLERANCE:
            raise SystemExit(f"{name}: eager and sdpa attention differ by {error}")
    length = len(given["tokens"]) - STEPS
    assert answers["logits"].shape == (STEPS, length, VOCAB)
    return answers


def write() -> None:
    """Write every file."""
    tensors: Tensors = {}
    for name, config in CONFIGS.items():
        write_target(config, inputs(HIDDEN))
        write_checkpoint(name)
        tensors |= {f"{name}/{key}": tensor for key, tensor in answer(name).items()}
    save_file(tensors, TENSORS_FILE)
    TENSORS_FILE.chmod(0o644)
    print(f"{len(CONFIGS)} cases")


def check() -> None:
    """Recompute every committed case, and compare."""
    want = load_file(TENSORS_FILE)
    worst = 0.0
    for name in CONFIGS:
        for key, tensor in answer(name).items():
            error = float((tensor - want[f"{name}/{key}"]).abs().max())
            worst = max(worst, error)
            if not error <= TOLERANCE:
                raise SystemExit(f"{name}: {key} differs by {error}")
    print(f"all cases agree, largest difference {worst:.1e}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="write or check the package's MTP references")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    # The package finds a target by its path, which it also writes into the config: a relative one.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        (check if arguments.check else write)()


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bar()
    logger.remove()
    main()
