"""Reference cases for the drafter, without torch: loading the committed ones and drawing new ones.

Needs only numpy and safetensors. ``load_cases`` reads ``references.json`` and
``references.safetensors`` (written by ``make_references.py``, described there); ``random_case``
draws the inputs of one case from a config, for make_references and for live comparisons with
``eagle3_torch.Eagle3Reference``. Shape letters as in ``eagle3_torch.py``.

A drawn tensor depends only on (seed, name, shape), so cases of one seed share their tensors and
the file stores each once. Every drawn float has at most 8 significant bits: it is exact in float32,
float16 and bfloat16 alike, so a loader may cast weights to either without changing the maths.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
TENSORS_FILE = HERE / "references.safetensors"
CASES_FILE = HERE / "references.json"

Array = NDArray[Any]

BASE_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "target_hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "attention_bias": False,
    "qk_norm": False,
    "gated_attention": False,
    "vocab_size": 48,
    "draft_vocab_size": 24,
    "taps": [2, 4, 7],
    "fc_norm": False,
    "norm_before_fc": False,
    "norm_before_residual": False,
    "norm_output": False,
    "tied": False,
}
"""A one-layer EAGLE-3 drafter with a reduced vocabulary; every case is this with some overrides."""

SWITCHES = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")

LINEAR_ROPE: dict[str, Any] = {"rope_type": "linear", "factor": 2.0}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""With theta 100 and head_dim 8 the four wavelengths (6, 20, 63, 199) meet all three branches."""


@dataclass(frozen=True)
class Case:
    """One drafter, its inputs, and what the reference answered.

    config       keys of ``BASE_CONFIG``
    weights      canonical name -> float32 (``d2t`` int64); exactly the tensors the config asks for
    embed        [V, H] float32
    target_head  [V, H] float32; the drafter's head when ``tied``, otherwise not to be used
    tokens       [L + 1] int64
    taps         [L, A, T] float32; ``taps[i]`` was captured at ``tokens[i]``
    logits       [steps, L, D] float32 (steps = 0: not computed yet)
    states       [steps, L, H] float32, the recycled states
    """

    name: str
    config: dict[str, Any]
    weights: dict[str, Array]
    embed: Array
    target_head: Array
    tokens: Array
    taps: Array
    logits: Array
    states: Array

    @property
    def steps(self) -> int:
        """How many steps were computed."""
        return int(self.logits.shape[0])

    @property
    def valid(self) -> NDArray[np.bool_]:
        """[steps, L]: which results mean something (row i of step j iff i + j < L)."""
        rows = self.taps.shape[0]
        valid: NDArray[np.bool_] = np.add.outer(np.arange(self.steps), np.arange(rows)) < rows
        return valid


def make_config(**overrides: Any) -> dict[str, Any]:
    """``BASE_CONFIG`` with overrides; a tied head spans the full vocabulary."""
    unknown = set(overrides) - set(BASE_CONFIG)
    if unknown:
        raise KeyError(f"unknown config keys: {sorted(unknown)}")
    config = {**BASE_CONFIG, **overrides}
    if config["tied"]:
        config["draft_vocab_size"] = config["vocab_size"]
    return config


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor the config asks for (formats.md section 2)."""
    hidden, target, inner = (
        config["hidden_size"],
        config["target_hidden_size"],
        config["intermediate_size"],
    )
    head_dim = config["head_dim"]
    q_out = config["num_attention_heads"] * head_dim
    kv_out = config["num_key_value_heads"] * head_dim
    taps = len(config["taps"])
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, taps * target)}
    if config["fc_norm"]:
        shapes |= {f"fc_norm.{i}.weight": (target,) for i in range(taps)}
    if config["norm_before_fc"]:
        shapes["input_norm.weight"] = (taps * target,)
    for n in range(config["num_hidden_layers"]):
        layer = f"layers.{n}"
        attn = f"{layer}.self_attn"
        attn_in = 2 * hidden if n == 0 else hidden
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        if n == 0:
            shapes[f"{layer}.hidden_norm.weight"] = (hidden,)
        q_rows = 2 * q_out if config["gated_attention"] else q_out
        shapes[f"{attn}.q_proj.weight"] = (q_rows, attn_in)
        shapes[f"{attn}.k_proj.weight"] = (kv_out, attn_in)
        shapes[f"{attn}.v_proj.weight"] = (kv_out, attn_in)
        shapes[f"{attn}.o_proj.weight"] = (hidden, q_out)
        if config["attention_bias"]:
            shapes[f"{attn}.q_proj.bias"] = (q_rows,)
            shapes[f"{attn}.k_proj.bias"] = (kv_out,)
            shapes[f"{attn}.v_proj.bias"] = (kv_out,)
            shapes[f"{attn}.o_proj.bias"] = (hidden,)
        if config["qk_norm"]:
            shapes[f"{attn}.q_norm.weight"] = (head_dim,)
            shapes[f"{attn}.k_norm.weight"] = (head_dim,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["norm.weight"] = (hidden,)
    if not config["tied"]:
        shapes["lm_head.weight"] = (config["draft_vocab_size"], hidden)
    if config["draft_vocab_size"] != config["vocab_size"]:
        shapes["d2t"] = (config["draft_vocab_size"],)
    return shapes


def generator(seed: int, name: str, *shape: int) -> np.random.Generator:
    """A numpy generator that depends only on the seed, a name and a shape."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *shape])


def short_floats(x: Array) -> Array:
    """Round to 8 significant bits and a multiple of 2**-24: exact in fp32, fp16 and bf16."""
    mantissa, exponent = np.frexp(np.asarray(x, dtype=np.float64))
    short = np.ldexp(np.round(mantissa * 256.0), exponent - 8)
    exact: Array = (np.round(short * 2.0**24) / 2.0**24).astype(np.float32)
    return exact


def draw_weight(config: dict[str, Any], name: str, shape: tuple[int, ...], seed: int) -> Array:
    """One drawn tensor: norms around 1, biases around 0, matrices that keep activations O(1)."""
    rng = generator(seed, name, *shape)
    if name == "d2t":  # int64 offsets: target id = draft id + d2t[draft id]
        chosen = np.sort(rng.choice(config["vocab_size"], size=shape[0], replace=False))
        return np.asarray(chosen - np.arange(shape[0]), dtype=np.int64)
    noise = rng.standard_normal(shape)
    if name.endswith(".bias"):
        return short_floats(0.5 * noise)
    if len(shape) == 1:
        return short_floats(1.0 + 0.3 * noise)
    # Sharper scores than at initialisation, so that masks and RoPE matter to the result.
    gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    return short_floats(gain * noise / np.sqrt(shape[1]))


def random_case(name: str, config: dict[str, Any], seed: int = 0, length: int = 12) -> Case:
    """Draw weights and inputs for ``config``; ``length`` is L. Outputs are left empty (0 steps).

    Taps grow with depth (RMS 0.5, 1, 2, ...), as in a real residual stream, and embeddings are
    small (0.05), so that a missing norm or a wrong eps shows.
    """
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    target, taps = config["target_hidden_size"], len(config["taps"])
    weights = {n: draw_weight(config, n, s, seed) for n, s in tensor_shapes(config).items()}
    scales = 0.5 * 2.0 ** np.arange(taps)
    tap_noise = generator(seed, "taps", length, taps, target).standard_normal(
        (length, taps, target)
    )
    head_noise = generator(seed, "target_head", vocab, hidden).standard_normal((vocab, hidden))
    embed_noise = generator(seed, "embed", vocab, hidden).standard_normal((vocab, hidden))
    tokens = generator(seed, "tokens", length + 1, vocab).integers(0, vocab, size=length + 1)
    return Case(
        name=name,
        config=config,
        weights=weights,
        embed=short_floats(0.05 * embed_noise),
        target_head=short_floats(head_noise / np.sqrt(hidden)),
        tokens=tokens.astype(np.int64),
        taps=short_floats(tap_noise * scales[None, :, None]),
        logits=np.zeros((0, length, config["draft_vocab_size"]), dtype=np.float32),
        states=np.zeros((0, length, hidden), dtype=np.float32),
    )


def random_config(seed: int) -> dict[str, Any]:
    """A config with every switch and size drawn at random, for live comparisons."""
    rng = np.random.default_rng(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    heads, kv_heads = pick((4, 2), (4, 4), (4, 1), (6, 3))
    overrides: dict[str, Any] = {key: bool(rng.integers(2)) for key in SWITCHES}
    overrides |= {
        "hidden_size": pick(24, 32),
        "target_hidden_size": pick(24, 32),
        "num_hidden_layers": pick(1, 1, 2, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": pick(8, 12),
        "rope_scaling": pick(None, None, LINEAR_ROPE, LLAMA3_ROPE),
        "rope_theta": pick(100.0, 10000.0, 1000000.0),
        "sliding_window": pick(None, None, 1, 3, 7),
        "attention_bias": pick(False, True),
        "qk_norm": pick(False, True),
        "taps": pick([2, 4, 7], [3], [1, 2, 4, 6, 8], [0, 5]),
        "tied": pick(False, True),
        "gated_attention": pick(False, True),
        "partial_rotary_factor": pick(1.0, 0.5),
    }
    return make_config(**overrides)


def reference_configs() -> dict[str, dict[str, Any]]:
    """Name -> config of every committed case.

    ``switches/SET/HEAD``: the 16 sets of ``SWITCHES`` (``none``, or names joined by ``+``) times
    HEAD in {reduced, tied}. ``extra/NAME``: one feature each, some with fc_norm and norm_output
    on, and one case with nearly everything at once.
    """
    configs: dict[str, dict[str, Any]] = {}
    for bits in range(2 ** len(SWITCHES)):
        switches = {s: bool(bits >> i & 1) for i, s in enumerate(SWITCHES)}
        label = "+".join(s for s, on in switches.items() if on) or "none"
        for head in ("reduced", "tied"):
            config = make_config(**switches, tied=head == "tied")
            configs[f"switches/{label}/{head}"] = config
    normed = {"fc_norm": True, "norm_output": True}
    extras: dict[str, dict[str, Any]] = {
        "two_layers": {"num_hidden_layers": 2},
        "qk_norm": {"qk_norm": True},
        "attention_bias": {"attention_bias": True},
        "gated_attention": {"gated_attention": True},
        "gated_attention_norms": {"gated_attention": True, "norm_before_residual": True, **normed},
        "gated_attention_biased": {
            "gated_attention": True,
            "num_hidden_layers": 2,
            "qk_norm": True,
            "attention_bias": True,
        },
        "one_tap": {"taps": [5], **normed},  # A*T == H: the "is fc needed?" width test is wrong
        "five_taps": {"taps": [1, 2, 4, 6, 8], **normed},
        "window5": {"sliding_window": 5},
        "rope_linear": {"rope_scaling": LINEAR_ROPE},
        "rope_llama3": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 100.0},
        "partial_rotary": {"partial_rotary_factor": 0.5},
        "partial_rotary_llama3": {
            "partial_rotary_factor": 0.5,
            "rope_scaling": LLAMA3_ROPE,
            "rope_theta": 100.0,
        },
        "partial_rotary_qwen3_5": {  # its layer: a quarter is rotated, norms, a gate
            "partial_rotary_factor": 0.25,
            "qk_norm": True,
            "gated_attention": True,
            **normed,
        },
        "wide_heads": {"head_dim": 12, "num_key_value_heads": 1},  # 4 * 12 != 32
        "target_width": {"target_hidden_size": 24, **normed},
        "own_full_head": {"draft_vocab_size": BASE_CONFIG["vocab_size"]},  # lm_head, no d2t
        "everything": {
            "num_hidden_layers": 2,
            "qk_norm": True,
            "attention_bias": True,
            "taps": [0, 3, 5, 8],
            "target_hidden_size": 24,
            "sliding_window": 4,
            "rope_scaling": LLAMA3_ROPE,
            "rope_theta": 100.0,
            "norm_before_residual": True,
            **normed,
        },
    }
    for name, overrides in extras.items():
        configs[f"extra/{name}"] = make_config(**overrides)
    return configs


def stored_name(name: str, shape: tuple[int, ...]) -> str:
    """Where a shared tensor lives in the file: ``shared/NAME/AxBxC``."""
    return f"shared/{name}/{'x'.join(map(str, shape))}"


def shared_tensors(config: dict[str, Any], length: int) -> dict[str, str]:
    """Name -> place in the file of everything a case has except its outputs.

    Weights go by canonical name; the rest are ``embed``, ``target_head``, ``tokens``, ``taps``.
    """
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    shapes = tensor_shapes(config) | {
        "embed": (vocab, hidden),
        "target_head": (vocab, hidden),
        "tokens": (length + 1,),
        "taps": (length, len(config["taps"]), config["target_hidden_size"]),
    }
    return {name: stored_name(name, shape) for name, shape in shapes.items()}


def load_cases() -> list[Case]:
    """The committed reference cases, in file order. Floats come back as float32."""
    tensors = load_file(TENSORS_FILE)
    listing = json.loads(CASES_FILE.read_text(encoding="utf-8"))

    def get(key: str) -> Array:
        tensor = tensors[key]
        return tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor

    cases = []
    for entry in listing["cases"]:
        config = entry["config"]
        places = shared_tensors(config, listing["length"])
        inputs = {n: get(places.pop(n)) for n in ("embed", "target_head", "tokens", "taps")}
        cases.append(
            Case(
                name=entry["name"],
                config=config,
                weights={name: get(place) for name, place in places.items()},
                logits=get(entry["logits"]),
                states=get(entry["states"]),
                **inputs,
            )
        )
    return cases
