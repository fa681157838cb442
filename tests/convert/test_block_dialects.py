"""Heads that draft a block: every spelling gives the same tensors, and its conventions are told."""

import json

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from block_dialects import BLOCK, BLOCK_VARIANTS, MASK, TAPS, block, p_eagle, speculators, z_lab
from dialects import LAYERS, Head
from mlx_drift import DriftError, convert_drafter, inspect_drafter, load_drafter
from mlx_drift.convert.convert import Verdict
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.generate import generate
from mlx_drift.target.model import TargetShape
from tiny import HIDDEN, VOCAB, NoText, tiny_llama

SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
SLOTS = {
    "dflash speculators": "unshifted",
    "dflash z-lab": "unshifted",
    "dspark speculators": "shifted",
    "dspark deepspec": "shifted",
    "dspark modelopt": "unshifted",
    "dspark specforge": "shifted",
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=LAYERS)


@pytest.mark.parametrize("name", BLOCK_VARIANTS)
def test_is_the_same_head(name, tmp_path, model):
    variant = BLOCK_VARIANTS[name]
    variant.spell(variant.made, tmp_path / "spelt")
    options = {"taps": "output"} if name == "p-eagle vllm" else {}
    done = convert_drafter(
        str(tmp_path / "spelt"), tmp_path / "out", target=SHAPE, strict=True, **options
    )
    assert done.dialect == variant.dialect
    assert done.config.taps == variant.made.taps
    assert done.config.mask_token_id == MASK
    assert getattr(done.config, "slots", None) == SLOTS.get(
        name, "unshifted" if "dflash" in name else None
    )
    tensors = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == variant.made.tensors.keys()
    for key, expected in variant.made.tensors.items():
        assert mx.array_equal(tensors[key], mx.array(expected)), key
    if markov := variant.made.values.get("markov"):
        assert done.config.markov == markov
        assert done.config.confidence == "state and token"
    drafter = load_drafter(str(tmp_path / "out"), model)
    prompt = [5, 9, 2, 44, 17]
    text = generate(model, NoText(), prompt, drafter=drafter, max_tokens=8, num_draft_tokens=4)
    assert text == generate(model, NoText(), prompt, drafter=None, max_tokens=8)
    small = convert_drafter(
        str(tmp_path / "out"), tmp_path / "q", quantize=True, q_group_size=32, q_bits=8
    )
    assert small.config.quantization.bits == 8
    load_drafter(str(tmp_path / "q"), model)


def test_windows_are_those_of_each_lineage(tmp_path):
    found = {}
    for name in ("dflash z-lab sliding", "dflash modelopt window"):
        variant = BLOCK_VARIANTS[name]
        variant.spell(variant.made, tmp_path / name)
        found[name] = convert_drafter(str(tmp_path / name), tmp_path / f"{name} out").config
    ours = found["dflash z-lab sliding"]
    assert (ours.sliding_window, ours.full_attention_layers, ours.causal_layers) == (6, (1,), (0,))
    ours = found["dflash modelopt window"]
    assert (ours.sliding_window, ours.full_attention_layers, ours.causal_layers) == (6, (), ())


@pytest.mark.parametrize("window", [0, 4])
def test_another_window_does_not_change_who_sees_whom(window, tmp_path):
    """A head learned which slots a slot sees; --window says how far back it reads."""
    for name, causal in {"dflash z-lab sliding": (0,), "dflash z-lab": ()}.items():
        variant = BLOCK_VARIANTS[name]
        variant.spell(variant.made, tmp_path / name)
        first, second = tmp_path / f"{name} first", tmp_path / f"{name} second"
        given = convert_drafter(str(tmp_path / name), first, window=window).config
        assert (given.sliding_window, given.causal_layers) == (window or None, causal)
        again = convert_drafter(str(first), second, window=3).config
        assert (again.sliding_window, again.causal_layers) == (3, causal)


def test_a_window_that_the_file_lacks_is_given(tmp_path):
    variant = BLOCK_VARIANTS["dflash z-lab sliding"]
    variant.spell(variant.made, tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": None}))
    with pytest.raises(DriftError, match="Say which: --window W"):
        convert_drafter(str(tmp_path / "head"), tmp_path / "out")
    given = convert_drafter(str(tmp_path / "head"), tmp_path / "out", window=6).config
    assert (given.sliding_window, given.causal_layers) == (6, (0,))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mask_token_id": VOCAB}, f"mask_token_id is {VOCAB}, outside the target's vocabulary"),
        ({"mask_token_id": None}, "lacks the key 'mask_token_id'"),
        ({"mask_token_id": -1}, "mask_token_id is -1; expected a token id"),
        ({"block_size": None}, "lacks the key 'block_size'"),
        ({"block_size": 9}, "speculative_tokens is 3 for a block_size of 9"),
        ({"sample_from_anchor": True}, "disagree on which position a slot predicts"),
        ({"aux_hidden_state_layer_ids": [3, 6]}, "expected 2 tap layers"),
        ({"aux_hidden_state_layer_ids": None}, "names no tap layers"),
        ({"draft_vocab_size": VOCAB}, "but lm_head.weight has 40 rows"),
        ({"attention_sink_bias": True}, "attention_sink_bias is True"),
    ],
)
def test_contradictions_are_told_in_one_line(more, message, tmp_path):
    speculators(block(reduced=True), tmp_path / "head", "dflash", BLOCK - 1)
    config = json.loads((tmp_path / "head" / "config.json").read_text()) | more
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DriftError, match=message) as refused:
        convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_two_names_of_a_mask_that_disagree(tmp_path):
    variant = BLOCK_VARIANTS["p-eagle vllm"]
    variant.spell(variant.made, tmp_path / "head")
    config = json.loads((tmp_path / "head" / "config.json").read_text()) | {"mask_token_id": 3}
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DriftError, match="mask_token_id and ptd_token_id disagree"):
        convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE, taps="output")


@pytest.mark.parametrize("name", ["p-eagle speculators", "dflash z-lab", "dspark modelopt"])
def test_a_missing_or_misshapen_tensor_is_named(name, tmp_path):
    variant = BLOCK_VARIANTS[name]
    variant.spell(variant.made, tmp_path / "head")
    file = tmp_path / "head" / "model.safetensors"
    tensors = load_file(file)
    for lost in tensors:
        if lost.endswith(("d2t", "t2d", "hidden_norm.weight", "lm_head.weight")):
            continue  # what may be missing, or makes it another kind of head
        for changed in ({}, {lost: np.zeros((3, 5, 2), np.float16)}):
            save_file({k: v for k, v in tensors.items() if k != lost} | changed, file)
            if not changed and lost.startswith(("layers.1.", "confidence", "markov", "mask_h")):
                continue
            with pytest.raises(DriftError) as refused:
                convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)
            assert "\n" not in str(refused.value)


def test_slots_are_overridden(tmp_path, model):
    z_lab(block("vanilla"), tmp_path / "head", nested={"projector_type": "dspark"})
    with pytest.raises(DriftError, match="--slots shifted or --slots unshifted"):
        inspect_drafter(str(tmp_path / "head"))
    for slots, drafts in (("shifted", BLOCK), ("unshifted", BLOCK - 1)):
        config = convert_drafter(str(tmp_path / "head"), tmp_path / slots, slots=slots).config
        assert (config.slots, config.provenance["slots"]) == (slots, "override")
        assert load_drafter(str(tmp_path / slots), model).max_drafts == drafts
    again = convert_drafter(str(tmp_path / "shifted"), tmp_path / "again", slots="unshifted").config
    assert (again.slots, again.provenance["slots"]) == ("unshifted", "override")


@pytest.mark.parametrize("kind", ["peagle", "dflash"])
def test_feedback_has_nothing_to_say(kind, tmp_path):
    made = p_eagle() if kind == "peagle" else block(reduced=True)
    speculators(Head(made.tensors, TAPS), tmp_path / "head", kind, BLOCK - 1)
    with pytest.raises(DriftError, match="feeds no state back; leave --feedback out"):
        convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE, feedback="pre")


@pytest.mark.parametrize("feedback", ["pre", "post"])
def test_nor_has_it_of_a_converted_head(feedback, tmp_path):
    speculators(Head(p_eagle().tensors, TAPS), tmp_path / "head", "peagle", BLOCK - 1)
    convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)
    with pytest.raises(DriftError, match=r"of the kind p-eagle, which has no .* --feedback out"):
        convert_drafter(str(tmp_path / "out"), tmp_path / "again", feedback=feedback)


def test_a_converted_head_can_be_probed(tmp_path):
    speculators(Head(p_eagle().tensors, TAPS), tmp_path / "head", "peagle", BLOCK - 1)
    convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)

    def probe(candidates):
        assert {one.config.feedback for one in candidates.values()} == {"pre"}
        return Verdict(None, "post", [])

    again = convert_drafter(str(tmp_path / "out"), tmp_path / "again", target=SHAPE, probe=probe)
    assert again.config.feedback == "pre"
    assert "probe" not in again.config.provenance.values()
