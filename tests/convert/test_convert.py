"""Conversion: canonical, strict, resolved with provenance, reproducible."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import DRAFT_VOCAB, specforge_config, specforge_tensors, write_checkpoint
from mlx_drift import DriftError, convert_drafter, load_drafter
from mlx_drift.demo import DEMO
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.target.model import TargetShape
from tiny import LAYERS, VOCAB, tiny_llama

BIN = Path(__file__).parents[1] / "data" / "eagle3.1-bin"
QUERIES = "midlayer.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", specforge_tensors())


def convert(source, out, **keywords):
    return convert_drafter(str(source), out, **keywords)


def test_tensors_are_canonical_and_unchanged(source, tmp_path):
    convert(source, tmp_path / "out")
    converted = load_file(tmp_path / "out" / "model.safetensors")
    expected = specforge_tensors()
    del expected["t2d"]
    assert converted.keys() == {n.replace("midlayer.", "layers.0.") for n in expected}
    for name, tensor in expected.items():
        got = converted[name.replace("midlayer.", "layers.0.")]
        assert got.dtype == tensor.dtype
        assert np.array_equal(got, tensor)


def test_conventions_are_resolved(source, tmp_path):
    resolved = convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["taps"] == [2, 3, 4]  # SpecForge's ids are outputs
    assert config["feedback"] == "post"
    assert config["fc_norm"] is True
    assert config["norm_before_fc"] is False
    assert config["norm_before_residual"] is False
    assert config["rope_theta"] == 10000.0
    assert config["sliding_window"] is None
    assert config["draft_vocab_size"] == DRAFT_VOCAB
    assert config["source"]["file"] == "model.safetensors"
    assert len(config["source"]["sha256"]) == 64
    assert config["provenance"]["norm_before_residual"] == "default"
    assert config["provenance"]["feedback"] == "file"
    assert "output of layer" in config["provenance"]["taps"]
    assert resolved.unknown_keys == []


def test_converting_twice_gives_identical_bytes(source, tmp_path):
    for name in ("a", "b"):
        convert(source, tmp_path / name / "out")
    for file in ("model.safetensors", "config.json", "README.md"):
        a, b = ((tmp_path / name / "out" / file).read_bytes() for name in ("a", "b"))
        assert a == b


def test_reloads_without_the_source(source, tmp_path):
    convert(source, tmp_path / "out")
    for file in source.iterdir():
        file.unlink()
    drafter = load_drafter(str(tmp_path / "out"), tiny_llama())
    cache = drafter.make_cache()
    drafter.ingest(mx.array([1, 2]), mx.zeros((2, 3, 32)), cache)
    drafted = drafter.propose(4, cache).tokens.tolist()
    used = np.flatnonzero(specforge_tensors()["t2d"])
    assert set(drafted) <= set(used.tolist())  # mapped into the target's vocabulary


def test_floats_follow_the_target(source, tmp_path):
    convert(source, tmp_path / "out")
    drafter = load_drafter(str(tmp_path / "out"), tiny_llama(mx.bfloat16))
    cache = drafter.make_cache()
    drafter.ingest(mx.array([1]), mx.zeros((1, 3, 32), mx.bfloat16), cache)
    assert cache.recycled.dtype == cache.draft_logits.dtype == mx.bfloat16


def test_bin_gives_the_tensors_that_safetensors_gave(tmp_path):
    """The shipped drafter was converted from the safetensors form of the same head."""
    convert(BIN, tmp_path / "out")
    shipped = read_safetensors(DEMO / "eagle3.1" / "model.safetensors")
    converted = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == shipped.keys()
    for name, tensor in converted.items():
        assert tensor.dtype == shipped[name].dtype
        assert mx.array_equal(tensor, shipped[name])


@pytest.mark.torch
def test_bin_written_by_torch(source, tmp_path):
    import torch

    tensors = {name: torch.from_numpy(t) for name, t in specforge_tensors().items()}
    (tmp_path / "bin").mkdir()
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_text((source / "config.json").read_text())
    convert(source, tmp_path / "from_safetensors")
    convert(tmp_path / "bin", tmp_path / "from_bin")
    files = [tmp_path / f"from_{kind}" / "model.safetensors" for kind in ("safetensors", "bin")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_weights_file_is_a_source(source, tmp_path):
    convert(source / "model.safetensors", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_quantizes_linears_only(source, tmp_path):
    convert(source, tmp_path / "out", quantize=True, q_bits=4, q_group_size=32, dtype="float32")
    converted = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert converted["fc.weight"].dtype == mx.uint32
    assert converted["fc_norm.0.weight"].dtype == mx.float32
    drafter = load_drafter(str(tmp_path / "out"), tiny_llama())
    cache = drafter.make_cache()
    drafter.ingest(mx.array([1]), mx.ones((1, 3, 32)), cache)
    assert drafter.propose(3, cache).tokens.size == 3


def write_target_config(folder, **changes):
    folder.mkdir()
    config = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": LAYERS} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_taps_without_ids_depend_on_the_target(tmp_path):
    config = specforge_config(eagle_config=None)
    source = write_checkpoint(tmp_path / "source", specforge_tensors(), config)
    with pytest.raises(DriftError, match=r"number of layers. Give the target: --target MODEL"):
        convert(source, tmp_path / "out")
    target = write_target_config(tmp_path / "target", num_hidden_layers=10)
    resolved = convert(source, tmp_path / "out", target=str(target))
    assert resolved.config.taps == (2, 5, 7)
    assert resolved.config.target.num_layers == 10


@pytest.mark.parametrize(
    ("ids", "override", "taps"),
    [
        ([1, 3, 5], None, (2, 4, 6)),  # output: the first is 1
        ([0, 3, 5], None, (0, 3, 5)),  # input: nothing comes out before layer 0
        ([2, 5, 7], None, (2, 5, 7)),  # input: the default of EAGLE-3 for 10 layers
        ([3, 6, 10], None, (3, 6, 10)),  # input: the end of the last of 10 layers
        ([3, 6, 8], None, (4, 7, 9)),  # SpecForge writes outputs
        ([3, 6, 8], "input", (3, 6, 8)),
    ],
)
def test_tap_conventions(tmp_path, ids, override, taps):
    config = specforge_config(
        eagle_config={"eagle_aux_hidden_state_layer_ids": ids}, target_num_hidden_layers=10
    )
    source = write_checkpoint(tmp_path / "source", specforge_tensors(), config)
    assert convert(source, tmp_path / "out", taps=override).config.taps == taps


@pytest.mark.parametrize("ids", [[2, 18, 33], [24, 30, 36]])
def test_taps_that_depend_on_the_number_of_layers_are_not_guessed(tmp_path, ids):
    """Defaults and ends of a 36-layer target: inputs, though SpecForge writes outputs."""
    config = specforge_config(eagle_config={"eagle_aux_hidden_state_layer_ids": ids})
    source = write_checkpoint(tmp_path / "source", specforge_tensors(), config)
    with pytest.raises(DriftError, match=r"--taps input or --taps output.*--target MODEL"):
        convert(source, tmp_path / "out")
    target = write_target_config(tmp_path / "target", num_hidden_layers=36)
    assert convert(source, tmp_path / "out", target=str(target)).config.taps == tuple(ids)


def test_head_dim_comes_from_the_tensors_where_the_config_lacks_it(tmp_path):
    config = specforge_config(head_dim=None, num_attention_heads=2, num_key_value_heads=1)
    source = write_checkpoint(tmp_path / "source", specforge_tensors(), config)
    assert convert(source, tmp_path / "out").config.head_dim == 16


def test_feedback_can_be_overridden(source, tmp_path):
    config = convert(source, tmp_path / "out", feedback="pre").config
    assert config.feedback == "pre"
    assert config.provenance["feedback"] == "override"


OVERRIDES = {"feedback": "post", "rope_theta": 5e4, "window": 16, "slots": "shifted"}
"""By what they say of a drafter; which kinds have no such thing."""

HAVE_NONE = {
    "eagle3.1": {"slots"},
    "mtp": {"rope_theta", "slots"},
    "dflash": {"feedback"},
    "medusa": {"feedback", "rope_theta", "window", "slots"},
}


@pytest.mark.parametrize("kind", HAVE_NONE)
@pytest.mark.parametrize("flag", OVERRIDES)
def test_no_override_is_ignored(kind, flag, tmp_path):
    given = {flag: OVERRIDES[flag]}
    if flag in HAVE_NONE[kind]:
        with pytest.raises(DriftError, match=f"leave --{flag.replace('_', '-')} out"):
            convert(DEMO / kind, tmp_path / "out", **given)
        return
    config = convert(DEMO / kind, tmp_path / "out", **given).config
    field = "sliding_window" if flag == "window" else flag
    assert getattr(config, field) == OVERRIDES[flag]
    assert config.provenance[field] == "override"


def test_an_eagle_3_checkpoint_has_no_slots(source, tmp_path):
    with pytest.raises(DriftError, match="of the kind eagle3, which has no such thing; leave --sl"):
        convert(source, tmp_path / "out", slots="shifted")


def test_absolute_d2t_is_put_right(tmp_path):
    tensors = specforge_tensors()
    offsets = tensors["d2t"].copy()
    tensors["d2t"] = tensors["d2t"] + np.arange(DRAFT_VOCAB)
    source = write_checkpoint(tmp_path / "source", tensors)
    convert(source, tmp_path / "out")
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(converted["d2t"], offsets)


def test_unknown_config_keys_are_named(tmp_path):
    config = specforge_config(gated_attention=True, bos_token_id=1)
    source = write_checkpoint(tmp_path / "source", specforge_tensors(), config)
    assert convert(source, tmp_path / "out").unknown_keys == ["gated_attention"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"midlayer.gate": t["norm.weight"]}), "has the tensor layers.0.gate"),
        (lambda t: t.pop("norm.weight"), "lacks the tensor norm.weight"),
        (lambda t: t.update({"norm.weight": t["d2t"]}), "norm.weight has shape"),
        (lambda t: t.pop("fc_norm.0.weight"), "fc_norm is True, but the weights have no"),
        (
            lambda t: t.pop("midlayer.hidden_norm.weight"),
            "not a drafter of a layout this version reads",
        ),
        (lambda t: (t.pop("d2t"), t.pop("t2d")), "lacks d2t"),
        (lambda t: t.update(d2t=t["d2t"] + 1), "d2t and t2d disagree"),
        (lambda t: (t.pop("t2d"), t.update(d2t=t["d2t"] + 30)), "outside the target's vocabulary"),
        (lambda t: t.update({"layers.0.hidden_norm.weight": t["norm.weight"]}), "both mean"),
        (lambda t: t.pop("lm_head.weight"), "draft_vocab_size is 40"),
        (lambda t: t.update({"fc.weight": t["norm.weight"]}), "fc.weight has shape"),
        (lambda t: t.update({QUERIES: t[QUERIES][1:]}), "q_proj.weight has shape"),
    ],
)
def test_refuses_tensors_that_do_not_fit(tmp_path, change, message):
    tensors = specforge_tensors()
    change(tensors)
    source = write_checkpoint(tmp_path / "source", tensors)
    with pytest.raises(DriftError, match=message):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refuses_a_gate_that_the_config_denies(tmp_path):
    tensors = specforge_tensors()
    tensors[QUERIES] = np.repeat(tensors[QUERIES], 2, axis=0)
    source = write_checkpoint(
        tmp_path / "source", tensors, specforge_config(attn_output_gate=False)
    )
    with pytest.raises(DriftError, match="attn_output_gate is False"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks the key 'hidden_size'"),
        ({"hidden_size": 30}, "fc.weight has shape"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}}, "names 2 tap layers"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [3, 1, 2]}}, "ascending order"),
        ({"draft_vocab_size": 41}, "draft_vocab_size is 41"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "RoPE of the kind 'spiral' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected a JSON object"),
        ({"partial_rotary_factor": 0.1}, "partial_rotary_factor is 0.1 of a head_dim of 8"),
        ({"partial_rotary_factor": 0.4}, "an even number of dimensions"),
        ({"partial_rotary_factor": 1.5}, "expected more than 0, at most 1"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor is 0.0"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor = 'half'"),
        ({"norm_output": "false"}, "norm_output is 'false'; expected a true or false"),
        ({"layer_types": ["sliding_attention"]}, "there is no sliding_window"),
        ({"layer_types": 3}, "layer_types is 3; expected a list"),
        ({"target_num_hidden_layers": "ten"}, "target_num_hidden_layers is 'ten'"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": 5}}, "is 5; expected a list"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": ["1", 2, 3]}}, "layer numbers"),
        ({"eagle_config": "x"}, "names no tap layers"),
        ({"layer_types": ["linear_attention"], "sliding_window": 8}, "has 'linear_attention'"),
    ],
)
def test_refuses_configs_that_do_not_fit(tmp_path, change, message):
    source = write_checkpoint(tmp_path / "source", specforge_tensors(), specforge_config(**change))
    with pytest.raises(DriftError, match=message):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"hidden_size": 64, "num_attention_heads": 8},
            "hidden size is 32, but this target's is 64",
        ),
        ({"vocab_size": 63}, "vocabulary size is 64, but this target's is 63"),
        ({"vocab_size": 128}, "vocabulary size is 64, but this target's is 128"),
        ({"num_hidden_layers": 1}, "taps the output of layer 3, but this target has 1 layers"),
    ],
)
def test_drafter_for_another_target(source, tmp_path, overrides, message):
    convert(source, tmp_path / "out")
    with pytest.raises(DriftError, match=message):
        load_drafter(str(tmp_path / "out"), tiny_llama(**overrides))


def test_what_is_wrong_is_told_whatever_is_left_to_a_probe(source, tmp_path):
    def probe(candidates):
        raise AssertionError("there is nothing to try")

    another = TargetShape(hidden_size=32, vocab_size=VOCAB - 1, num_layers=LAYERS)
    for taps in (None, "input", "output"):
        with pytest.raises(DriftError, match="vocabulary size is 64, but this target's is 63"):
            convert(source, tmp_path / "out", target=another, taps=taps, probe=probe)


def test_number_of_layers_is_checked_where_the_source_names_it(tmp_path):
    config = specforge_config(target_num_hidden_layers=LAYERS + 1)
    source = write_checkpoint(tmp_path / "source", specforge_tensors(), config)
    convert(source, tmp_path / "out")
    with pytest.raises(DriftError, match=f"number of layers is {LAYERS + 1}"):
        load_drafter(str(tmp_path / "out"), tiny_llama())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafter_type": "eagle9"}, "drafter_type is 'eagle9'"),
        ({"format_version": 2}, "format_version is 2"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"taps": "123"}, "taps"),
        ({"head_dim": -8}, "head_dim"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"taps": 5}, "taps"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "no network can be built"),
    ],
)
def test_the_canonical_config_is_read_strictly(source, tmp_path, change, message):
    convert(source, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DriftError, match=message):
        load_drafter(str(tmp_path / "out"), tiny_llama())


def test_strict_refuses_unknown_config_keys(tmp_path):
    config = specforge_config(gated_attention=True)
    source = write_checkpoint(tmp_path / "source", specforge_tensors(), config)
    with pytest.raises(DriftError, match="keys that nothing reads: gated_attention"):
        convert(source, tmp_path / "out", strict=True)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, None), (np.inf, None), (7e4, "float16")])
def test_weights_that_are_not_finite_are_reported(tmp_path, value, dtype):
    tensors = specforge_tensors(np.float32)
    tensors["norm.weight"][:2] = value  # 7e4 is finite, but not in float16
    source = write_checkpoint(tmp_path / "source", tensors)
    notes = convert(source, tmp_path / "out", dtype=dtype).notes
    assert notes[-1] == "norm.weight holds 2 values that are NaN or infinite"


def write_target(folder, embed, head=None):
    write_target_config(folder)
    tensors = {"model.embed_tokens.weight": embed}
    save_file(
        tensors if head is None else tensors | {"lm_head.weight": head},
        folder / "model.safetensors",
    )
    return str(folder)


def test_an_embedding_and_head_that_equal_the_targets_are_left_out(tmp_path):
    tensors = specforge_tensors()
    for name in ("d2t", "t2d"):
        del tensors[name]
    rng = np.random.default_rng(1)
    embed, head = (rng.normal(0, 1, (64, 32)).astype(np.float16) for _ in range(2))
    tensors |= {"embed_tokens.weight": embed, "lm_head.weight": head}
    config = specforge_config(draft_vocab_size=64)
    source = write_checkpoint(tmp_path / "source", tensors, config)

    def converted(name, *target):
        done = convert(source, tmp_path / name, target=write_target(tmp_path / f"t{name}", *target))
        weights = load_file(tmp_path / name / "model.safetensors")
        return done.config, {"embed_tokens.weight", "lm_head.weight"} & weights.keys()

    config, kept = converted("both", embed, head)
    assert (config.own_embedding, config.own_head, kept) == (False, False, set())
    assert config.provenance["own_embedding"] == "rule: equal to the target's"
    config, kept = converted("tied", embed)  # the target's head is its embedding
    assert (config.own_embedding, config.own_head, kept) == (False, True, {"lm_head.weight"})
    config, kept = converted("other", embed + 1, head + 1)
    assert (config.own_embedding, config.own_head) == (True, True)


@pytest.mark.parametrize("how", [{"q_bits": 4}, {"q_group_size": 32}, {"q_mode": "mxfp4"}])
def test_how_to_quantize_needs_quantize(how, source, tmp_path):
    with pytest.raises(DriftError, match="add --quantize"):
        convert(source, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "a row of lm_head has 32 values, which a group size of 64 does not divide"),
        ({"q_group_size": 7}, "group size 7 is not supported"),
        ({"q_group_size": 32, "q_bits": 7}, "number of bits 7 is not supported"),
    ],
)
def test_a_quantization_that_does_not_fit_is_told(how, message, source, tmp_path):
    with pytest.raises(DriftError, match=f"the drafter cannot be quantized so: .*{message}"):
        convert(source, tmp_path / "out", quantize=True, **how)
    assert not (tmp_path / "out").exists()


def test_quantized_as_mlx_does_it(source, tmp_path):
    """Blocks of rows, quantized one by one, are the whole quantized at once."""
    convert(source, tmp_path / "plain", dtype="bfloat16")
    for mode, bits in (("affine", 4), ("affine", 6), ("affine", 8), ("mxfp4", 4), ("mxfp8", 8)):
        out = tmp_path / f"{mode}{bits}"
        convert(
            source, out, dtype="bfloat16", quantize=True, q_mode=mode, q_bits=bits, q_group_size=32
        )
        plain = read_safetensors(tmp_path / "plain" / "model.safetensors")["fc.weight"]
        parts = mx.quantize(plain, 32, bits, mode)
        found = read_safetensors(out / "model.safetensors")
        for part, expected in zip(("weight", "scales", "biases"), parts, strict=False):
            assert mx.array_equal(found[f"fc.{part}"], expected)
        assert load_drafter(str(out), tiny_llama()).network.fc.bits == bits


def test_keys_that_are_null_say_nothing(tmp_path):
    source = write_checkpoint(tmp_path / "source", specforge_tensors())
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"surprise": None}))
    assert convert(source, tmp_path / "out").unknown_keys == []


def test_safetensors_of_any_name_come_before_bin(tmp_path):
    source = write_checkpoint(tmp_path / "source", specforge_tensors())
    (source / "model.safetensors").rename(source / "eagle.safetensors")
    (source / "pytorch_model.bin").write_bytes(b"not even looked at")
    assert convert(source, tmp_path / "out").config.source["file"] == "eagle.safetensors"


@pytest.mark.parametrize("name", ["~nosuchuser/head", "a" * 300 + "/b", "a\0b/c", "/dev/null", ""])
def test_sources_that_are_no_paths(name, tmp_path):
    with pytest.raises(DriftError) as refused:
        convert(name, tmp_path / "out")
    assert len(str(refused.value).splitlines()) == 1


def test_an_upload_that_cannot_be_is_refused_at_once(source, tmp_path):
    with pytest.raises(DriftError, match="expected a Hub repository as owner/name to upload to"):
        convert(source, tmp_path / "out", upload_repo="me/new/x")
    assert not (tmp_path / "out").exists()


def test_a_converted_drafter_is_not_read_through_links(source, tmp_path):
    convert(source, tmp_path / "out")
    (tmp_path / "out" / "config.json").rename(tmp_path / "config.json")
    (tmp_path / "out" / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(DriftError, match="leads out of its folder"):
        load_drafter(str(tmp_path / "out"), tiny_llama())
