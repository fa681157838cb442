"""MTP heads from where they are: shards, sidecars, folders of their own; and what is refused."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from huggingface_hub import utils

from families import build
from hub_stub import StubHub, set_endpoint, settle
from mlx_drift import convert_drafter, load_drafter
from mlx_drift.drafters.load import (
    build_network,
    load_converted,
    quantize_linears,
    quantized_layers,
)
from mlx_drift.errors import DriftError
from mtp_heads import FAMILIES, QWEN, config_of, head, save, write_repository, written

REPO = "someone/model-with-mtp"
PARTS = "weight", "scales", "biases"


def convert(source, out, **options):
    """Converts, and returns the conversion and the tensors."""
    done = convert_drafter(str(source), out, mtp=True, **options)
    return done, mx.load(str(out / "model.safetensors"))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.array_equal(found[name], value).item(), name


@pytest.fixture
def hub(tmp_path, monkeypatch):
    settle(monkeypatch, tmp_path)
    with StubHub(tmp_path / "repo", REPO).serve() as hub:
        set_endpoint(monkeypatch, hub.endpoint)
        yield hub
    utils.close_session()


@pytest.mark.parametrize("name", FAMILIES)
def test_of_many_shards_only_those_with_some_of_the_head_are_fetched(name, hub, tmp_path):
    tensors = written(name, head(name))
    config = config_of(name)
    write_repository(tmp_path / "repo", config, tensors, shards=2, others=3)
    _, found = convert(REPO, tmp_path / "out")
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {
        "config.json",
        "model.safetensors.index.json",
        "model-00004-of-00005.safetensors",
        "model-00005-of-00005.safetensors",
    }
    assert_equal(found, head(name))

    sidecar = tmp_path / "sidecar"
    write_repository(sidecar, config, {"model.norm.weight": mx.zeros(4)})
    save(sidecar / "mtp.safetensors", tensors)
    assert_equal(convert(sidecar, tmp_path / "from-sidecar")[1], found)


@pytest.mark.parametrize(
    "place",
    ["mtp.safetensors", "model-mtp.safetensors", "mtp/weights.safetensors", "x/y.safetensors"],
)
@pytest.mark.parametrize("remote", [False, True])
def test_a_sidecar_is_found_where_its_tools_put_it(place, remote, hub, tmp_path):
    config = config_of("qwen3_5")
    if place.startswith("x/"):
        config["mlx_lm_extra_tensors"] = {"mtp_file": place}
    folder = tmp_path / "repo"
    write_repository(folder, config, {"model.norm.weight": mx.zeros(4)})
    save(folder / place, written("qwen3_5", head("qwen3_5")))
    done, found = convert(REPO if remote else folder, tmp_path / "out")
    assert_equal(found, head("qwen3_5"))
    assert done.config.source["file"] == place.rpartition("/")[2]


def test_a_sidecar_s_path_does_not_lead_out_of_its_folder(tmp_path):
    config = config_of("qwen3_5") | {"mlx_lm_extra_tensors": {"mtp_file": "../mtp.safetensors"}}
    write_repository(tmp_path / "repo", config, {"model.norm.weight": mx.zeros(4)})
    save(tmp_path / "mtp.safetensors", written("qwen3_5", head("qwen3_5")))
    with pytest.raises(DriftError, match=r"outside|out of"):
        convert(tmp_path / "repo", tmp_path / "out")


def without_prefix(tensors):
    return {name.removeprefix("mtp."): value for name, value in tensors.items()}


def own_folder(name):
    """A head in a repository of its own, as mlx-vlm splits it off: the names have no prefix."""
    config = config_of(name)
    return config | {"model_type": f"{config['model_type']}_mtp"}


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("file_format", ["mlx", "pt", None])
def test_a_norm_s_1_is_added_if_it_is_missing_and_never_twice(name, file_format, tmp_path):
    tensors = without_prefix(written(name, head(name)))
    if file_format == "mlx":
        tensors = {n: v + 1 if "norm" in n else v for n, v in tensors.items()}
    write_repository(tmp_path / "repo", own_folder(name), {})
    save(tmp_path / "repo" / "model.safetensors", tensors, file_format)
    done, found = convert(tmp_path / "repo", tmp_path / "out")
    assert_equal(found, head(name))
    assert done.warnings == []


RAW = {  # Qwen3.6-27B's means, as the threads named in `mtp_norms` tell them
    "layers.0.input_layernorm": 0.04,
    "layers.0.post_attention_layernorm": 0.21,
    "layers.0.self_attn.q_norm": 0.79,
    "layers.0.self_attn.k_norm": 0.78,
    "embedding_norm": -0.46,
    "hidden_norm": -0.16,
    "norm": 1.25,
}
RAW_35B = RAW | {"embedding_norm": 0.2734 - 1, "hidden_norm": 0.4937 - 1, "norm": 2.58}


def with_means(means):
    """A head whose norms have gains of some means."""
    tensors = head("qwen3_5")
    gains = {f"{name}.weight": mx.full(tensors[f"{name}.weight"].shape, m) for name, m in means}
    return tensors | gains


@pytest.mark.parametrize("raw", [RAW, RAW_35B], ids=["27B", "35B"])
@pytest.mark.parametrize(
    ("has_it", "file_format", "told"),
    [
        (False, "pt", None),
        (False, None, None),
        (False, "mlx", "its norms are PyTorch's, zero-centred: 1 was added to them"),
        (True, "mlx", None),
        (True, None, None),
        (True, "pt", "its norms are mlx's, which have their 1: nothing was added"),
    ],
)
def test_real_gains_are_told_by_their_layer_s_norms(raw, has_it, file_format, told, tmp_path):
    expected = with_means([(name, 1 + mean) for name, mean in raw.items()])
    stored = {name: v - (0 if has_it or v.ndim > 1 else 1) for name, v in expected.items()}
    stored = {f"{QWEN.get(name[:-7], name[:-7])}.weight": v for name, v in stored.items()}
    write_repository(tmp_path / "repo", own_folder("qwen3_5"), {})
    save(tmp_path / "repo" / "model.safetensors", stored, file_format)
    done, found = convert(tmp_path / "repo", tmp_path / "out")
    for name, value in expected.items():
        assert mx.allclose(found[name], value, atol=1e-6).item(), name
    assert len(done.warnings) == (told is not None)
    assert told is None or told in done.warnings[0]


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (2.79, "averages 2.79, as if 1 had been added twice"),
        (0.3, "lacks its 1, though other norms have it"),
    ],
)
def test_queries_and_keys_otherwise_than_the_rest_are_told(stored, told, tmp_path):
    means = {name: 1 + mean for name, mean in RAW.items()}
    tensors = with_means((means | {"layers.0.self_attn.q_norm": stored}).items())
    tensors = {f"{QWEN.get(name[:-7], name[:-7])}.weight": v for name, v in tensors.items()}
    write_repository(tmp_path / "repo", own_folder("qwen3_5"), {})
    save(tmp_path / "repo" / "model.safetensors", tensors, "mlx")
    (warning,) = convert(tmp_path / "repo", tmp_path / "out")[0].warnings
    assert f"layers.0.self_attn.q_norm.weight {told}" in warning


def quantized(name, **others):
    """Packs a head as mlx does, layers of `others` otherwise, under a Qwen sidecar's names."""
    out = {}
    tensors = {f"{QWEN.get(n[:-7], n[:-7])}.weight": value for n, value in head(name).items()}
    for key, value in tensors.items():
        layer = key.removesuffix(".weight")
        bits = others.get(layer.rpartition(".")[2], 4)
        if value.ndim < 2 or bits is None:
            out[key] = value
            continue
        packed = mx.quantize(value, group_size=32, bits=bits)
        out |= {f"{layer}.{kind}": part for kind, part in zip(PARTS, packed, strict=True)}
    return out


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_a_quantized_sidecar_is_taken_as_it_is_but_for_routers(name, tmp_path):
    config = own_folder(name) | {"quantization": {"group_size": 32, "bits": 4}}
    packed = quantized(name, gate=8, shared_expert_gate=None)
    write_repository(tmp_path / "repo", config, {})
    save(tmp_path / "repo" / "model.safetensors", packed, "mlx")
    done, found = convert(tmp_path / "repo", tmp_path / "out", strict=True)
    assert vars(done.config.quantization) == {"group_size": 32, "bits": 4, "mode": "affine"}
    layers = {key.removesuffix(".scales") for key in found if key.endswith(".scales")}
    assert layers == quantized_layers(build_network(done.config, tmp_path / "out" / "x"))
    for layer in layers:
        for kind in PARTS:
            assert mx.array_equal(found[f"{layer}.{kind}"], packed[f"{layer}.{kind}"]).item()
    fc = mx.dequantize(*(packed[f"fc.{kind}"] for kind in PARTS), 32, 4)
    assert mx.array_equal(found["fc.weight"], fc.astype(mx.bfloat16)).item()


def test_a_sidecar_quantized_in_several_ways_is_unpacked(tmp_path):
    config = own_folder("qwen3_5") | {"quantization": {"group_size": 32, "bits": 4}}
    write_repository(tmp_path / "repo", config, {})
    packed = quantized("qwen3_5", o_proj=8)
    save(tmp_path / "repo" / "model.safetensors", packed, "mlx")
    done, found = convert(tmp_path / "repo", tmp_path / "out")
    assert done.config.quantization is None
    assert not any(name.endswith(".scales") for name in found)
    assert "quantized in several ways" in done.warnings[0]
    again = convert(tmp_path / "repo", tmp_path / "again", quantize=True, q_group_size=32)
    assert again[0].config.quantization.bits == 4


def test_routers_and_the_projection_are_never_quantized(tmp_path):
    write_repository(
        tmp_path / "repo", config_of("qwen3_next"), written("qwen3_next", head("qwen3_next"))
    )
    _, found = convert(tmp_path / "repo", tmp_path / "out", quantize=True, q_group_size=32)
    kept = {name for name, value in found.items() if value.ndim == 2 and value.dtype == mx.float32}
    loose = {name for name in kept if f"{name.removesuffix('weight')}scales" not in found}
    assert {name for name in loose if name.endswith(".weight")} == {
        "fc.weight",
        "layers.0.mlp.gate.weight",
        "layers.0.mlp.shared_expert_gate.weight",
    }
    assert "layers.0.mlp.switch_mlp.up_proj.scales" in found


def test_eagle_3_s_linear_layers_are_quantized_as_ever():
    layers = nn.Sequential(nn.Linear(64, 64), nn.Embedding(4, 64), nn.RMSNorm(64))
    quantize_linears(layers, 32, 4, "affine")
    assert quantized_layers(layers) == {"layers.0"}


@pytest.mark.parametrize(
    "quantization",
    [
        {"group_size": 64, "bits": 4, "mode": "mxfp4"},
        {"group_size": 64, "bits": 8, "layers.0.mlp.gate_proj": {"group_size": 128, "bits": 2}},
        "4bit",
    ],
)
def test_a_quantized_head_is_read_off_its_tensors_whatever_the_trunk_s_config_says(
    quantization, tmp_path
):
    config = config_of("qwen3_5") | {"quantization": quantization}
    packed = {f"mtp.{name}": value for name, value in quantized("qwen3_5").items()}
    write_repository(tmp_path / "repo", config, {"model.norm.weight": mx.zeros(4)})
    save(tmp_path / "repo" / "mtp.safetensors", packed, "mlx")
    done, _ = convert(tmp_path / "repo", tmp_path / "out")
    assert vars(done.config.quantization) == {"group_size": 32, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_modes_without_biases_are_known_by_their_shapes(mode, tmp_path):
    name = "qwen3_5"
    write_repository(tmp_path / "repo", config_of(name), written(name, head(name)))
    _, packed = convert(tmp_path / "repo", tmp_path / "packed", quantize=True, q_mode=mode)
    write_repository(tmp_path / "again", own_folder(name), {})
    theirs = {
        n.replace("embedding_norm", QWEN["embedding_norm"]).replace(
            "hidden_norm", QWEN["hidden_norm"]
        ): value
        for n, value in packed.items()
    }
    save(tmp_path / "again" / "model.safetensors", theirs, "mlx")
    done, found = convert(tmp_path / "again", tmp_path / "out")
    assert done.config.quantization.mode == mode
    assert_equal(found, packed)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("scales", mx.zeros((3, 2))),
        ("scales", mx.zeros((128, 3))),
        ("biases", mx.zeros((128, 1))),
        ("weight", mx.zeros((128, 8))),
    ],
)
def test_parts_of_a_quantized_layer_that_do_not_fit_are_refused(part, value, tmp_path):
    packed = {f"mtp.{name}": value for name, value in quantized("qwen3_5").items()}
    packed[f"mtp.layers.0.mlp.up_proj.{part}"] = value
    write_repository(tmp_path / "repo", config_of("qwen3_5"), packed)
    with pytest.raises(DriftError, match="up_proj is quantized in no way that mlx knows"):
        convert(tmp_path / "repo", tmp_path / "out")


def test_a_router_s_corrections_stay_float32(tmp_path):
    name = "deepseek_v3"
    write_repository(tmp_path / "repo", config_of(name), written(name, head(name)))
    _, found = convert(tmp_path / "repo", tmp_path / "out", dtype="bfloat16")
    kept = "layers.0.mlp.gate.e_score_correction_bias"
    assert found[kept].dtype == mx.float32
    assert found["fc.weight"].dtype == mx.bfloat16
    drafter = load_converted(tmp_path / "out", build(name, mx.bfloat16))
    assert drafter.network.layers[0].mlp.gate.e_score_correction_bias.dtype == mx.float32
    assert drafter.network.fc.weight.dtype == mx.bfloat16


def test_mlx_vlm_s_folders(tmp_path):
    name = "glm4_moe_lite"
    names = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "fc": "eh_proj"}
    names |= {"norm": "shared_head_norm"}
    tensors = {
        f"model.{names.get(n[:-7], n[:-7])}.weight".replace("layers.0.", "mtp_block.")
        if n.endswith(".weight")
        else f"model.{n}".replace("layers.0.", "mtp_block."): value
        for n, value in head(name).items()
    }
    own = mx.ones((64, 64))
    tensors |= {"model.embed_tokens.weight": own, "lm_head.weight": own}
    config = {"model_type": "glm4_moe_lite_mtp", "text_config": config_of(name)}
    write_repository(tmp_path / "repo", config, {})
    save(tmp_path / "repo" / "model.safetensors", tensors, "mlx")
    done, found = convert(tmp_path / "repo", tmp_path / "out")
    assert_equal(found, head(name) | {"embed_tokens.weight": own, "lm_head.weight": own})
    assert done.config.own_embedding
    assert done.config.own_head

    config = own_folder("qwen3_5") | {"text_config": config_of("qwen3_next")}  # their name for it
    write_repository(
        tmp_path / "next", config, without_prefix(written("qwen3_next", head("qwen3_next")))
    )
    assert_equal(convert(tmp_path / "next", tmp_path / "next-out")[1], head("qwen3_next"))


def test_experts_stacked_under_a_dense_layer_s_names(tmp_path):
    name = "qwen3_5_moe"
    tensors = {f"mtp.{QWEN.get(n[:-7], n[:-7])}.weight": v for n, v in head(name).items()}
    tensors = {n.replace(".switch_mlp.", "."): value for n, value in tensors.items()}
    tensors["mtp.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros(4)
    write_repository(tmp_path / "repo", config_of(name), {"model.norm.weight": mx.zeros(4)})
    save(tmp_path / "repo" / "mtp.safetensors", tensors, "mlx")
    assert_equal(convert(tmp_path / "repo", tmp_path / "out")[1], head(name))


def test_a_text_model_s_own_type_will_do(tmp_path):
    name = "qwen3_5_moe"
    config = {"text_config": config_of(name)["text_config"] | {"model_type": "qwen3_5_moe_text"}}
    write_repository(tmp_path / "repo", config, written(name, head(name)))
    assert_equal(convert(tmp_path / "repo", tmp_path / "out")[1], head(name))


def test_rope_as_transformers_5_writes_it(tmp_path):
    name = "deepseek_v3"
    config = config_of(name)
    yarn = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 2.0, "mscale_all_dim": 1.0}
    config |= {"rope_theta": None, "rope_scaling": None, "rope_parameters": yarn}
    write_repository(tmp_path / "repo", config, written(name, head(name)))
    block = convert(tmp_path / "repo", tmp_path / "out")[0].config.block
    assert (block["rope_theta"], block["rope_scaling"]) == (5e4, yarn)


def test_conventions_may_be_said(tmp_path):
    write_repository(tmp_path / "repo", config_of("mimo"), written("mimo", head("mimo")))
    config = convert(tmp_path / "repo", tmp_path / "a")[0].config
    assert (config.taps, config.feedback, config.hidden_first) == ((5,), "post", True)
    options = {"taps": "output", "feedback": "pre"}
    config = convert(tmp_path / "repo", tmp_path / "b", **options)[0].config
    assert (config.taps, config.feedback) == ((4,), "pre")
    assert config.provenance["taps"] == config.provenance["feedback"] == "override"


def test_a_promise_without_tensors_is_told_from_the_index_alone(hub, tmp_path):
    config = config_of("deepseek_v3") | {"num_nextn_predict_layers": 1}
    write_repository(tmp_path / "repo", config, {"model.norm.weight": mx.zeros(4)}, others=3)
    with pytest.raises(DriftError) as refused:
        convert(REPO, tmp_path / "out")
    assert "has no MTP head though its config says num_nextn_predict_layers" in str(refused.value)
    assert "give the original repository" in str(refused.value)
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors.index.json"}


def changed(name, change):
    config, tensors = config_of(name), written(name, head(name))
    change(config, tensors)
    return config, tensors


def drop(name):
    return lambda config, tensors: tensors.pop(name)


def put(name, value):
    return lambda config, tensors: tensors.update({name: value})


def say(**keys):
    return lambda config, tensors: config.update(keys)


NEXTN = "model.layers.4."
WRONG = {
    "a tensor is missing": ("qwen3_5", drop("mtp.fc.weight"), "lacks the tensor fc.weight"),
    "one is too many": ("qwen3_5", put("mtp.x.weight", mx.zeros(3)), "layers.0.x.weight"),
    "two of one meaning": (
        "qwen3_5",
        put("model.mtp.fc.weight", mx.zeros((2, 2))),
        "mtp.fc.weight both mean fc.weight",
    ),
    "an expert is missing": (
        "deepseek_v3",
        drop(f"{NEXTN}mlp.experts.1.up_proj.weight"),
        "are not numbered 0 … 2",
    ),
    "an expert is of another shape": (
        "deepseek_v3",
        put(f"{NEXTN}mlp.experts.1.up_proj.weight", mx.zeros((3, 64))),
        "expert 1 of layers.0.mlp.switch_mlp.up_proj.weight is F32 (3, 64)",
    ),
    "kv_b_proj is of another shape": (
        "glm4_moe_lite",
        put(f"{NEXTN}self_attn.kv_b_proj.weight", mx.zeros((7, 32))),
        "kv_b_proj has shape (7, 32)",
    ),
    "scales are of another shape": (
        "deepseek_v3",
        put(f"{NEXTN}eh_proj.weight_scale_inv", mx.zeros((3, 3))),
        "expected one scale for each block of 128 × 128",
    ),
    "two layers": (
        "qwen3_5",
        put("mtp.layers.1.self_attn.q_norm.weight", mx.zeros(32)),
        "holds 2 MTP modules",
    ),
    "RoPE is no object": ("mimo", say(rope_scaling="yarn"), "no network can be built from it"),
    "several modules": (
        "deepseek_v3",
        put("model.layers.5.eh_proj.weight", mx.zeros((2, 2))),
        "holds 2 MTP modules",
    ),
    "an unknown family": ("mimo", say(model_type="mystery"), "of which no MTP head is known"),
    "a family that is not run": (
        "mimo",
        say(model_type="step3p5"),
        "the MTP head of step3p5 is not run (it has three heads in turn). vLLM runs it",
    ),
    "another speculator": (
        "speculators llama",
        say(transformer_layer_config={"model_type": "opt"}),
        "transformer_layer_config.model_type is 'opt'",
    ),
    "a size is missing": ("mimo", say(hidden_size=None), "hidden_size is None"),
    "a size is wild": ("mimo", say(intermediate_size=2**40), "expected at most"),
    "a key of the block is missing": (
        "mimo",
        say(num_attention_heads="four"),
        "no network can be built from it",
    ),
}


@pytest.mark.parametrize("why", WRONG)
def test_what_is_wrong_is_told_in_one_line(why, tmp_path):
    name, change, told = WRONG[why]
    write_repository(tmp_path / "repo", *changed(name, change))
    with pytest.raises(DriftError) as refused:
        convert(tmp_path / "repo", tmp_path / "out")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]


def test_the_base_of_rope_is_the_target_s(tmp_path):
    write_repository(tmp_path / "repo", config_of("mimo"), written("mimo", head("mimo")))
    with pytest.raises(DriftError, match="leave --rope-theta out"):
        convert(tmp_path / "repo", tmp_path / "out", rope_theta=1e6)


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3", "speculators llama"])
def test_without_the_flag_it_is_asked_for(name, tmp_path):
    write_repository(tmp_path / "repo", config_of(name), written(name, head(name)))
    with pytest.raises(DriftError, match="mlx-drift convert --mtp"):
        convert_drafter(str(tmp_path / "repo"), tmp_path / "out")


def test_the_command_converts_and_a_converted_head_converts_again(cli, tmp_path):
    write_repository(tmp_path / "repo", config_of("mimo"), written("mimo", head("mimo")))
    arguments = ("--mtp", "--mlx-path", tmp_path / "out", "--json")
    code, out, err = cli("convert", tmp_path / "repo", *arguments)
    assert code == 0, err
    assert json.loads(out)["drafter_type"] == "mtp"
    assert "mtp" in (tmp_path / "out" / "README.md").read_text()
    code, out, err = cli(
        *("convert", tmp_path / "out", "--mlx-path", tmp_path / "small", "--json"),
        *("-q", "--q-group-size", "32"),
    )
    assert code == 0, err
    assert json.loads(out)["quantization"]["bits"] == 4


def test_inspect_tells_what_it_is_from_headers_alone(cli, hub, tmp_path):
    name = "qwen3_5_moe"
    write_repository(tmp_path / "repo", config_of(name), written(name, head(name)), 2, others=3)
    code, out, err = cli("inspect", REPO, "--mtp", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["dialect"], told["values"]["feedback"]) == ("a Qwen MTP head", "post")
    assert told["parameters"] == sum(value.size for value in head(name).values())
    whole = [r for r in hub.requests if r.path.endswith(".safetensors") and r.range is None]
    assert not [request for request in whole if request.method == "GET"]


def test_load_drafter_takes_the_head_of_a_repository(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path / "cache"))
    name = "glm4_moe"
    write_repository(tmp_path / "repo", config_of(name), written(name, head(name)), 1, others=2)
    model = build(name)
    assert load_drafter(REPO, model, mtp=True).config.drafter_type == "mtp"
    with pytest.raises(DriftError, match="convert --mtp"):
        load_drafter(REPO, model)


@pytest.mark.parametrize("name", ["glm4_moe", "mimo"])
def test_the_newest_spelling_of_rope_wins(name, tmp_path):
    """As in `mlx_drift.convert.rope`; mlx-lm's Qwen3.5 reads `rope_parameters` alone."""
    config = config_of(name) | {"rope_theta": 1e4}
    newer = {"rope_type": "default", "rope_theta": 1e7}
    if name == "glm4_moe":
        newer["partial_rotary_factor"] = config["partial_rotary_factor"] / 2
    write_repository(
        tmp_path / "repo", config | {"rope_parameters": newer}, written(name, head(name))
    )
    done, _ = convert(tmp_path / "repo", tmp_path / "out")
    for key in newer.keys() - {"rope_type"}:
        assert done.config.block[key] == newer[key]
        assert f"rope_parameters.{key} is {newer[key]} and {key} is {config[key]}" in str(
            done.notes
        )
    config |= {"rope_theta": 1e7, "rope_parameters": {"rope_theta": 1e7}}
    write_repository(tmp_path / "agree", config, written(name, head(name)))
    assert convert(tmp_path / "agree", tmp_path / "b")[0].notes == []


QUANTIZED = {
    "NVFP4": ["weight_scale_2", "weight_scale"],
    "compressed-tensors": ["weight_packed", "weight_scale", "weight_shape"],
    "GPTQ or AWQ": ["qweight", "qzeros", "scales"],
    "FP8, one scale a tensor or row": ["weight_scale", "input_scale"],
}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("deepseek_v3", "model.layers.{layers}.mlp.experts.0.up_proj"),
        ("glm4_moe", "model.layers.{layers}.eh_proj"),
        ("qwen3_5", "mtp.layers.0.self_attn.q_proj"),
        ("speculators qwen3", "mtp_layers.0.mlp.gate_proj"),
    ],
)
def test_what_other_tools_quantized_is_named_by_kind(kind, name, layer, tmp_path):
    config, tensors = config_of(name), written(name, head(name))
    layer = layer.format(layers=config.get("num_hidden_layers"))
    tensors |= {f"{layer}.{end}": mx.ones((1,)) for end in QUANTIZED[kind]}
    write_repository(tmp_path / "repo", config, tensors)
    with pytest.raises(DriftError) as refused:
        convert(tmp_path / "repo", tmp_path / "out")
    assert f"holds a quantized MTP head ({kind}), which mlx-drift does not run" in str(
        refused.value
    )
    assert "Convert the bfloat16 head it was made from" in str(refused.value)


def test_one_scale_for_a_whole_tensor_under_the_name_of_blocks(tmp_path):
    config, tensors = config_of("deepseek_v3"), written("deepseek_v3", head("deepseek_v3"))
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    tensors[f"{name}_scale_inv"] = mx.ones(())
    write_repository(tmp_path / "repo", config, tensors)
    with pytest.raises(DriftError, match="FP8, one scale a tensor or row"):
        convert(tmp_path / "repo", tmp_path / "out")
