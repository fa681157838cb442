"""Every spelling of a head gives the same canonical tensors, the same config, the same drafts."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dialects import (
    DRAFT_VOCAB,
    HIDDEN,
    LAYERS,
    NORMALIZED,
    PLAIN,
    VARIANTS,
    Head,
    head,
    nvidia,
    sizes,
    specforge,
    speculators,
    write,
)
from mlx_drift import DriftError, convert_drafter, inspect_drafter, load_drafter
from mlx_drift.convert.conventions import tap_convention
from mlx_drift.decode.speculate import every, prefill, speculate
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.target.model import Target, TargetShape
from tiny import VOCAB, plain_greedy, tiny_llama

SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
PROMPT = [5, 9, 2, 44, 17, 3, 60]
ACCOUNT = ("source", "provenance")  # where a config came from, which differs


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=LAYERS)


def drafts(folder: Path, model) -> list[list[int]]:
    """What a converted drafter proposes after some rows."""
    drafter = load_drafter(str(folder), model)
    taps = mx.random.normal((6, len(drafter.taps), HIDDEN), key=mx.random.key(0))
    cache = drafter.make_cache()
    found = []
    for row in range(6):
        drafter.ingest(mx.array([7 * row]), taps[row : row + 1], cache)
        found.append(drafter.propose(4, cache).tokens.tolist())
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_is_the_same_head(name, tmp_path, model):
    variant = VARIANTS[name]
    spelt = tmp_path / "spelt" / variant.subfolder
    variant.spell(variant.made, spelt)
    done = convert_drafter(str(spelt), tmp_path / "out", target=SHAPE, strict=True)
    assert done.dialect == variant.dialect

    tensors = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == variant.made.tensors.keys()
    for key, expected in variant.made.tensors.items():
        assert tensors[key].dtype == mx.array(expected).dtype
        assert mx.array_equal(tensors[key], mx.array(expected)), key
    assert done.config.taps == variant.made.taps
    assert getattr(done.config, "gated_attention", False) == ("gated attention" in name)

    if variant.made.tensors.get("layers.0.hidden_norm.weight") is not None:
        speculators(variant.made, tmp_path / "speculators")
        same = convert_drafter(str(tmp_path / "speculators"), tmp_path / "same", target=SHAPE)
        bytes_of = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("out", "same")]
        assert bytes_of[0] == bytes_of[1]
        configs = [c.config.to_dict() for c in (done, same)]
        assert without_account(configs[0]) == without_account(configs[1])
        assert drafts(tmp_path / "out", model) == drafts(tmp_path / "same", model)

    drafter = load_drafter(str(tmp_path / "out"), model)
    assert spoken(drafter, model) == plain_greedy(model, PROMPT, 16)


def without_account(config):
    return {key: value for key, value in config.items() if key not in ACCOUNT}


def spoken(drafter, model) -> list[int]:
    """What is generated with the drafter."""
    target = Target(model, drafter.taps)
    prompt, caches = mx.array(PROMPT), (target.make_cache(), drafter.make_cache())
    for _ in prefill(target, drafter, prompt, *caches, cut=every(4)):
        pass
    rounds = speculate(
        target,
        drafter,
        prompt[-1:],
        *caches,
        num_draft_tokens=3,
        max_tokens=16,
        stop_tokens=frozenset(),
    )
    return [token for round in rounds for token in round.tokens]


def test_automodels_config_is_the_targets_whose_window_is_not_the_drafters(tmp_path):
    specforge(
        PLAIN,
        tmp_path / "head",
        renames=tuple((part, f"model.{part}") for part in ("layers.", "fc", "norm.")),
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 6,
        attn_implementation="sdpa",
    )
    done = convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE, strict=True)
    assert done.config.sliding_window is None


TRAPS = {
    "SpecForge, normalized": ({"norm_output": True}, {}, "--feedback pre"),
    "SpecForge, not": ({"norm_output": False}, {}, "without any norm before the head"),
    "SpecForge, theta": ({"rope_theta": 1e6}, {"rope_theta": 1e4}, "--rope-theta 10000"),
    "AngelSlim, theta": (
        {"rope_theta": 1e6, "architectures": ["Eagle3LlamaForCausalLM"]},
        {"rope_theta": 1e6},
        "AngelSlim's trainer uses 10000",
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_trainers_did_otherwise_is_told(name, tmp_path):
    config, override, told = TRAPS[name]
    specforge(PLAIN, tmp_path / "head", **config)
    done = convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)
    assert [told in note for note in done.notes] == [True]
    chosen = override or {"feedback": "pre"}
    source = str(tmp_path / "head")
    assert convert_drafter(source, tmp_path / "b", target=SHAPE, **chosen).notes == []


def test_wrappers_of_training_code_are_taken_off_first(tmp_path):
    made = head(fc_norm=True, norm_output=True)
    renames = (("fc_norm.", "fcs."), ("", "module.model.draft_model."))
    specforge(made, tmp_path / "head", renames=renames)
    done = convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)
    assert (done.dialect, done.config.fc_norm) == ("SpecDrift", True)


def test_a_head_that_reads_no_embedding_is_refused(tmp_path):
    made = head(taps=(LAYERS + 1,), fc=False)
    for letter in "qkv":
        name = f"layers.0.self_attn.{letter}_proj.weight"
        made.tensors[name] = made.tensors[name][:, :HIDDEN].copy()
    nvidia(made, tmp_path / "head")
    with pytest.raises(DriftError, match="reads no token embedding"):
        convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)


def test_an_own_embedding_that_is_the_head_too_is_refused(tmp_path):
    made = head(embedding=True, reduced=False)
    del made.tensors["lm_head.weight"]
    write(tmp_path / "head", sizes(made, tie_word_embeddings=True), made.tensors)
    with pytest.raises(DriftError, match="tie_word_embeddings is true"):
        convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)


def test_absolute_ids_that_nothing_proves_are_refused(tmp_path):
    ids = np.arange(0, DRAFT_VOCAB // 2)  # twenty tokens, so that offsets would fit as well
    tensors = PLAIN.tensors | {"d2t": ids}
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:20]
    specforge(Head(tensors), tmp_path / "head", t2d=False)
    with pytest.raises(DriftError, match="d2t may hold offsets or token ids"):
        convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)


@pytest.mark.parametrize("key", ["target_layer_ids", "aux_hidden_state_layers"])
def test_tap_layers_under_another_name(key, tmp_path):
    specforge(PLAIN, tmp_path / "head", eagle_config=None, **{key: [1, 5, 8]})
    assert inspect_drafter(str(tmp_path / "head")).values["taps"] == [2, 6, 9]


def test_an_empty_list_of_tap_layers_is_none(tmp_path):
    nested = {"eagle_aux_hidden_state_layer_ids": []}
    specforge(PLAIN, tmp_path / "head", eagle_config=nested)
    done = convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)
    assert done.config.taps == (2, 6, 9)


def test_the_last_layer_has_no_output_to_tap(tmp_path):
    nested = {"eagle_aux_hidden_state_layer_ids": [1, 6, LAYERS]}
    specforge(PLAIN, tmp_path / "head", eagle_config=nested)
    source = str(tmp_path / "head")
    done = convert_drafter(source, tmp_path / "out", target=SHAPE)
    assert done.config.taps == (1, 6, LAYERS)
    with pytest.raises(DriftError, match="layer 12 of a target of 12 layers has no output"):
        convert_drafter(source, tmp_path / "b", target=SHAPE, taps="output")


# The tap rule, on the id lists that are known to be in use (target's layers, who, meaning).
ID_LISTS = [
    ([2, 18, 33], 36, "output", "input"),  # the default inputs, whoever writes them
    ([2, 16, 29], 32, "input", "input"),
    ([1, 17, 32], 36, "output", "output"),  # nvidia long-context: the default outputs
    ([1, 11, 21], 24, "output", "output"),  # SpecForge gpt-oss-20b
    ([1, 15, 28], None, "output", "output"),
    ([2, 30, 57], 60, "input", "input"),  # RedHatAI gemma-4-31B
    ([2, 30, 57], None, "input", "input"),  # speculators needs no target
    ([2, 24, 45], 48, "input", "input"),  # K2-Horizon
    ([1, 46, 90], 94, "input", "output"),  # nm-testing Qwen3-235B, converted from lmsys
    ([1, 23, 44], 48, "input", "output"),  # nm-testing Llama4-Maverick
    ([24, 30, 36], 36, "output", "input"),  # nvidia gpt-oss-120b v3: ends at the last layer
    ([2, 30, 58], 61, "output", "input"),  # Kimi K2.x, exported for vLLM
    ([3, 31, 59], 64, "output", "output"),  # specdrift Qwen3.6-27B: full-attention layers
    ([3, 19, 35], 40, "output", "output"),  # specdrift Qwen3.6-35B-A3B
    ([1, 21, 40], 43, "output", "output"),  # Syzygy DeepSeek-V4-Flash
    ([1, 9, 17, 25, 33], 36, "output", "output"),  # verl-SpeCo, five taps
    ([2, 46, 91, 93], 94, "input", "input"),  # four taps
    ([3, 23, 47], 48, "output", "output"),  # thoughtworks Qwen3-Coder-Next
    ([0, 5, 9], 12, "output", "input"),
    ([1, 18, 36], 36, "output", "input"),  # an output of layer 36 there is not
]


@pytest.mark.parametrize(("ids", "layers", "producer", "meaning"), ID_LISTS)
def test_the_tap_rule(ids, layers, producer, meaning):
    assert tap_convention(ids, layers, producer)[0] == meaning


@pytest.mark.parametrize(
    ("ids", "layers", "producer"),
    [([2, 18, 33], None, "output"), ([3, 31, 59], None, "output"), ([3, 31, 59], 64, None)],
)
def test_the_tap_rule_does_not_guess(ids, layers, producer):
    assert tap_convention(ids, layers, producer)[0] is None


def test_undecided_taps_are_an_error_that_names_the_flag_and_shown_by_inspect(tmp_path):
    nested = {"eagle_aux_hidden_state_layer_ids": [3, 5, 8]}
    specforge(PLAIN, tmp_path / "head", eagle_config=nested)
    with pytest.raises(DriftError, match=r"--taps input or --taps output.*--target MODEL"):
        convert_drafter(str(tmp_path / "head"), tmp_path / "out")
    found = inspect_drafter(str(tmp_path / "head"))
    assert not found.passed
    assert "--taps input or --taps output" in found.checks[0].detail
    assert "taps" not in found.values
    assert found.values["feedback"] == "pre"


def test_overrides(tmp_path):
    speculators(NORMALIZED, tmp_path / "head")
    done = convert_drafter(
        str(tmp_path / "head"),
        tmp_path / "out",
        taps="output",
        feedback="pre",
        rope_theta=5e5,
        window=64,
    )
    config = done.config
    assert (config.taps, config.feedback) == ((3, 7, 10), "pre")
    assert (config.rope_theta, config.sliding_window) == (5e5, 64)
    assert config.provenance["taps"] == "file; override: output of layer"
    for key in ("feedback", "rope_theta", "sliding_window"):
        assert config.provenance[key] == "override"


def test_the_trap_of_specforge_is_told(tmp_path):
    specforge(NORMALIZED, tmp_path / "head")
    done = convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)
    assert "--feedback pre" in done.notes[0]
    assert (
        convert_drafter(
            str(tmp_path / "head"), tmp_path / "chosen", target=SHAPE, feedback="post"
        ).notes
        == []
    )


def test_a_converted_drafter_is_a_source(tmp_path, model):
    speculators(NORMALIZED, tmp_path / "head")
    convert_drafter(str(tmp_path / "head"), tmp_path / "a")
    again = convert_drafter(str(tmp_path / "a"), tmp_path / "b")
    assert again.dialect == "mlx-drift"
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    small = convert_drafter(
        str(tmp_path / "b"), tmp_path / "c", quantize=True, q_bits=4, q_group_size=32
    )
    assert small.config.quantization.bits == 4
    assert len(drafts(tmp_path / "c", model)) == 6
    with pytest.raises(DriftError, match="is quantized already"):
        convert_drafter(str(tmp_path / "c"), tmp_path / "d", quantize=True)
    with pytest.raises(DriftError, match="--taps has nothing to say"):
        convert_drafter(str(tmp_path / "a"), tmp_path / "d", taps="input")


def renamed_tensor(name: str):
    return {**PLAIN.tensors, name: PLAIN.tensors["norm.weight"]}


REFUSED = {
    "P-EAGLE without its vector": ({"parallel_drafting": True}, PLAIN.tensors, "P-EAGLE"),
    "MLA": ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, PLAIN.tensors, "(MLA)"),
    "MLA by tensor": ({}, renamed_tensor("layers.0.self_attn.q_a_proj.weight"), "(MLA)"),
    "DFlash2": ({"architectures": ["DFlash2DraftModel"]}, PLAIN.tensors, "DFlash2"),
    "DFlash2 by tensor": ({}, renamed_tensor("layers.0.mlp_conv.base_kernel"), "DFlash2"),
    "DFly": ({}, renamed_tensor("layer_fusion_weights"), "DFly"),
    "XPress": ({"speculators_model_type": "xpress"}, PLAIN.tensors, "XPress"),
    "Domino": ({}, renamed_tensor("prefix_gru.weight_ih"), "Domino"),
    "Hydra": ({"hydra_head_arch": "cross-attn"}, PLAIN.tensors, "cross-attn"),
    "EagleMedusa": (
        {},
        renamed_tensor("parallel_draft_heads.0.medusa_layers.0.linear.weight"),
        "EagleMedusa",
    ),
    "NVFP4": ({}, renamed_tensor("layers.0.mlp.up_proj.weight_scale_2"), "NVFP4"),
    "GPTQ": ({}, renamed_tensor("layers.0.mlp.up_proj.qweight"), "GPTQ or AWQ"),
    "packed": ({}, renamed_tensor("layers.0.mlp.up_proj.weight_packed"), "compressed-tensors"),
    "FP8 by blocks": ({}, renamed_tensor("layers.0.mlp.up_proj.weight_scale_inv"), "by blocks"),
    "FP8": ({}, renamed_tensor("layers.0.mlp.up_proj.weight_scale"), "FP8, one scale"),
    "Gemma-4 assistant": ({"model_type": "gemma4_assistant"}, PLAIN.tensors, "Gemma-4"),
    "a target": (
        {"architectures": ["LlamaForCausalLM"]},
        {"model.embed_tokens.weight": PLAIN.tensors["norm.weight"]}
        | {f"model.layers.{i}.mlp.up_proj.weight": PLAIN.tensors["norm.weight"] for i in range(3)},
        "a whole language model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_run_is_refused_by_name(name, tmp_path):
    config, tensors, called = REFUSED[name]
    write(tmp_path / "head", config, tensors)
    with pytest.raises(DriftError, match="which mlx-drift does not run") as refused:
        convert_drafter(str(tmp_path / "head"), tmp_path / "out")
    assert called in str(refused.value)
    assert "\n" not in str(refused.value)


def test_gguf_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "head.gguf").write_bytes(b"GGUF")
    for source in (tmp_path, tmp_path / "head.gguf"):
        with pytest.raises(DriftError, match=r"GGUF, llama\.cpp's format"):
            convert_drafter(str(source), tmp_path / "out")


@pytest.mark.parametrize("switch", ["use_mtp_layernorm", "parallel_draft_step"])
def test_switches_of_modelopt_that_change_the_head(switch, tmp_path):
    nvidia(PLAIN, tmp_path / "head", nested={switch: 2})
    with pytest.raises(DriftError, match=f"{switch} is 2; this head is run only with"):
        convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)
