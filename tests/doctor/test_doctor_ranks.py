"""`doctor --ranks N`: what each machine would hold, by the cut of a real run."""

import json

import mlx.core as mx
import pytest

from families import BASE, CONFIGS
from mlx_drift.doctor import doctor
from mlx_drift.errors import DriftError

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
EMBEDDING, NORM = 128256 * 8192 * 2, 8192 * 2


def write(folder, name_or_config):
    config = name_or_config
    if isinstance(config, str):
        config = {**BASE, "model_type": config, "torch_dtype": "float32", **CONFIGS[config]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_rank_has_its_part_of_every_layer_and_the_rest_whole(tmp_path):
    found = doctor(write(tmp_path, LLAMA_70B), ranks=4)
    whole = 2 * EMBEDDING + NORM + 80 * 2 * NORM  # embedding, head and norms are on each
    part = whole + (found.memory.weights - whole) // 4
    assert [one.weights for one in found.ranks] == [part] * 4
    assert [one.caches for one in found.ranks] == [found.memory.caches // 4] * 4
    assert found.ranks[0].total == part + found.memory.caches // 4
    assert not found.refused


def test_a_pipeline_gives_each_rank_layers(tmp_path):
    model = write(tmp_path, "qwen3_moe")  # of four layers two are dense, which come first
    first, last = doctor(model, ranks=2, pipeline=True).ranks
    whole = doctor(model).memory
    assert first.caches == last.caches == whole.caches // 2
    embeddings = 2 * 64 * 64 * 4 + 64 * 4
    assert first.weights + last.weights == whole.weights + embeddings
    assert first.weights != last.weights


def test_a_cache_that_is_not_cut_is_told_whole(tmp_path):
    model = write(tmp_path, "deepseek_v3")  # keys and values come from one latent row
    found = doctor(model, ranks=2)
    assert [one.caches for one in found.ranks] == [found.memory.caches] * 2
    assert all(one.weights < found.memory.weights for one in found.ranks)


@pytest.mark.parametrize(
    ("name", "ranks", "pipeline", "line"),
    [
        ("llama", 3, False, "cannot be cut over 3 ranks"),
        ("llama", 2, True, "leave --pipeline out"),
        ("qwen3_moe", 9, True, "4 layers, which do not go round 9 ranks"),
        ("gemma2", 2, False, "run it on one"),
    ],
)
def test_what_cannot_be_cut_is_refused(tmp_path, name, ranks, pipeline, line):
    found = doctor(write(tmp_path, name), ranks=ranks, pipeline=pipeline)
    assert line in found.refused[0]
    assert found.ranks == []


def test_collectives_are_mlx_own_afterwards(tmp_path):
    before = mx.distributed.all_sum
    doctor(write(tmp_path, "llama"), ranks=2)
    assert mx.distributed.all_sum is before


@pytest.mark.parametrize(("ranks", "pipeline"), [(0, False), (1, True)])
def test_a_number_of_ranks_that_makes_no_sense_is_refused(tmp_path, ranks, pipeline):
    with pytest.raises(DriftError, match=f"ranks is {ranks}; expected at least 1"):
        doctor(write(tmp_path, "llama"), ranks=ranks, pipeline=pipeline)
