"""Write what the public package ``speculators`` answers: its checkpoints and its own logits.

    python tests/speculators_reference/make_references.py           # write everything here
    python tests/speculators_reference/make_references.py --check   # recompute, compare instead
    python tests/speculators_reference/make_references.py --exported FOLDER

The last runs the package on these heads as `mlx-drift export` gives them back, which
`tests/convert/test_export.py FOLDER` writes, and compares with the same committed logits.

The tests read the files alone; the package is needed only to make them. Its environment, from the
root of the repository (the package's full requirements pull gigabytes of CUDA builds, so these are
only what its import asks for):

    python3 -m venv /tmp/spec-venv
    pip=/tmp/spec-venv/bin/pip
    $pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    $pip install --no-deps speculators==0.9.0
    $pip install transformers==5.19.0 hs-connectors==0.9.0 'datasets>=4,<=5.1.0' 'openai>=2'
    $pip install 'loguru<=0.7.3' aiohttp httpx pydantic-settings
    export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 PYTHONPATH=tests/reference
    /tmp/spec-venv/bin/python tests/speculators_reference/make_references.py

What is the package's own:

- The heads. A trained one is ``Eagle3DraftModel.from_training_args`` with random weights, saved by
  the trainer's ``SingleGPUCheckpointer`` (bfloat16). A converted one went from SafeAILab's form
  through ``Eagle3Converter`` (float16). Only ``config.json`` and ``model.safetensors`` are kept,
  not the optimizer and the copy of the package's ``config.py`` that are written beside them. Where
  ``old_rope`` is set, the RoPE keys are respelled as transformers 4 wrote them: 0.9 reads that, but
  its transformers no longer writes it.
- The logits. Each head is read back from the files kept here into ``Eagle3DraftModel``, whose
  ``forward`` unrolls the train-time test with the true tokens; ``shift_batch`` pairs tokens and
  taps, and a hook on ``lm_head`` picks up each step's logits. The attention is the trainer's
  ``--draft-attn-impl eager``. Its default, flex attention, takes whole blocks of 128 rows: it is
  run as well, padded, and must agree.

Two departures, both in how a converted head is loaded, since 0.9 itself cannot: ``from_pretrained``
leaves an absent embedding uninitialized, so the model is built and given the tensors directly, and
then takes the target's rows by its own ``load_verifier_weights``; and only the converter knows
``target_hidden_size``, so ``fc`` is replaced by a linear layer of that width. The forward is as it
is.

references.json
    ``{"versions", "seed", "length", "steps", "cases": [{"name", "made_by", "old_rope", "flags",
    "layer", "taps", "embed"}, ...]}``: ``flags`` of the head's config and ``layer`` of its
    ``transformer_layer_config`` are what sets the case apart; ``taps`` is None where the config
    gives none (the package then takes 2, n//2, n-3, here 2, 5, 7); ``embed`` is "head" or "target".
NAME/config.json, NAME/model.safetensors
    The head. ``verifier`` names a target that exists only while this runs: Llama, 10 layers, 48
    tokens, hidden size 32 (24 for ``target_width``).
references.safetensors
    ``NAME/tokens`` [L + 1] int64, ``NAME/taps`` [L, A, T], ``NAME/logits`` [steps, L, D], and
    ``NAME/embed`` [V, H], the target's rows, where the head brings none; float32. Row i of step j
    embeds ``tokens[i + 1 + j]``, ``taps[i]`` was captured at ``tokens[i]``, the logits mean
    something while i + j < L.

Every drawn float has at most 8 significant bits, so the bfloat16 and float16 files are exact.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import draw_weight, generator, make_config, short_floats, tensor_shapes
from loguru import logger
from safetensors.torch import load_file, save_file
from speculators.convert.eagle.eagle3_converter import Eagle3Converter
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig, shift_batch
from speculators.models.eagle3.rotary_partial import install_partial_neox_rotary
from speculators.train.checkpointer import SingleGPUCheckpointer
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
TENSORS_FILE = HERE / "references.safetensors"
CASES_FILE = HERE / "references.json"
HEAD_FILES = ("config.json", "model.safetensors")

SEED = 41
LENGTH = 10
STEPS = 5
FLEX_ROWS = 128  # one block of flex attention
TOLERANCE = 2e-5
BUDGET = 1_500_000

HIDDEN = 32
VOCAB = 48
DRAFT_VOCAB = 24
TARGET = "tiny-target"
WIDTHS = {TARGET: HIDDEN, "narrow-target": 24}

LAYER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
"""``transformer_layer_config`` of every trained head, with some overrides."""

FLAGS: dict[str, Any] = {
    "draft_vocab_size": DRAFT_VOCAB,
    "norm_before_residual": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
    "embed_requires_grad": False,
}
"""Training arguments of every trained head, with some overrides."""

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""With theta 100 and head_dim 8 the four wavelengths (6, 20, 63, 199) meet all three branches."""

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
"""Its ramp over the four frequencies is 0, 1/2, 1, 1, and it scales queries and keys."""


PARTIAL: dict[str, Any] = {
    "rope_type": "linear",
    "rope_theta": 500.0,
    "factor": 2.0,
    "partial_rotary_factor": 0.5,
}
"""The package rotates a part of each head as vLLM does, except in plain RoPE: there transformers'
Llama and Qwen3 layers rotate all of it, of which the trainer's command line warns."""


def sliding(window: int, *layers: bool) -> dict[str, Any]:
    """The keys of a window as the trainer writes them; ``layers`` says which layers slide."""
    return {
        "sliding_window": window,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in layers],
    }


@dataclass(frozen=True)
class Spec:
    """What sets one case apart; see the module docstring for the fields in references.json."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)
    taps: tuple[int, ...] | None = (2, 5, 7)
    made_by: str = "trainer"
    target: str = TARGET
    own_embed: bool = True
    old_rope: bool = False

    @property
    def num_taps(self) -> int:
        return 3 if self.taps is None else len(self.taps)

    def entry(self) -> dict[str, Any]:
        """Its line in references.json."""
        return {
            "name": self.name,
            "made_by": self.made_by,
            "old_rope": self.old_rope,
            "flags": self.flags,
            "layer": self.layer,
            "taps": None if self.taps is None else list(self.taps),
            "embed": "head" if self.own_embed else "target",
        }


DEFAULTS = {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}
NORMED = {"fc_norm": True, "norm_output": True}
QWEN3 = {"model_type": "qwen3"}

SPECS = [
    Spec("plain", layer={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    Spec("norm_before_residual", {"norm_before_residual": True}),
    Spec("norm_output", {"norm_output": True}),
    Spec("fc_norm", {"fc_norm": True}),
    Spec("fc_norm_norm_output", NORMED),
    Spec("norm_before_fc_all", DEFAULTS),
    Spec("trainer_defaults", DEFAULTS, sliding(2048, True)),
    Spec(
        "qk_norm", layer={**QWEN3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    ),
    Spec("rope_llama3", layer={"rope_parameters": LLAMA3}),
    Spec("rope_yarn", layer={"rope_parameters": YARN}),
    Spec("rope_partial", layer={"rope_parameters": PARTIAL}),
    Spec(
        "rope_partial_yarn",
        layer={
            **QWEN3,
            "head_dim": 12,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
        },
    ),
    Spec("old_rope_theta", old_rope=True),
    Spec("old_rope_llama3", layer={"rope_parameters": LLAMA3}, old_rope=True),
    Spec("four_taps", NORMED, taps=(2, 4, 6, 9)),
    Spec("window4", layer=sliding(4, True)),
    Spec("two_layers", layer={"num_hidden_layers": 2}),
    Spec("two_layers_window3", DEFAULTS, {"num_hidden_layers": 2, **sliding(3, True, True)}),
    Spec("mixed_window", layer={"num_hidden_layers": 2, **sliding(3, True, False)}),
    Spec("full_vocab", {"draft_vocab_size": VOCAB, "embed_requires_grad": True}),
    Spec("attention_bias", layer={"attention_bias": True}),
    Spec("mlp_bias", layer={"mlp_bias": True}),
    Spec("wide_heads", layer={"head_dim": 12, "num_key_value_heads": 1}),
    Spec(
        "everything",
        {"norm_before_residual": True, "embed_requires_grad": True, **NORMED},
        {
            **QWEN3,
            "num_hidden_layers": 2,
            "head_dim": 12,
            "attention_bias": True,
            "rope_parameters": YARN,
            **sliding(4, True, True),
        },
        taps=(0, 3, 5, 10),
    ),
    Spec("converted", taps=None, made_by="converter", own_embed=False),
    Spec("target_width", made_by="converter", target="narrow-target"),
]


def draw(name: str, *shape: int) -> torch.Tensor:
    """A drawn weight, as float32; it depends on its name and shape only."""
    return torch.from_numpy(draw_weight({"vocab_size": VOCAB}, name, shape, SEED))


def draw_embedding(name: str) -> torch.Tensor:
    """Embedding rows as small as real ones, so that the eps of their norm shows."""
    noise = generator(SEED, name, VOCAB, HIDDEN).standard_normal((VOCAB, HIDDEN))
    return torch.from_numpy(short_floats(0.05 * noise))


def draw_inputs(spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [L + 1] and taps [L, A, T]; taps grow with depth, as in a real residual stream."""
    tokens = generator(SEED, "tokens", LENGTH).integers(0, VOCAB, size=LENGTH + 1)
    shape = (LENGTH, spec.num_taps, WIDTHS[spec.target])
    scales = 0.5 * 2.0 ** np.arange(spec.num_taps)
    noise = generator(SEED, "taps", *shape).standard_normal(shape)
    taps = short_floats(noise * scales[None, :, None])
    return torch.from_numpy(tokens), torch.from_numpy(taps)


def vocabulary_maps() -> tuple[torch.Tensor, torch.Tensor]:
    """(t2d [V] bool, d2t [D] int64 offsets) of the reduced vocabulary."""
    d2t = draw("d2t", DRAFT_VOCAB)
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[d2t + torch.arange(DRAFT_VOCAB)] = True
    return t2d, d2t


def write_targets() -> None:
    """Write to the current folder as much of the targets as the package reads."""
    for name, width in WIDTHS.items():
        LlamaConfig(
            **LAYER | {"hidden_size": width, "num_hidden_layers": 10},
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(name)
    tensors = {
        "model.embed_tokens.weight": draw_embedding("target_embed"),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": draw("target_head.weight", VOCAB, HIDDEN),
    }
    save_file(tensors, Path(TARGET) / "model.safetensors")


def layer_config(spec: Spec) -> PretrainedConfig:
    """The ``transformer_layer_config`` of a trained head."""
    values = LAYER | spec.layer
    kind = Qwen3Config if values.pop("model_type", "llama") == "qwen3" else LlamaConfig
    config: PretrainedConfig = kind(**values)
    return config


def train(spec: Spec, folder: Path) -> None:
    """Write a head as the trainer would have, had training ended at the drawn weights."""
    flags = FLAGS | spec.flags
    reduced = flags["draft_vocab_size"] != VOCAB
    t2d, d2t = vocabulary_maps() if reduced else (None, None)
    model = Eagle3DraftModel.from_training_args(
        verifier_config=layer_config(spec),
        t2d=t2d,
        d2t=d2t,
        **flags,
        target_layer_ids=list(spec.taps or ()) or None,
        verifier_name_or_path=spec.target,
        ttt_steps=STEPS,
        draft_attn_impl="eager",
    )
    weights = {
        name: draw(name, *tensor.shape)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not name.startswith(("verifier_", "embed_tokens"))
    }
    if flags["embed_requires_grad"]:  # otherwise it stays the target's
        weights["embed_tokens.weight"] = draw_embedding("own_embed")
    model.load_state_dict(weights, strict=False)
    optimizer = torch.optim.SGD(model.parameters())  # the checkpointer wants one
    SingleGPUCheckpointer(folder.parent).save_checkpoint(model, optimizer, folder.name)


def convert(spec: Spec, folder: Path) -> None:
    """Write a head of SafeAILab's form and convert it."""
    width = WIDTHS[spec.target]
    shapes = tensor_shapes(make_config(target_hidden_size=width))
    weights = {
        name.replace("layers.0.", "midlayer."): draw(name, *shape) for name, shape in shapes.items()
    }
    weights["t2d"], weights["d2t"] = vocabulary_maps()
    if spec.own_embed:
        weights["embed_tokens.weight"] = draw_embedding("own_embed")
    config = {key: value for key, value in LAYER.items() if key != "rope_parameters"}
    config |= {"draft_vocab_size": DRAFT_VOCAB, "torch_dtype": "float16"}
    if width != HIDDEN:
        config["target_hidden_size"] = width

    source = folder.with_name(f"{folder.name}-source")
    source.mkdir()
    save_file(
        {n: w.half() if w.is_floating_point() else w for n, w in weights.items()},
        source / "model.safetensors",
    )
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    Eagle3Converter().convert(
        source,
        folder,
        spec.target,
        validate=False,  # its validation runs the same from_pretrained as load_head
        eagle_aux_hidden_state_layer_ids=list(spec.taps or ()) or None,
    )


def respell_rope(path: Path) -> None:
    """Rewrite ``rope_parameters`` of a config.json as transformers 4 spelled it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    layer = config["transformer_layer_config"]
    scaling = layer.pop("rope_parameters")
    layer["rope_theta"] = scaling.pop("rope_theta")
    layer["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_head(folder: Path, attention: str) -> Eagle3DraftModel:
    """Load a committed head in float32, strictly; the target's embedding if it brings none."""
    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = attention
    model = Eagle3DraftModel(config)
    if config.target_hidden_size is not None:
        num_taps = model.fc.in_features // model.hidden_size
        model.fc = torch.nn.Linear(num_taps * config.target_hidden_size, HIDDEN, bias=False)
    weights = load_file(folder / "model.safetensors")  # copied into float32 parameters
    absent, unexpected = model.load_state_dict(weights, strict=False)
    missing = {name for name in absent if not name.startswith("verifier_")}
    if unexpected or missing - {"embed_tokens.weight"}:
        raise ValueError(f"{folder}: missing {missing}, unexpected {unexpected}")
    if missing:
        model.load_verifier_weights()  # fills what is still NaN, as it was made
    return model.eval()


def run_head(
    model: Eagle3DraftModel, tokens: torch.Tensor, taps: torch.Tensor, rows: int
) -> torch.Tensor:
    """The package's training forward, padded to ``rows``: draft logits [steps, L, D]."""
    length = taps.shape[0]
    states = torch.zeros(length + 1, taps[0].numel())  # one longer: shift_batch drops the last
    states[:length] = taps.flatten(1)
    shifted = shift_batch(
        {
            "input_ids": tokens,
            "hidden_states": states,
            "verifier_last_hidden_states": states,  # for the loss alone, which is not asked for
            "loss_mask": torch.ones(length + 1),
            "lengths": torch.tensor([length + 1]),
            "position_ids": torch.arange(length + 1),
        }
    )

    def padded(x: torch.Tensor, value: int = 0) -> torch.Tensor:
        """One sequence, as the trainer packs it: rows of document -1 at its end."""
        return torch.cat([x, x.new_full((rows - length, *x.shape[1:]), value)])[None]

    logits: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _m, _x, out: logits.append(out[0, :length]))
    with torch.no_grad():
        model(
            hidden_states=padded(shifted["hidden_states"]),
            input_ids=padded(shifted["input_ids"]),
            document_ids=padded(torch.zeros(length, dtype=torch.long), -1),
            position_ids=padded(shifted["position_ids"]),
            ttt_steps=STEPS,
        )
    hook.remove()
    return torch.stack(logits)


def valid_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference where the results mean something."""
    steps, rows, _ = a.shape
    valid = torch.arange(steps)[:, None] + torch.arange(rows)[None] < rows
    return float((a - b)[valid].abs().max())


def answer(
    name: str, tokens: torch.Tensor, taps: torch.Tensor, heads: Path = HERE
) -> tuple[torch.Tensor, ...]:
    """What a committed head answers: logits [steps, L, D] and the embedding it used [V, H]."""
    model = load_head(heads / name, "eager")
    logits = run_head(model, tokens, taps, LENGTH)
    flex = run_head(load_head(heads / name, "simple_flex_attention"), tokens, taps, FLEX_ROWS)
    if not (error := valid_difference(logits, flex)) <= TOLERANCE:
        raise SystemExit(f"{name}: eager and flex attention differ by {error}")
    return logits, model.embed_tokens.weight.detach()


def write_head(spec: Spec) -> None:
    """Write ``NAME/config.json`` and ``NAME/model.safetensors``."""
    made = Path("heads", spec.name).absolute()
    (convert if spec.made_by == "converter" else train)(spec, made)
    if spec.old_rope:
        respell_rope(made / "config.json")
    folder = HERE / spec.name
    folder.mkdir()
    for name in HEAD_FILES:
        shutil.copyfile(made / name, folder / name)


def write() -> None:
    """Write every file; one JSON line per case, so that a diff reads well."""
    for old in HERE.glob("*/config.json"):
        shutil.rmtree(old.parent)
    tensors: dict[str, torch.Tensor] = {}
    for spec in SPECS:
        write_head(spec)
        tokens, taps = draw_inputs(spec)
        logits, embed = answer(spec.name, tokens, taps)
        tensors |= {
            f"{spec.name}/tokens": tokens,
            f"{spec.name}/taps": taps,
            f"{spec.name}/logits": logits,
        }
        if not spec.own_embed:
            tensors[f"{spec.name}/embed"] = embed
    save_file(tensors, TENSORS_FILE)
    TENSORS_FILE.chmod(0o644)

    versions = {name: version(name) for name in ("speculators", "torch", "transformers")}
    lines = ",\n".join("  " + json.dumps(spec.entry()) for spec in SPECS)
    head = f'"seed": {SEED}, "length": {LENGTH}, "steps": {STEPS}'
    CASES_FILE.write_text(
        f'{{"versions": {json.dumps(versions)},\n{head}, "cases": [\n{lines}\n]}}\n',
        encoding="utf-8",
    )
    size = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    if size > BUDGET:
        raise SystemExit(f"the references take {size} bytes, more than {BUDGET}")
    print(f"{len(SPECS)} cases, {size} bytes")


def check(heads: Path = HERE) -> None:
    """Recompute every committed case from what the files of some heads hold, and compare."""
    tensors = load_file(TENSORS_FILE)
    worst = 0.0
    for entry in json.loads(CASES_FILE.read_text(encoding="utf-8"))["cases"]:
        name = entry["name"]
        logits, embed = answer(name, tensors[f"{name}/tokens"], tensors[f"{name}/taps"], heads)
        error = valid_difference(logits, tensors[f"{name}/logits"])
        worst = max(worst, error)
        if error > TOLERANCE:
            raise SystemExit(f"{name}: differs by {error}")
        if not torch.equal(tensors.get(f"{name}/embed", embed), embed):
            raise SystemExit(f"{name}: the embedding differs")
    print(f"all cases agree, largest difference {worst:.1e}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="write or check the speculators references")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--exported", type=Path, help="a folder of heads that were exported")
    arguments = parser.parse_args()
    heads = (arguments.exported or HERE).resolve()
    # The package finds a target by its path, which it also writes into the config: a relative one.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        write_targets()
        if arguments.check or arguments.exported:
            check(heads)
        else:
            write()


if __name__ == "__main__":
    torch.set_num_threads(1)
    install_partial_neox_rotary()  # as the trainer does; whole heads stay as they are
    disable_progress_bar()
    logger.remove()
    main()
