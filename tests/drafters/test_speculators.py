"""Parity with the public `speculators` package: its heads, its own logits of five steps.

The heads and the references were made by `speculators_reference/make_references.py`, in an
environment of its own; here they are only read.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_drift import convert_drafter
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.load import load_network, target_ids
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.target.model import TargetShape

FOLDER = Path(__file__).parents[1] / "speculators_reference"
CASES = {
    case["name"]: case for case in json.loads((FOLDER / "references.json").read_text())["cases"]
}
STEPS = 5
VOCAB = 48
LAYERS = 10  # of the target: a head without ids taps the inputs of layers 2, 5 and 7


@pytest.fixture(scope="module")
def references():
    return read_safetensors(FOLDER / "references.safetensors")


def test_the_combinations_that_matter_are_there():
    assert len(CASES) >= 10


@pytest.mark.parametrize("name", CASES)
def test_logits_of_five_steps(name, references, tmp_path):
    out = tmp_path / "out"
    tokens, taps = references[f"{name}/tokens"], references[f"{name}/taps"].astype(mx.float32)
    shape = TargetShape(hidden_size=taps.shape[-1], vocab_size=VOCAB, num_layers=LAYERS)
    done = convert_drafter(str(FOLDER / name), out, target=shape, strict=True)
    assert done.dialect == "speculators"
    assert list(done.config.taps) == (CASES[name]["taps"] or [2, 5, 7])
    weights = read_safetensors(out / "model.safetensors")
    d2t = weights.pop("d2t", None)
    network = load_network(done.config, weights, out)
    network.set_dtype(mx.float32)
    embed = references.get(f"{name}/embed")
    target = SimpleNamespace(
        model=None, embed=lambda ids: embed[ids], head=None, shape=done.config.target
    )
    ids = target_ids(done.config, d2t, out)
    drafter = ChainDrafter(done.config, network, target, ids)
    logits, _ = drafter.train_time_test(tokens, taps, STEPS)
    expected = np.array(references[f"{name}/logits"])
    rows = taps.shape[0]
    valid = np.arange(STEPS)[:, None] + np.arange(rows)[None] < rows
    np.testing.assert_allclose(np.array(logits)[valid], expected[valid], rtol=0, atol=2e-4)
