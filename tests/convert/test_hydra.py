"""Hydra heads: every kind in the form its trainer saves, and what is refused of them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dialects import LAYERS
from hydra_heads import ARCHITECTURES, BASE, DRAFTS, hydra, write_hydra
from mlx_drift import DriftError, convert_drafter, load_drafter
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.generate import generate
from mlx_drift.target.model import TargetShape
from tiny import HIDDEN, VOCAB, NoText, tiny_llama

SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
PROMPT = [5, 9, 2, 44, 17]
LEFT_OUT = ("input_embed_fn.weight", "prefix_embeding_layer.embed_tokens.weight")


@pytest.fixture
def base(tmp_path):
    """The target's folder: its config is all that is looked at."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(BASE))
    return str(tmp_path / "base")


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_tensor_has_its_place(kind, form, base, tmp_path):
    write_hydra(kind, tmp_path / "heads", form)
    done = convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=base, strict=True)
    assert done.dialect == f"Hydra ({kind})"
    assert done.config.taps == (LAYERS + 1,)
    if kind != "eagle-attn":
        assert (done.config.num_heads, done.config.num_blocks) == (DRAFTS, 2)
    given = [tensor for name, tensor in hydra(kind).items() if name not in LEFT_OUT]
    written = read_safetensors(tmp_path / "out" / "model.safetensors")

    def key(tensor):
        return tensor.shape, tensor.astype(np.float32).sum().item()

    assert sorted(map(key, given)) == sorted(key(np.array(t)) for t in written.values())
    model = tiny_llama(num_hidden_layers=LAYERS)
    drafter = load_drafter(str(tmp_path / "out"), model)
    text = generate(model, NoText(), PROMPT, drafter=drafter, max_tokens=12, num_draft_tokens=8)
    assert text == generate(model, NoText(), PROMPT, drafter=None, max_tokens=12)


def test_their_count_is_the_files(base, tmp_path):
    write_hydra("mlp", tmp_path / "heads", hydra_num_heads=7)
    done = convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=base, strict=True)
    assert done.config.num_heads == DRAFTS
    assert any("hydra_num_heads is 7, the file has 3 heads" in note for note in done.notes)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_missing_or_misshapen_tensor_is_named(kind, base, tmp_path):
    write_hydra(kind, tmp_path / "heads")
    file = tmp_path / "heads" / "model.safetensors"
    tensors = load_file(file)
    for n, lost in enumerate(tensors.keys() - {*LEFT_OUT}):
        for changed in ({}, {lost: np.zeros((3, 5, 2), np.float16)}):
            save_file({k: v for k, v in tensors.items() if k != lost} | changed, file)
            with pytest.raises(DriftError) as told:
                convert_drafter(str(tmp_path / "heads"), tmp_path / f"out {n}", target=base)
            assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"hidden_state_offset": LAYERS + 1}, "hidden_state_offset is 13"),
        ({"hidden_state_offset": "1"}, "hidden_state_offset is '1'"),
        ({"num_attention_heads": 3}, "num_key_value_heads"),
        ({"hydra_head_arch": "cross-attn"}, "Hydra head of the cross-attn kind"),
    ],
)
def test_contradictions_are_told_in_one_line(more, told, base, tmp_path):
    write_hydra("prefix-mlp", tmp_path / "heads", **more)
    with pytest.raises(DriftError, match=told) as refused:
        convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=base)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["prefix-mlp", "eagle-attn"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
    ],
)
def test_the_layer_has_the_rope_of_the_base_model(kind, rope, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(BASE | rope))
    write_hydra(kind, tmp_path / "heads")
    base = str(tmp_path / "base")
    config = convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=base).config
    assert (config.rope_theta, config.rope_scaling["factor"]) == (5e5, 2.0)
    for key in ("rope_theta", "rope_scaling", "num_attention_heads"):
        assert "base model" in config.provenance[key]


def test_heads_that_read_no_drafts_are_refused(base, tmp_path):
    write_hydra("mlp", tmp_path / "heads")
    file = tmp_path / "heads" / "model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "res_connection" not in k}, file)
    with pytest.raises(DriftError, match="grounded_heads is false"):
        convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=base)


@pytest.mark.parametrize(("flag", "value"), [("rope_theta", 1e4), ("window", 8)])
def test_heads_without_layers_have_no_rope_and_no_window(flag, value, base, tmp_path):
    write_hydra("mlp", tmp_path / "heads")
    with pytest.raises(DriftError, match=f"leave --{flag.replace('_', '-')} out"):
        convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=base, **{flag: value})


def test_heads_are_quantized_as_the_targets(tmp_path):
    write_hydra("mlp", tmp_path / "heads")
    convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=SHAPE)
    target = tiny_llama(num_hidden_layers=LAYERS, bits=8)
    drafter = load_drafter(str(tmp_path / "out"), target)
    assert all(head.lm_head.bits == 8 for head in drafter.network.heads)
    text = generate(target, NoText(), PROMPT, drafter=drafter, max_tokens=12, num_draft_tokens=3)
    assert text == generate(target, NoText(), PROMPT, drafter=None, max_tokens=12)
