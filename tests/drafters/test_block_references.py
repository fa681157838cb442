"""Parity with the packages that heads that draft a block are from: their files, their own drafts.

The heads and the references were made by `block_reference/make_references.py`, in an environment of
its own; here they are only read.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_drift import DriftError, convert_drafter
from mlx_drift.drafters.load import build_drafter, load_network, target_ids
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.target.model import TargetShape

FOLDER = Path(__file__).parents[1] / "block_reference"
MADE = json.loads((FOLDER / "references.json").read_text())
CASES = {case["name"]: case for case in MADE["cases"]}
VOCAB, HIDDEN, LAYERS = 48, 32, 8
SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)


@pytest.fixture(scope="module")
def references():
    return read_safetensors(FOLDER / "references.safetensors")


class Recorder:
    """Chooses the likeliest token, and keeps the logits that it was asked with."""

    drafts_greedily = False
    processes = True
    tells_tokens_apart = True

    def __init__(self):
        self.logits = []

    def likeliest(self, logits, drafted):
        self.logits.append(logits)
        return mx.argmax(logits, axis=-1).astype(mx.int32)

    def draft(self, logits, drafted):
        return self.likeliest(logits, drafted), None


def converted(name, out, **options):
    slots = CASES[name]["slots"] if name == "specforge_rnn" else None
    options = {"slots": slots} | options
    return convert_drafter(str(FOLDER / name), out, target=SHAPE, strict=True, **options)


def loaded(config, folder, references):
    weights = read_safetensors(folder / "model.safetensors")
    d2t = weights.pop("d2t", None)
    network = load_network(config, weights, folder / "model.safetensors")
    network.set_dtype(mx.float32)
    embed, head = references["embed"], references["head"]
    target = SimpleNamespace(
        model=None,
        shape=SHAPE,
        embed=lambda ids: embed[ids],
        head=lambda x: x @ head.T,
        logits=lambda x: x @ head.T,
    )
    return build_drafter(config, network, target, target_ids(config, d2t, folder))


@pytest.mark.parametrize("name", CASES)
def test_the_packages_own_drafts(name, references, tmp_path):
    case = CASES[name]
    done = converted(name, tmp_path / "out")
    assert done.config.drafter_type == case["kind"]
    assert list(done.config.taps) == case["taps"]
    assert getattr(done.config, "slots", case["slots"]) == case["slots"]
    drafter = loaded(done.config, tmp_path / "out", references)
    tokens, taps = references["tokens"], references[f"{name}/taps"]
    taps = taps.reshape(tokens.size, len(drafter.taps), HIDDEN)
    for n, anchor in enumerate(MADE["anchors"]):
        expected = references[f"{name}/drafts"][n]
        cache = drafter.make_cache()
        for start, stop in ((0, anchor - 1), (anchor - 1, anchor)):  # in two goes, as in decoding
            drafter.ingest(tokens[start + 1 : stop + 1], taps[start:stop], cache)
        for k in range(1, expected.size + 1):
            assert drafter.propose(k, cache).tokens.tolist() == expected.tolist()[:k]
        more = drafter.propose(expected.size + 3, cache)  # than it was trained for
        assert more.tokens.tolist() == expected.tolist()
        seen = Recorder()
        drafter.propose(expected.size, cache, seen)
        logits = np.array(mx.concatenate(seen.logits))
        logits = logits if drafter._d2t is None else logits[:, np.array(drafter._d2t)]
        wanted = np.array(references[f"{name}/logits"][n])
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-4)
        assert cache.layers[0].offset == anchor  # what a block drafts is forgotten


def test_a_dspark_head_that_does_not_say_its_slots_is_refused(tmp_path):
    with pytest.raises(DriftError, match="--slots shifted or --slots unshifted"):
        converted("specforge_rnn", tmp_path / "out", slots=None)
