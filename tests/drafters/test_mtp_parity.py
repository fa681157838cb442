"""Parity of MTP heads with what others compute: engines' chaining, and the speculators package.

The checkpoints, each in its maker's layout, and the answers are in `mtp_reference`, where
`mtp_torch.py` tells of the two conventions. Here they are only read.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_drift.convert import convert_drafter
from mlx_drift.drafters.cache import ChainCache
from mlx_drift.drafters.config import read_config
from mlx_drift.drafters.load import WEIGHTS, load_network
from mlx_drift.files.tensors import read_safetensors

FOLDER = Path(__file__).parents[1] / "mtp_reference"
CASES = {c["name"]: c for c in json.loads((FOLDER / "references.json").read_text())["cases"]}
PACKAGE = [name for name, case in CASES.items() if "package_steps" in case]


@pytest.fixture(scope="module")
def given():
    return read_safetensors(FOLDER / "references.safetensors")


def load(name, given, out):
    """A converted head in float32 and its inputs: (network, embedded tokens, hidden, head)."""
    convert_drafter(str(FOLDER / name), out, mtp=True)
    network = load_network(read_config(out), read_safetensors(out / WEIGHTS), out / WEIGHTS)
    network.set_dtype(mx.float32)
    width = CASES[name]["hidden_size"]
    hidden, embed, head = (given[f"{width}/{key}"] for key in ("hidden", "embed", "head"))
    return network, embed[given["tokens"]], network.fuse(hidden[:, None]), head


def check(normed, head, expected, name):
    np.testing.assert_allclose(normed, expected[f"{name}/states"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(normed @ head.T, expected[f"{name}/logits"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_engines(name, given, tmp_path):
    network, embedded, hidden, head = load(name, given, tmp_path / "out")
    caches, rows, outputs = [ChainCache()], len(hidden), []
    for start, stop in ((0, rows), (rows, rows + 1), (rows + 1, rows + 2)):
        normed, recycled = network(embedded[start + 1 : stop + 1], hidden, caches)
        assert mx.array_equal(normed, recycled)
        outputs.append(normed)
        hidden = recycled[-1:]
    check(mx.concatenate(outputs), head, given, name)


@pytest.mark.parametrize("name", PACKAGE)
def test_speculators(name, given, tmp_path):
    network, embedded, hidden, head = load(name, given, tmp_path / "out")
    rows, outputs = len(hidden), []
    for step in range(CASES[name]["package_steps"]):
        normed, hidden = network(embedded[step + 1 : step + 1 + rows], hidden, [ChainCache()])
        outputs.append(normed)
    check(mx.stack(outputs), head, read_safetensors(FOLDER / "speculators.safetensors"), name)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_the_references_are_what_torch_computes(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import torch
    from mtp_torch import MtpReference
    from safetensors.torch import load_file

    given = load_file(FOLDER / "references.safetensors")
    width = CASES[name]["hidden_size"]
    hidden, embed, head = (given[f"{width}/{key}"] for key in ("hidden", "embed", "head"))
    config = json.loads((FOLDER / name / "config.json").read_text())
    tensors = load_file(FOLDER / name / "model.safetensors")
    logits, states = MtpReference(config, tensors, embed, head).engine(given["tokens"], hidden)
    torch.testing.assert_close(logits.float(), given[f"{name}/logits"])
    torch.testing.assert_close(states.float(), given[f"{name}/states"])
