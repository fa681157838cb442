"""Parity of Hydra and EAGLE-4 heads with an independent writing of their equations.

The heads and the references were made by `heads_reference/make_references.py`; here they are read.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_drift import DriftError, convert_drafter
from mlx_drift.drafters.load import build_drafter, load_network, target_ids
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.train.head import load_trainable
from tiny import tiny_llama

FOLDER = Path(__file__).parents[1] / "heads_reference"
VOCAB, HIDDEN, LAYERS = 48, 32, 8
ANCHORS = [3, 9, 15]
BASE = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
DIALECTS = {
    "hydra_mlp": ("Hydra (mlp)", "hydra", [LAYERS + 1]),
    "hydra_mlp_deep": ("Hydra (mlp)", "hydra", [LAYERS - 1]),
    "hydra_prefix": ("Hydra (prefix-mlp)", "hydra-prefix", [LAYERS + 1]),
    "hydra_eagle": ("Hydra (eagle-attn)", "eagle", [LAYERS + 1]),
    "hydra_eagle_earlier": ("Hydra (eagle-attn)", "eagle", [LAYERS - 2]),
    "eagle4": ("EAGLE-4", "eagle4", [2, 4, 5]),
    "eagle4_reduced": ("EAGLE-4", "eagle4", [2, 4, 5]),
}


@pytest.fixture(scope="module")
def references():
    return read_safetensors(FOLDER / "references.safetensors")


@pytest.fixture
def base(tmp_path):
    """The target's folder: its config is all that is looked at."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(BASE))
    return str(tmp_path / "base")


class Recorder:
    """Chooses the likeliest token, and keeps the logits that it was asked with."""

    drafts_greedily = False
    processes = False
    tells_tokens_apart = True

    def __init__(self):
        self.logits = []

    def draft(self, logits, drafted):
        self.logits.append(logits)
        return mx.argmax(logits, axis=-1).astype(mx.int32), logits


def loaded(folder, config, references):
    weights = read_safetensors(folder / "model.safetensors")
    d2t = weights.pop("d2t", None)
    network = load_network(config, weights, folder / "model.safetensors")
    network.set_dtype(mx.float32)
    embed = references["embed"].astype(mx.float32)
    head = references["head"].astype(mx.float32)
    target = SimpleNamespace(
        model=None, shape=config.target, embed=lambda ids: embed[ids], head=lambda x: x @ head.T
    )
    return build_drafter(config, network, target, target_ids(config, d2t, folder))


@pytest.mark.parametrize("name", DIALECTS)
def test_drafts_are_those_of_the_equations(name, references, base, tmp_path):
    done = convert_drafter(str(FOLDER / name), tmp_path / "out", target=base, strict=True)
    kind = done.config.drafter_type
    assert (done.dialect, kind, list(done.config.taps)) == DIALECTS[name]
    drafter = loaded(tmp_path / "out", done.config, references)
    tokens, taps = references["tokens"], references[f"{name}/taps"]
    for n, anchor in enumerate(ANCHORS):
        expected = references[f"{name}/drafts"][n].tolist()
        cache = drafter.make_cache()
        for start, stop in ((0, anchor - 1), (anchor - 1, anchor)):  # in two goes, as in decoding
            drafter.ingest(tokens[start + 1 : stop + 1], taps[start:stop], cache)
        for k in range(1, len(expected) + 1):
            assert drafter.propose(k, cache).tokens.tolist() == expected[:k]
        if drafter.max_drafts is not None:
            assert drafter.propose(len(expected) + 3, cache).tokens.tolist() == expected
        seen = Recorder()
        draft = drafter.propose(len(expected), cache, seen)
        logits = np.array(mx.concatenate(seen.logits))
        logits = logits if drafter._d2t is None else logits[:, np.array(drafter._d2t)]
        wanted = np.array(references[f"{name}/logits"][n])
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-4)
        assert draft.log_probabilities.shape == (len(expected), VOCAB)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_candidates_have_the_logits_of_the_whole_head(bits, references, base, tmp_path):
    """One row, of which only the candidates' rows of the head are read, or many."""
    convert_drafter(str(FOLDER / "eagle4"), tmp_path / "out", target=base)
    from mlx_drift.drafters.config import read_config

    drafter = loaded(tmp_path / "out", read_config(tmp_path / "out"), references)
    if bits is not None:
        nn.quantize(drafter.network, 32, bits, class_predicate=lambda path, _: path == "lm_head")
    rows = mx.random.normal((5, HIDDEN), key=mx.random.key(3))
    whole = np.array(drafter.network.lm_head(rows))
    many = np.array(drafter._head(rows))
    for row in range(5):
        one = np.array(drafter._head(rows[row : row + 1]))[0]
        chosen = np.isfinite(one)
        assert chosen.sum() == 6
        assert (np.isfinite(many[row]) == chosen).all()
        np.testing.assert_allclose(one[chosen], whole[row][chosen], rtol=0, atol=1e-4)
        np.testing.assert_allclose(many[row][chosen], whole[row][chosen], rtol=0, atol=1e-4)


def copied(name, folder, config=(), drop=(), **tensors):
    """An EAGLE-4 head, changed."""
    folder.mkdir()
    values = json.loads((FOLDER / name / "config.json").read_text()) | dict(config)
    (folder / "config.json").write_text(json.dumps(values))
    stored = load_file(FOLDER / name / "model.safetensors")
    kept = {key: tensor for key, tensor in stored.items() if key not in drop}
    save_file(kept | tensors, folder / "model.safetensors")
    return str(folder)


def test_without_a_head_of_its_own_it_drafts_with_the_targets(base, tmp_path):
    source = copied("eagle4", tmp_path / "head", drop=("lm_head.weight", "d2t"))
    done = convert_drafter(source, tmp_path / "out", target=base, strict=True)
    assert done.dialect == "EAGLE-4 that drafts with the target's whole head"
    assert done.config.drafter_type == "eagle3"
    assert not done.config.own_head


CHEAP = {"type": "low_rank", "rank": 8, "num_candidates": 6}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"type": "tree"}, "efficient_lm_head_config.type is 'tree'; expected low_rank"),
        ({"rank": 9}, "rank is 9, but efficient_lm_head_down_proj.weight has 8 rows"),
        ({"num_candidates": 0}, "num_candidates is 0; expected a positive whole number"),
        ({"num_candidates": 49}, "num_candidates is 49 of a draft vocabulary of 48"),
    ],
)
def test_a_cheap_head_that_contradicts_itself_is_told(change, told, base, tmp_path):
    config = {"efficient_lm_head_config": CHEAP | change}
    with pytest.raises(DriftError, match=told):
        convert_drafter(copied("eagle4", tmp_path / "head", config), tmp_path / "out", target=base)


@pytest.mark.parametrize(
    ("name", "target", "told"),
    [
        ("hydra_mlp", None, "depends on the target's number of layers"),
        ("hydra_prefix", None, "does not say how many attention heads the layer has"),
        ("hydra_eagle", None, "does not say how many attention heads the layer has"),
    ],
)
def test_what_only_the_base_model_tells_is_asked_for(name, target, told, tmp_path):
    with pytest.raises(DriftError, match=f"{told}.*--target MODEL"):
        convert_drafter(str(FOLDER / name), tmp_path / "out", target=target)


@pytest.mark.parametrize("flag", ["taps", "feedback", "slots"])
def test_flags_that_say_nothing_of_them_are_refused(flag, base, tmp_path):
    value = {"taps": "input", "feedback": "pre", "slots": "shifted"}[flag]
    source = str(FOLDER / "hydra_prefix")
    with pytest.raises(DriftError, match=f"leave --{flag} out"):
        convert_drafter(source, tmp_path / "out", target=base, **{flag: value})


def test_a_head_of_candidates_is_not_trained(base, tmp_path):
    convert_drafter(str(FOLDER / "eagle4"), tmp_path / "out", target=base)
    model = tiny_llama(num_hidden_layers=LAYERS, vocab_size=VOCAB)
    with pytest.raises(DriftError, match="drafts from candidates alone"):
        load_trainable(tmp_path / "out", model)
