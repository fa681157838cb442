"""One head in every spelling there is: tiny synthetic checkpoints, for the targets of `tiny`.

`head` makes the canonical tensors and the values of a head; a speller writes them as one trainer
does, and knows nothing of the converter.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tiny import HIDDEN, VOCAB
from torch_files import write_bin

LAYERS = 12  # of the target
DRAFT_VOCAB = 40
HEADS, KV_HEADS, HEAD_DIM, INNER = 4, 2, 8, 64
RANK = 32  # of an EAGLE-4 head's cheap head


@dataclass(frozen=True)
class Head:
    """Canonical tensors, and what a config says of them; `taps` as inputs of layers."""

    tensors: dict[str, np.ndarray]
    taps: tuple[int, ...] = (2, 6, 9)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def outputs(self) -> list[int]:
        return [tap - 1 for tap in self.taps]


def random(name: str, *shape: int) -> np.ndarray:
    """The same name and shape, the same values."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**32
    scale, mean = (0.3, 0.0) if len(shape) > 1 else (0.2, 1.0)
    return np.random.default_rng(seed).normal(mean, scale, shape).astype(np.float16)


def layer(i: int, input_size: int) -> dict[str, np.ndarray]:
    attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
    width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        f"{attention}.q_proj": (width, input_size),
        f"{attention}.k_proj": (kv_width, input_size),
        f"{attention}.v_proj": (kv_width, input_size),
        f"{attention}.o_proj": (HIDDEN, width),
        f"{mlp}.gate_proj": (INNER, HIDDEN),
        f"{mlp}.up_proj": (INNER, HIDDEN),
        f"{mlp}.down_proj": (HIDDEN, INNER),
        f"layers.{i}.input_layernorm": (HIDDEN,),
        f"layers.{i}.post_attention_layernorm": (HIDDEN,),
    }
    return {f"{name}.weight": random(name, *shape) for name, shape in shapes.items()}


def head(
    taps: tuple[int, ...] = (2, 6, 9),
    *,
    layers: int = 1,
    fc: bool = True,
    qk_norm: bool = False,
    gated: bool = False,
    embedding: bool = False,
    reduced: bool = True,
    **values: Any,
) -> Head:
    """An EAGLE-3 head; `values` are norm switches and RoPE, under speculators' names."""
    tensors = layer(0, 2 * HIDDEN) | {"norm.weight": random("norm", HIDDEN)}
    for i in range(1, layers):
        tensors |= layer(i, HIDDEN)
    if fc:
        tensors["fc.weight"] = random("fc", HIDDEN, len(taps) * HIDDEN)
        tensors["layers.0.hidden_norm.weight"] = random("hidden_norm", HIDDEN)
    if values.get("fc_norm"):
        for i in range(len(taps)):
            tensors[f"fc_norm.{i}.weight"] = random(f"fc_norm.{i}", HIDDEN)
    if values.get("norm_before_fc"):
        tensors["input_norm.weight"] = random("input_norm", len(taps) * HIDDEN)
    if qk_norm:
        for name in ("q_norm", "k_norm"):
            tensors[f"layers.0.self_attn.{name}.weight"] = random(name, HEAD_DIM)
    if gated:
        for i in range(layers):
            name = f"layers.{i}.self_attn.q_proj.weight"
            rows, input_size = tensors[name].shape
            tensors[name] = random(name, 2 * rows, input_size)
    if embedding:
        tensors["embed_tokens.weight"] = random("embed", VOCAB, HIDDEN)
    rows = DRAFT_VOCAB if reduced else VOCAB
    tensors["lm_head.weight"] = random("lm_head", rows, HIDDEN)
    if reduced:
        ids = np.sort(np.random.default_rng(1).choice(VOCAB, rows, replace=False))
        tensors["d2t"] = ids - np.arange(rows)
    return Head(tensors, taps, values)


def eagle_head(*, qkv_bias: bool = False) -> Head:
    """An EAGLE-1/2 head."""
    tensors = layer(0, HIDDEN) | {
        "fc.weight": random("fc", HIDDEN, 2 * HIDDEN),
        "fc.bias": random("fc.bias", HIDDEN),
        "embed_tokens.weight": random("embed", VOCAB, HIDDEN),
    }
    del tensors["layers.0.input_layernorm.weight"]
    if qkv_bias:
        for name in "qkv":
            rows = (HEADS if name == "q" else KV_HEADS) * HEAD_DIM
            tensors[f"layers.0.self_attn.{name}_proj.bias"] = random(f"{name}.bias", rows)
    return Head(tensors, (LAYERS + 1,))


def sizes(made: Head, **more: Any) -> dict[str, Any]:
    """The keys of transformers' Llama config."""
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": 1 + ("layers.1.input_layernorm.weight" in made.tensors),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
    }
    return {key: value for key, value in (config | more).items() if value is not None}


def switches(made: Head) -> dict[str, bool]:
    return {key: value for key, value in made.values.items() if isinstance(value, bool)}


def rope(made: Head) -> dict[str, Any]:
    return {k: v for k, v in made.values.items() if k in ("rope_theta", "rope_scaling")}


def with_t2d(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if "d2t" not in tensors:
        return tensors
    ids = tensors["d2t"] + np.arange(len(tensors["d2t"]))
    return tensors | {"t2d": np.isin(np.arange(VOCAB), ids)}


def renamed(tensors: dict[str, np.ndarray], *pairs: tuple[str, str]) -> dict[str, np.ndarray]:
    """Replaces the beginnings of names."""
    for old, new in pairs:
        tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: t
            for name, t in tensors.items()
        }
    return tensors


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], form: str = "safetensors"
) -> None:
    """Writes a checkpoint: `safetensors` or `bin`, whole or `sharded …`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, save = (
        ("pytorch_model", write_bin) if "bin" in form else ("model", lambda p, t: save_file(t, p))
    )
    suffix = ".bin" if "bin" in form else ".safetensors"
    if "sharded" not in form:
        save(folder / f"{stem}{suffix}", tensors)
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(2):
        shard = f"{stem}-{i + 1:05}-of-00002{suffix}"
        save(folder / shard, {name: tensors[name] for name in names[i::2]})
        weight_map |= dict.fromkeys(names[i::2], shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def speculators(
    made: Head, folder: Path, form: str = "safetensors", old_rope: bool = False
) -> None:
    layer_config = sizes(made, rope_theta=None)
    theta = {"rope_theta": made.values.get("rope_theta", 10000.0)}
    scaling = made.values.get("rope_scaling", {"rope_type": "default"})
    layer_config |= (
        theta | ({"rope_scaling": scaling} if "rope_scaling" in made.values else {})
        if old_rope
        else {"rope_parameters": scaling | theta}
    )
    if "layers.0.self_attn.q_norm.weight" in made.tensors:
        layer_config["model_type"] = "qwen3"
    if window := made.values.get("sliding_window"):
        layer_config |= {"sliding_window": window, "layer_types": ["sliding_attention"]}
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": made.tensors["lm_head.weight"].shape[0],
        "eagle_aux_hidden_state_layer_ids": list(made.taps),
        "norm_before_residual": False,
        "transformer_layer_config": layer_config,
    } | switches(made)
    write(folder, config, with_t2d(made.tensors), form)


def specforge(
    made: Head,
    folder: Path,
    form: str = "safetensors",
    renames: tuple[tuple[str, str], ...] = (("layers.0.", "midlayer."),),
    t2d: bool = True,
    **more: Any,
) -> None:
    """SpecForge's layout, from which the others differ in a few keys or names."""
    config = (
        sizes(made)
        | rope(made)
        | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": made.tensors["lm_head.weight"].shape[0],
            "tie_word_embeddings": False,
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": made.outputs,
                "use_aux_hidden_state": True,
            },
        }
    )
    config |= switches(made) | more
    tensors = with_t2d(made.tensors) if t2d else made.tensors
    write(
        folder, {k: v for k, v in config.items() if v is not None}, renamed(tensors, *renames), form
    )


def nvidia(made: Head, folder: Path, **more: Any) -> None:
    nested = {
        "eagle_aux_hidden_state_layer_ids": made.outputs,
        "use_aux_hidden_state": "fc.weight" in made.tensors,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
    } | more.pop("nested", {})
    renames = more.pop("renames", ())
    specforge(made, folder, renames=renames, t2d=False, eagle_config=nested, **more)


def eagle(made: Head, folder: Path, form: str = "bin", prefix: str = "") -> None:
    config = sizes(made) | {"architectures": ["LlamaForCausalLM"], "bias": True}
    write(folder, config, renamed(made.tensors, ("", prefix)), form)


PLAIN = head()
NORMALIZED = head(fc_norm=True, norm_output=True)
DEEP = head(layers=2)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MIDLAYER = ("layers.0.", "midlayer.")
DEEP_MEGATRON = (
    ("layers.1.input_layernorm", "layers.1.hidden_norm"),
    ("layers.", "midlayer."),
)


def aux_norms(made: Head, folder: Path) -> None:
    names = zip(range(3), ("low", "mid", "high"), strict=True)
    pairs = [(f"fc_norm.{i}.", f"aux_norm_{name}.") for i, name in names]
    specforge(
        made, folder, renames=(MIDLAYER, *pairs), fc_norm=None, norm_output=None, use_aux_norm=True
    )


def absolute(made: Head, folder: Path) -> None:
    tensors = with_t2d(made.tensors)
    tensors["d2t"] = tensors["d2t"] + np.arange(len(tensors["d2t"]))
    specforge(Head(tensors, made.taps, made.values), folder, t2d=False)


AUX_IDS = {"eagle_config": None}  # SafeAILab and AngelSlim name no ids: the target's layers tell


@dataclass(frozen=True)
class Variant:
    """A head in one spelling, and the dialect it is to be recognised as."""

    dialect: str
    made: Head
    spell: Callable[[Head, Path], None]
    subfolder: str = ""


def variant(dialect: str, made: Head, spell: Callable[..., None], **keywords: Any) -> Variant:
    subfolder = keywords.pop("subfolder", "")
    return Variant(dialect, made, lambda m, folder: spell(m, folder, **keywords), subfolder)


def eagle4() -> Head:
    """An EAGLE-3.1 head, and a cheap one that chooses the rows of its own."""
    cheap = {
        "candidate_down.weight": random("down", RANK, HIDDEN),
        "candidate_up.weight": random("up", DRAFT_VOCAB, RANK),
    }
    return Head(NORMALIZED.tensors | cheap, NORMALIZED.taps, NORMALIZED.values)


CHEAP = (
    ("candidate_down.", "efficient_lm_head_down_proj."),
    ("candidate_up.", "efficient_lm_head."),
)
CANDIDATES = {"type": "low_rank", "rank": RANK, "num_candidates": 12}
EAGLE4 = variant(
    "EAGLE-4",
    eagle4(),
    specforge,
    renames=CHEAP,
    architectures=["LlamaForCausalLMEagle4"],
    efficient_lm_head_config=CANDIDATES,
)
"""No other trainer can write it."""

VARIANTS = {
    "specforge": variant("SpecForge", PLAIN, specforge),
    "specforge 3.1": variant("SpecForge", NORMALIZED, specforge),
    "specforge layers.0": variant("SpecForge", NORMALIZED, specforge, renames=()),
    "specforge in a subfolder": variant("SpecForge", PLAIN, specforge, subfolder="full"),
    "specforge sharded": variant("SpecForge", NORMALIZED, specforge, form="sharded"),
    "specforge with embedding": variant(
        "SpecForge", head(embedding=True, reduced=False), specforge
    ),
    "specforge both rope spellings": variant(
        "SpecForge",
        head(rope_theta=5e5, rope_scaling=LLAMA3),
        specforge,
        rope_parameters=LLAMA3 | {"rope_theta": 5e5},
    ),
    "specforge absolute d2t": variant("SpecForge", PLAIN, absolute),
    "specforge four taps": variant("SpecForge", head(taps=(2, 5, 8, 11)), specforge),
    "specforge training wrappers": variant(
        "SpecForge", PLAIN, specforge, renames=(MIDLAYER, ("", "draft_model."))
    ),
    "specforge gated attention": variant(
        "SpecForge", head(gated=True, attn_output_gate=True), specforge
    ),
    "specforge gated attention, deep and unsaid": variant(
        "SpecForge", head(gated=True, layers=2), specforge, renames=(), head_dim=None
    ),
    "specforge with the gate of a target's config": variant(
        "SpecForge", head(attn_output_gate=True), specforge
    ),
    "sglang deep": variant(
        "SpecForge",
        DEEP,
        specforge,
        renames=(("layers.1.input_layernorm", "layers.1.hidden_norm"),),
    ),
    "vllm's names": variant(
        "SpecForge", PLAIN, specforge, renames=(("d2t", "draft_id_to_target_id"),), t2d=False
    ),
    "nebius": variant(
        "SpecForge",
        PLAIN,
        specforge,
        renames=(),
        architectures=["LlamaForCausalLM"],
        truncated_vocab_size=DRAFT_VOCAB,
    ),
    "safeailab bin": variant(
        "SafeAILab",
        PLAIN,
        specforge,
        form="bin",
        architectures=["LlamaForCausalLM"],
        rope_theta=None,
        **AUX_IDS,
    ),
    "safeailab sharded bin": variant(
        "SafeAILab",
        PLAIN,
        specforge,
        form="sharded bin",
        architectures=["LlamaForCausalLM"],
        **AUX_IDS,
    ),
    "safeailab safetensors": variant(
        "SafeAILab", PLAIN, specforge, architectures=["LlamaForCausalLM"], **AUX_IDS
    ),
    "angelslim bin": variant(
        "AngelSlim",
        PLAIN,
        specforge,
        form="bin",
        architectures=["Eagle3LlamaForCausalLM"],
        target_model_type="qwen3",
        **AUX_IDS,
    ),
    "angelslim sharded bin": variant(
        "AngelSlim",
        PLAIN,
        specforge,
        form="sharded bin",
        architectures=["Eagle3LlamaForCausalLM"],
        **AUX_IDS,
    ),
    "angelslim safetensors": variant(
        "AngelSlim", PLAIN, specforge, architectures=["Eagle3LlamaForCausalLM"]
    ),
    "angelslim mrope": variant(
        "AngelSlim",
        head(rope_scaling={"rope_type": "mrope", "mrope_section": [2, 1, 1]}),
        specforge,
        architectures=["Eagle3LlamaForCausalLM"],
        modal_type="VLM",
    ),
    "specdrift fcs": variant(
        "SpecDrift",
        head(fc_norm=True, norm_output=True, rope_theta=1e7),
        specforge,
        renames=(("fc_norm.", "fcs."),),
        fc_norm=None,
        norm_output=None,
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
    ),
    "specdrift aux_norm": variant("SpecDrift", NORMALIZED, aux_norms),
    "modelopt": variant("NVIDIA ModelOpt", PLAIN, nvidia),
    "modelopt nested norm_before_fc": variant(
        "NVIDIA ModelOpt",
        head(norm_before_fc=True),
        nvidia,
        norm_before_fc=None,
        nested={"norm_before_fc": True},
    ),
    "modelopt ids that end at the last layer": variant(
        "NVIDIA ModelOpt",
        head(taps=(6, 9, LAYERS)),
        nvidia,
        nested={"eagle_aux_hidden_state_layer_ids": [6, 9, LAYERS]},
    ),
    "modelopt megatron": variant("NVIDIA ModelOpt", PLAIN, nvidia, renames=(MIDLAYER,)),
    "modelopt megatron deep": variant("NVIDIA ModelOpt", DEEP, nvidia, renames=DEEP_MEGATRON),
    "modelopt deep": variant("NVIDIA ModelOpt", DEEP, nvidia),
    "modelopt full vocabulary": variant("NVIDIA ModelOpt", head(reduced=False), nvidia),
    "modelopt eagle_module": variant(
        "NVIDIA ModelOpt", PLAIN, nvidia, renames=(("", "eagle_module."),)
    ),
    "modelopt no aux state": variant("NVIDIA ModelOpt", head(taps=(LAYERS + 1,), fc=False), nvidia),
    "torchspec": variant(
        "TorchSpec",
        head(fc_norm=True, norm_output=True, embedding=True, reduced=False),
        specforge,
        renames=(),
        torchspec_version="0.1",
    ),
    "torchspec native": variant("TorchSpec", NORMALIZED, specforge, _torchspec_version="0.1"),
    "automodel": variant(
        "NeMo Automodel",
        PLAIN,
        specforge,
        architectures=["LlamaEagle3DraftModel"],
        renames=(("layers.", "model.layers."), ("fc.", "model.fc."), ("norm.", "model.norm.")),
    ),
    "automodel 3.1 deep": variant(
        "NeMo Automodel",
        head(layers=2, fc_norm=True, norm_output=True),
        specforge,
        architectures=["LlamaEagle3DraftModel"],
        renames=tuple((p, f"model.{p}") for p in ("layers.", "fc", "norm.")),
    ),
    "speculators old rope": variant(
        "speculators", head(rope_theta=5e5, rope_scaling=LLAMA3), speculators, old_rope=True
    ),
    "speculators sharded": variant("speculators", NORMALIZED, speculators, form="sharded"),
    "eagle-1 bin": variant("EAGLE-1/2", eagle_head(), eagle),
    "eagle-1 safetensors": variant("EAGLE-1/2", eagle_head(), eagle, form="safetensors"),
    "eagle-1 vllm": variant(
        "EAGLE-1/2", eagle_head(qkv_bias=True), eagle, form="safetensors", prefix="model."
    ),
}
