"""Folded and packed networks: the same drafts, from fewer primitives."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from test_train_time_test import CASES, drafter_of

from checkpoints import EMBEDDED
from mlx_drift import DriftError, convert_drafter, generate, load_demo, load_drafter
from mlx_drift.demo import CHAINS, DEMO
from mlx_drift.drafters.config import read_config
from mlx_drift.drafters.fold import fold
from mlx_drift.drafters.load import load_network, quantize_linears
from mlx_drift.files.tensors import read_safetensors
from tiny import HIDDEN, tiny_drafter, tiny_llama

EAGLE = ("eagle3.1", "eagle3")
SAVED = {"eagle3.1": [8, 5], "eagle3": [5, 5], "mtp": [1, 1]}
"""Kernels that folding saves at least, of an ingested row and of a chained draft."""

NORMED = [name for name in CASES if name.startswith("switches/")]
OTHERS = [name for name in CASES if not name.startswith("switches/")]


def drafts(drafter, tokens, taps):
    cache = drafter.make_cache()
    drafter.ingest(tokens[1:], taps, cache)
    return drafter.propose(6, cache).tokens.tolist()


@pytest.mark.parametrize("name", [*NORMED, *OTHERS])
def test_the_same_drafts_and_logits(name):
    case = CASES[name]
    plain, folded = drafter_of(case), drafter_of(case)
    fold(folded.network)
    tokens, taps = mx.array(case.tokens), mx.array(case.taps)
    assert drafts(folded, tokens, taps) == drafts(plain, tokens, taps)
    for ours, theirs in zip(
        folded.train_time_test(tokens, taps, 3), plain.train_time_test(tokens, taps, 3), strict=True
    ):
        assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drafter", EAGLE)
def test_quantized_layers_are_packed_and_not_folded(drafter):
    """The rows of a quantized matrix are independent: packing them changes nothing."""
    folder = DEMO / drafter
    weights = read_safetensors(folder / "model.safetensors")
    weights.pop("d2t", None)
    config = read_config(folder)
    plain, packed = (load_network(config, dict(weights), folder / "x") for _ in range(2))
    for network in (plain, packed):
        network.set_dtype(mx.float32)
        quantize_linears(network, 32, 4, "affine")
    fold(packed)
    assert isinstance(packed.layers[0].self_attn.qkv_proj, nn.QuantizedLinear)
    assert "hidden_norm" in packed.layers[0]
    assert ("fc_norm" in packed) == config.fc_norm
    _, _, loaded = load_demo(drafter)
    mx.random.seed(0)
    taps = mx.random.normal((9, len(config.taps), config.target.hidden_size))
    tokens = mx.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    found = []
    for network in (plain, packed):
        loaded.network = network
        loaded._head = network.get("lm_head", loaded._head)
        loaded._embed = network.get("embed_tokens", loaded._embed)
        found.append(drafts(loaded, tokens, taps))
    assert found[0] == found[1]


def test_a_quantized_gate_is_packed_with_its_queries():
    model = tiny_llama()
    plain, packed = (tiny_drafter(model, gated_attention=True) for _ in range(2))
    for drafter in (plain, packed):
        quantize_linears(drafter.network, 32, 4, "affine")
    fold(packed.network)
    attention = packed.network.layers[0].self_attn
    assert isinstance(attention.qkv_proj, nn.QuantizedLinear)
    assert attention.qkv_proj.scales.shape[0] == (2 * 4 + 2 * 2) * 8
    tokens = mx.arange(10)
    taps = mx.random.normal((9, 2, HIDDEN), key=mx.random.key(0))
    assert drafts(packed, tokens, taps) == drafts(plain, tokens, taps)


def launches(array: mx.array, path) -> int:
    """How many primitives the graph of an array has that do work: copies and kernels."""
    mx.export_to_dot(str(path), array)
    boxes = [line for line in path.read_text().splitlines() if "shape=rectangle" in line]
    views = ("Reshape", "Transpose", "ExpandDims", "Squeeze", "Broadcast", "Flatten", "Unflatten")
    views += ("Split", "Slice")
    return sum(not any(f'label ="{view}"' in box for view in views) for box in boxes)


def count(drafter, path) -> list[int]:
    """The launches of an ingested row with the draft after it, and of a chained draft."""
    tokens, taps = (
        mx.array([1]),
        mx.zeros((1, len(drafter.taps), drafter.config.target.hidden_size)),
    )
    cache = drafter.make_cache()
    mx.eval(drafter.network, tokens, taps)
    drafter.ingest(tokens, taps, cache)
    ingested = launches(drafter.choose(cache.draft_logits), path)
    mx.eval(cache.state)
    return [ingested, launches(drafter.propose(2, cache).tokens, path)]


def test_fewer_launches(monkeypatch, tmp_path):
    """Of one ingested row and the draft after it; norms and rotations as the one kernel they are.

    On a CPU mlx writes them out in small primitives, as it does attention, which stays the same.
    """
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: mx.sigmoid(x))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *args, **kwargs: mx.sigmoid(x))
    for name in CHAINS:
        _, _, folded = load_demo(name)
        weights = read_safetensors(DEMO / name / "model.safetensors")
        weights.pop("d2t", None)
        _, _, plain = load_demo(name)
        plain.network = load_network(plain.config, weights, DEMO)
        plain.network.set_dtype(mx.float32)
        before, after = (count(drafter, tmp_path / "graph.dot") for drafter in (plain, folded))
        print(name, "ingested row, chained draft:", before, "folded:", after)
        saved = [b - a for b, a in zip(before, after, strict=True)]
        # Three matrices less; and norms: of the taps two and their stacking, of the input one.
        assert saved >= SAVED[name]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_drafter_is_quantized_at_load(bits):
    model, tokenizer, _ = load_demo()
    drafter = load_drafter(str(DEMO / "eagle3.1"), model, drafter_bits=bits)
    linears = [m for m in drafter.network.modules() if isinstance(m, nn.QuantizedLinear)]
    assert {linear.bits for linear in linears} == {bits}
    assert not any(type(module) is nn.Linear for module in drafter.network.modules())
    text = generate(model, tokenizer, "def quote", drafter=drafter, max_tokens=24)
    assert text == mlx_lm.generate(model, tokenizer, "def quote", max_tokens=24)


def test_bits_that_mlx_lacks_are_refused(tmp_path):
    model, _, _ = load_demo()
    with pytest.raises(DriftError, match="cannot be quantized to 7 bits"):
        load_drafter(str(DEMO / "eagle3.1"), model, drafter_bits=7)
    convert_drafter(str(EMBEDDED), tmp_path / "q", quantize=True)
    with pytest.raises(DriftError, match="is quantized to 4 bits already"):
        load_drafter(str(tmp_path / "q"), model, drafter_bits=8)
