"""RoPE in every spelling that checkpoints have it in, and which of two that disagree is taken."""

import json

import mlx.core as mx
import pytest

from checkpoints import specforge_config, specforge_tensors, write_checkpoint
from mlx_drift import DriftError, convert_drafter, load_drafter
from tiny import tiny_llama

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WITHOUT = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}


def convert(tmp_path, name="out", override=None, **config):
    config = specforge_config(norm_output=None, **config)
    source = write_checkpoint(tmp_path / f"{name} source", specforge_tensors(), config)
    return convert_drafter(str(source), tmp_path / name, rope_theta=override)


def told(done):
    """The notes, but for what SpecForge did with another theta than 10000."""
    return [note for note in done.notes if "pull request 270" not in note]


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | LLAMA3},
        {
            "rope_theta": None,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3,
        },
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "llama3"} | WITHOUT,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3,
        },
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "llama3"} | LLAMA3,
            "rope_parameters": {"rope_type": "llama3"} | WITHOUT,
        },
        {
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3"} | WITHOUT,
            "original_max_position_embeddings": 8192,
        },
        {
            "rope_theta": None,
            "rope_scaling": {"type": "llama3", "rope_theta": 5e5} | WITHOUT,
            "max_position_embeddings": 8192,
        },
    ],
)
def test_one_rope_in_many_spellings(tmp_path, spelling):
    done = convert(tmp_path, **spelling)
    assert done.config.rope_theta == 5e5
    assert done.config.rope_scaling == {"rope_type": "llama3"} | LLAMA3
    assert done.unknown_keys == told(done) == []


def test_the_length_beside_a_scaling_wins_over_the_one_inside(tmp_path):
    """As in transformers, whose Phi-3 has it there."""
    scaling = {"rope_type": "llama3"} | LLAMA3
    done = convert(tmp_path, rope_scaling=scaling, original_max_position_embeddings=4096)
    assert done.config.rope_scaling["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 1000000, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {
            "rope_theta": 1e6,
            "rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"type": "linear", "rope_type": "linear", "factor": 2.0},
        },
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": None}},
    ],
)
def test_spellings_that_agree(tmp_path, spelling):
    done = convert(tmp_path, **spelling)
    assert done.config.rope_theta == 1e6
    assert done.config.provenance["rope_theta"] == "file"
    assert done.unknown_keys == told(done) == []


CONTRADICTIONS = [
    (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e7}},
        "file: rope_parameters.rope_theta",
    ),
    (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1e7}},
        "file: rope_scaling.rope_theta",
    ),
    (
        {
            "rope_theta": 1e7,
            "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1e4},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e7},
        },
        "file: rope_parameters.rope_theta",
    ),
    (
        {
            "rope_theta": 5e5,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e7},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e7},
            },
        },
        "file: rope_parameters.rope_theta",
    ),
]


@pytest.mark.parametrize(("config", "origin"), CONTRADICTIONS)
def test_the_newest_theta_wins_and_both_are_named(tmp_path, config, origin):
    done = convert(tmp_path, **config)
    assert done.config.rope_theta == 1e7
    assert done.config.provenance["rope_theta"] == origin
    (note,) = told(done)
    assert note.startswith(f"{origin.removeprefix('file: ')} is 10000000.0 and ")
    assert "10000.0" in note or "500000.0" in note
    assert "--rope-theta" in note
    # The user's choice needs no note.
    chosen = convert(tmp_path, "chosen", 2e4, **config)
    assert (chosen.config.rope_theta, told(chosen)) == (2e4, [])
    assert chosen.config.provenance["rope_theta"] == "override"


def test_a_plain_rope_beside_a_scaled_one(tmp_path):
    linear = {"rope_type": "linear", "factor": 2.0}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    for name, config in (
        ("newer", {"rope_scaling": {"type": "default"}, "rope_parameters": linear}),
        ("older", {"rope_scaling": linear, "rope_parameters": plain}),
    ):
        done = convert(tmp_path, name, **config)
        assert done.config.rope_scaling == linear
        (note,) = told(done)
        assert "'default'" in note
        assert "'linear' is taken" in note


@pytest.mark.parametrize(
    ("newer", "key"),
    [({"rope_type": "linear", "factor": 4.0}, "factor"), ({"rope_type": "yarn"}, "rope_type")],
)
def test_scalings_that_contradict_each_other_are_refused(tmp_path, newer, key):
    older = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(DriftError, match=f"rope_scaling and rope_parameters disagree on {key}"):
        convert(tmp_path, rope_scaling=older, rope_parameters=newer)


def test_keys_that_nothing_reads_are_named(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "truncate": False}
    assert convert(tmp_path, rope_scaling=scaling).unknown_keys == ["rope_scaling.truncate"]
    done = convert(tmp_path, "length", original_max_position_embeddings=64)  # of no scaling
    assert done.unknown_keys == ["original_max_position_embeddings"]


KINDS = [
    None,
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3"} | LLAMA3,
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
    {"rope_type": "mrope", "mrope_section": [2, 1, 1]},
]


@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("scaling", KINDS, ids=lambda scaling: (scaling or {}).get("rope_type"))
def test_every_kind_runs_and_rotates_its_part(tmp_path, scaling, part):
    if scaling and "short_factor" in scaling:
        factors = {key: scaling[key][: int(4 * part)] for key in ("short_factor", "long_factor")}
        scaling = scaling | factors
    done = convert(tmp_path, rope_scaling=scaling, partial_rotary_factor=part)
    assert done.unknown_keys == []
    drafter = load_drafter(str(tmp_path / "out"), tiny_llama())
    cache = drafter.make_cache()
    drafter.ingest(mx.array([1, 2, 3]), mx.ones((3, 3, 32)), cache)
    assert drafter.propose(4, cache).tokens.size == 4
    assert mx.isfinite(cache.recycled).all().item()
    heads = mx.random.normal((1, 4, 3, 8))
    moved = (drafter.network.layers[0].self_attn.rope(heads, offset=5) != heads).any(axis=(0, 1, 2))
    assert moved.tolist() == [True] * int(8 * part) + [False] * int(8 * (1 - part))


@pytest.mark.parametrize(
    "config",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_theta": None, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}},
        {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
        {
            "rope_parameters": {
                "rope_type": "default",
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 0],
                "mrope_interleaved": True,
            }
        },
    ],
    ids=["beside", "rope_parameters", "rope_scaling", "mrope"],
)
def test_a_part_of_each_head_in_any_spelling(tmp_path, config):
    done = convert(tmp_path, **config)
    assert done.config.partial_rotary_factor == 0.5
    assert done.config.provenance["partial_rotary_factor"] == "file"
    assert done.unknown_keys == []
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["partial_rotary_factor"] == 0.5
    assert done.notes[-1].startswith("partial_rotary_factor is 0.5: so much of each head")


def test_parts_that_contradict_each_other(tmp_path):
    parameters = {"rope_type": "default", "partial_rotary_factor": 0.5}
    done = convert(tmp_path, rope_parameters=parameters, partial_rotary_factor=0.25)
    assert done.config.partial_rotary_factor == 0.5
    assert done.config.provenance["partial_rotary_factor"].startswith("file: rope_parameters")
    assert (
        "rope_parameters.partial_rotary_factor is 0.5 and partial_rotary_factor is 0.25"
        in (done.notes[0])
    )
