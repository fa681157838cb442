"""`bench --shape`: pairs of random weights at real shapes, built small."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_drift.errors import DriftError
from mlx_drift.measure.speed import shapes
from mlx_drift.measure.speed.shape_costs import shape_costs
from mlx_drift.measure.speed.shapes import SHAPES, Shape, random_pair

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "num_experts": 8,
    "num_local_experts": 8,
    "moe_intermediate_size": 64,
}


@pytest.fixture
def small(monkeypatch):
    """Makes every shape small, its family and layers kept."""
    for name, shape in SHAPES.items():
        config = {k: SMALL.get(k, value) for k, value in shape.config.items()}
        monkeypatch.setitem(SHAPES, name, Shape(config, 128, draft_vocab_size=200))


@pytest.mark.parametrize("name", SHAPES)
def test_a_pair_of_every_shape_runs(name, small):
    pair = random_pair(name, layers=4, dtype=mx.float32)
    found = shape_costs(name, pair, target_bits=4, lengths=(2,), context=5, turns=1)
    assert [length.num_draft_tokens for length in found.lengths] == [2]
    for length in found.lengths:
        assert length.plain_steps == pytest.approx(length.cost.seconds / found.plain_step_seconds)
        assert list(length.speedups) == [0.5, 0.6, 0.7, 0.8]
        assert min(length.efficiency) > 0
        assert min(length.choosing) > 0
    assert json.loads(json.dumps(found.to_dict()))["shape"] == name


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_are_of_a_trained_models_size(name, bits, small):
    pair = random_pair(name, layers=4, bits=bits, dtype=mx.float32)
    logits = pair.model(mx.array([[1, 2, 3]]))
    assert 0.2 < logits.std().item() < 5
    dtypes = {array.dtype for _, array in tree_flatten(pair.model.parameters())}
    assert dtypes == ({mx.float32} if bits == 16 else {mx.float32, mx.uint32})


def test_what_is_quantized_is_never_there_unquantized(small, monkeypatch):
    """All arrays are made one by one, none of more bytes than the largest there is."""
    made = []
    evaluate = mx.eval

    def spy(*arrays):
        made.extend(array.nbytes for array in arrays if isinstance(array, mx.array))
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", spy)
    pair = random_pair("Qwen3-8B", layers=2, dtype=mx.float32)
    assert max(made) == max(
        array.nbytes
        for module in (pair.model, pair.drafter.network)
        for _, array in tree_flatten(module.parameters())
    )
    assert pair.target_bytes == sum(a.nbytes for _, a in tree_flatten(pair.model.parameters()))


def test_sizes_of_published_models(monkeypatch):
    """The targets' parameters, as their cards count them, and the heads': nothing is evaluated."""
    for name, billions in {
        "Llama-3.2-1B": 1.24,
        "Llama-3.1-8B": 8.03,
        "Llama-3.3-70B": 70.6,
        "Qwen3-4B": 4.02,
        "Qwen3-8B": 8.19,
        "Qwen3-32B": 32.8,
        "Qwen3-30B-A3B": 30.5,
        "gpt-oss-20b": 20.9,
    }.items():
        model = shapes._build_model(SHAPES[name].config, shapes.UNQUANTIZED, mx.bfloat16)
        assert shapes.nbytes_of(model) / 2e9 == pytest.approx(billions, rel=0.01), name


def test_refusals(small, monkeypatch):
    for message, keywords in {
        "the shape GPT-9 is unknown; there are Llama-3.2-1B": {"name": "GPT-9"},
        "layers is 1": {"layers": 1},
        "layers is 99": {"layers": 99},
        "cannot be quantized to 7 bits": {"bits": 7},
        "drafter cannot be quantized to 7 bits": {"drafter_bits": 7},
    }.items():
        with pytest.raises(DriftError, match=message):
            random_pair(**{"name": "Qwen3-8B", **keywords})
    monkeypatch.setattr(shapes, "machine_memory", lambda: 1000)
    with pytest.raises(DriftError, match=r"takes 0\.0 GB, and 0\.0 GB are there.*fewer --layers"):
        random_pair("Qwen3-8B", layers=2)


def test_the_command(cli, refuses, small, monkeypatch):
    monkeypatch.setattr("mlx_drift.cli.bench.TURNS", 1)
    arguments = ("bench", "--shape", "Qwen3-8B", "--layers", 2, "--num-draft-tokens", 2)
    code, out, err = cli(*arguments, "--context", 4, "--acceptance", "0.5,0.9", "--temp", 0.7)
    assert (code, err) == (0, "")
    assert "a=0.9" in out
    assert max(map(len, out.splitlines())) <= 100
    told = json.loads(cli(*arguments, "--dequantize", "--drafter-bits", 4, "--json")[1])
    assert (told["target_bits"], told["drafter_bits"], told["layers"]) == (16, 4, 2)
    refuses("context is 1", *arguments, "--context", 1)
    refuses("cannot be quantized to 0 bits", *arguments, "--target-bits", 0)
    refuses("acceptance is 1.5", *arguments, "--acceptance", "1.5")
    refuses("--acceptance is many", *arguments, "--acceptance", "many")
    refuses("--shape measures fixed", *arguments, "--num-draft-tokens", "auto")
