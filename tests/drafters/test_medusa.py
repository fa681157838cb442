"""Medusa heads: their equations, every spelling of them, and what is refused."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from dialects import LAYERS, write
from medusa_heads import CONFIGS, HEADS, medusa, write_medusa
from mlx_drift import DriftError, convert_drafter, load_drafter
from mlx_drift.demo import TARGET
from mlx_drift.doctor import doctor
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.generate import generate
from mlx_drift.target.model import TargetShape
from tiny import HIDDEN, VOCAB, NoText, tiny_llama

SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
PROMPT = [5, 9, 2, 44, 17]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=LAYERS)


SPELT = [
    *((spelling, blocks, False) for spelling in CONFIGS for blocks in (0, 1, 2)),
    ("vllm", 1, True),
]


@pytest.mark.parametrize(("spelling", "blocks", "reduced"), SPELT)
def test_is_the_same_head(spelling, blocks, reduced, tmp_path, model):
    made = medusa(blocks, reduced=reduced)
    write_medusa(made, tmp_path / "heads", spelling)
    done = convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=SHAPE, strict=True)
    assert done.dialect == "Medusa"
    assert done.config.taps == (LAYERS + 1,)
    assert (done.config.num_heads, done.config.num_blocks) == (HEADS, blocks)
    assert any("the file has 3 heads" in note for note in done.notes) == (
        spelling == "fasterdecoding"
    )
    assert any("fit that model alone" in note for note in done.notes) == (spelling == "model")
    tensors = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == made.tensors.keys()
    for name, expected in made.tensors.items():
        assert mx.array_equal(tensors[name], mx.array(expected)), name
    drafter = load_drafter(str(tmp_path / "out"), model)
    text = generate(model, NoText(), PROMPT, drafter=drafter, max_tokens=12, num_draft_tokens=8)
    assert text == generate(model, NoText(), PROMPT, drafter=None, max_tokens=12)


@pytest.mark.torch
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_drafts_are_what_torch_computes(blocks, tmp_path, model):
    """Against an independent writing: FasterDecoding's equations, one head after another."""
    import torch
    from torch.nn import functional

    made = medusa(blocks)
    write_medusa(made, tmp_path / "heads", "tensorrt")
    convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=SHAPE)
    drafter = load_drafter(str(tmp_path / "out"), model)
    given = {name: torch.from_numpy(t.astype(np.float32)) for name, t in made.tensors.items()}
    taps = mx.random.normal((4, 1, HIDDEN), key=mx.random.key(2))
    cache = drafter.make_cache()
    drafter.ingest(mx.arange(4), taps, cache)
    expected = []
    for i in range(HEADS):
        x = torch.from_numpy(np.array(taps))[-1:, 0]
        for j in range(blocks):
            block = f"heads.{i}.blocks.{j}"
            x = x + functional.silu(x @ given[f"{block}.weight"].T + given[f"{block}.bias"])
        expected.append(x @ given[f"heads.{i}.lm_head.weight"].T)
    logits = np.array(drafter.network(cache.seed, HEADS))
    np.testing.assert_allclose(logits, torch.cat(expected).numpy(), rtol=0, atol=2e-4)
    for k in range(1, HEADS + 3):
        drafts = torch.cat(expected)[: min(k, HEADS)].argmax(-1)
        assert drafter.propose(k, cache).tokens.tolist() == drafts.tolist()


def test_heads_are_quantized_as_the_targets(tmp_path):
    write_medusa(medusa(), tmp_path / "heads", "vllm")
    convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=SHAPE)
    target = tiny_llama(num_hidden_layers=LAYERS, bits=8)
    drafter = load_drafter(str(tmp_path / "out"), target)
    for part in drafter.network.heads:
        assert (part.lm_head.bits, part.lm_head.group_size) == (8, 32)
        assert type(part.blocks[0]) is nn.Linear
    text = generate(target, NoText(), PROMPT, drafter=drafter, max_tokens=12, num_draft_tokens=3)
    assert text == generate(target, NoText(), PROMPT, drafter=None, max_tokens=12)


def test_without_a_target_the_tap_is_undecided(tmp_path):
    write_medusa(medusa(), tmp_path / "heads", "modelopt")
    with pytest.raises(DriftError, match="Give the target: --target"):
        convert_drafter(str(tmp_path / "heads"), tmp_path / "out")
    with pytest.raises(DriftError, match="leave --feedback out"):
        convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=SHAPE, feedback="pre")


@pytest.mark.parametrize("spelling", ["fasterdecoding", "vllm", "model"])
def test_a_missing_or_misshapen_tensor_is_named(spelling, tmp_path):
    write_medusa(medusa(2), tmp_path / "heads", spelling)
    file = tmp_path / "heads" / "model.safetensors"
    tensors = load_file(file)
    refused = 0
    for n, lost in enumerate(tensors):
        if spelling == "model" and "medusa" not in lost:
            continue
        for changed in ({}, {lost: np.zeros((3, 5, 2), np.float16)}):
            save_file({k: v for k, v in tensors.items() if k != lost} | changed, file)
            with pytest.raises(DriftError) as told:
                convert_drafter(str(tmp_path / "heads"), tmp_path / f"out {n}", target=SHAPE)
            assert "\n" not in str(told.value)
            refused += 1
    assert refused == 2 * HEADS * 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"original_lm_head": True}, "original_lm_head is True"),
        ({"logit_scale": 2.0}, "logit_scale is 2.0"),
        ({"hidden_size": 99}, "hidden_size is 99, but the heads read 32"),
        ({"vocab_size": -3}, "expected a positive whole number"),
    ],
)
def test_contradictions_are_told_in_one_line(more, message, tmp_path):
    write_medusa(medusa(), tmp_path / "heads", "vllm")
    config = json.loads((tmp_path / "heads" / "config.json").read_text()) | more
    (tmp_path / "heads" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DriftError, match=message) as refused:
        convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=SHAPE)
    assert "\n" not in str(refused.value)


def test_the_doctor_knows_that_they_look_back_at_nothing(tmp_path):
    tensors, rng = {}, np.random.default_rng(0)
    for i in range(2):
        tensors[f"{i}.0.linear.weight"] = rng.normal(size=(256, 256)).astype(np.float16)
        tensors[f"{i}.0.linear.bias"] = rng.normal(size=256).astype(np.float16)
        tensors[f"{i}.1.weight"] = rng.normal(size=(4096, 256)).astype(np.float16)
    write(tmp_path / "heads", {"medusa_num_heads": 2}, tensors)
    convert_drafter(str(tmp_path / "heads"), tmp_path / "out", target=str(TARGET))
    facts = doctor(str(TARGET), drafter=str(tmp_path / "out")).drafter
    assert (facts.drafter_type, facts.window, facts.caches) == ("medusa", None, [])
    model, _ = mlx_lm.load(str(TARGET))
    network = load_drafter(str(tmp_path / "out"), model).network
    assert facts.nbytes == sum(array.nbytes for _, array in tree_flatten(network.parameters()))
