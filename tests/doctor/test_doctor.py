"""`doctor`: what a run would be, by the code of a real run, and nothing of it computed."""

import importlib
import json
import resource
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from huggingface_hub import utils
from mlx.utils import tree_flatten

from checkpoints import embedded_checkpoint
from dialects import HIDDEN, LAYERS, PLAIN, specforge
from families import BASE, BUILT, CONFIGS, LEFT_OUT, REFUSED, build
from hub_stub import StubHub, set_endpoint, settle
from mlx_drift import (
    DriftError,
    DriftWarning,
    convert_drafter,
    load_demo,
    load_drafter,
    make_prompt_cache,
)
from mlx_drift.demo import DEMO, TARGET
from mlx_drift.doctor import doctor
from mlx_drift.target.caches import KVQuantization
from mlx_drift.target.model import Target
from tiny import VOCAB, tiny_drafter, tiny_llama

build_module = importlib.import_module("mlx_drift.doctor.build")
EMBEDDED = str(DEMO / "eagle3.1")
SAMPLE = ["llama", "gpt_oss", "qwen3_next", "llama4", "baichuan_m1"]
ROWS, STEP_SIZE = 600, 50

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def family(folder, name, **changes):
    """Writes the config of a tiny family."""
    named = {"model_type": name, "torch_dtype": "float32"}
    return write(folder, {**BASE, **named, **CONFIGS[name], **changes})


def fed(model, **options):
    """The bytes of a family's caches that were really fed."""
    target = Target(model, (1,))
    cache = target.make_cache(**options)
    for start in range(0, ROWS, STEP_SIZE):
        target(mx.arange(start, start + STEP_SIZE) % VOCAB, cache)
        mx.eval(cache.state)
    return cache.nbytes


def told(model, **options):
    """The bytes that are told of them."""
    found = doctor(model, context=ROWS, prefill_step_size=STEP_SIZE, **options)
    assert found.refused == []
    assert found.memory.caches == sum(kind.nbytes for kind in found.caches)
    return found.memory.caches


def built(families, share):
    return [f if f in share else pytest.param(f, marks=pytest.mark.long) for f in families]


@pytest.mark.parametrize(
    "name", built([f for f in BUILT if f not in build_module.COMPUTES], SAMPLE)
)
def test_the_bytes_of_caches_are_those_of_a_run(tmp_path, name):
    assert told(family(tmp_path, name)) == fed(build(name))


@pytest.mark.parametrize("start", [0, 100, ROWS + 1])
def test_the_bytes_of_quantized_caches_are_those_of_a_run(tmp_path, start):
    options = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": start}
    quantization = KVQuantization(4, 32, start)
    assert told(family(tmp_path, "qwen3"), **options) == fed(
        build("qwen3"), quantization=quantization
    )


def test_the_bytes_of_bounded_caches_are_those_of_a_run(tmp_path):
    expected = fed(build("qwen3"), max_kv_size=32)
    assert told(family(tmp_path, "qwen3"), max_kv_size=32) == expected


def test_says_how_caches_go_back(tmp_path):
    def kinds(name, **options):
        found = doctor(family(tmp_path, name), prefill_step_size=STEP_SIZE, **options)
        return {kind.kind: (kind.count, kind.rolled_back, kind.goes_back) for kind in found.caches}

    turns = "to a turn's start or end, by a copy"
    plain = kinds("qwen3_next")
    assert plain["keys and values"] == (2, "trimmed", "to any token")
    again = "its layer is called anew on the accepted rows"
    assert plain["recurrent state"] == (4, again, turns)
    count, trimmed, back = kinds("gpt_oss")["keys and values, a window of 8 rows"]
    assert (count, trimmed) == (2, "trimmed; 263 rows are kept at most")
    assert back.endswith(f"else {turns}")
    assert kinds("llama4")["keys and values, chunks of 8 rows"][0] == 6
    (bounded,) = kinds("qwen3", max_kv_size=32)
    assert bounded == "keys and values, the first 4 rows and the last 28"
    (quantized,) = kinds("qwen3", kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    assert quantized == "keys and values in 8 bits, groups of 32"


def test_computes_nothing(tmp_path):
    model = write(tmp_path, LLAMA_70B)
    mx.reset_peak_memory()
    before = mx.get_active_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = doctor(model, context=131072)
    assert mx.get_peak_memory() - before[0] < 1e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1] < 200e3  # kilobytes
    assert found.memory.weights == 141_107_412_992  # 70.6 billion values of two bytes
    assert found.memory.caches == 2 * 80 * 8 * 128 * 2 * 131072
    assert (found.memory.weights_from, found.memory.fits) == ("config", False)


def test_random_numbers_are_the_same_after_it(tmp_path):
    model = write(tmp_path, LLAMA_70B)
    mx.random.seed(7)
    expected = mx.random.split(mx.random.state[0])
    doctor(model, EMBEDDED)
    assert mx.array_equal(mx.random.split(mx.random.state[0]), expected)


@pytest.mark.parametrize("name", built([*CONFIGS], ["dbrx", "gemma4", "jamba", "mamba"]))
def test_tells_what_cannot_be_looked_at_without_computing(tmp_path, monkeypatch, name):
    """With real weights it would take their memory."""
    monkeypatch.setattr(build_module, "COMPUTES", {})
    model = family(tmp_path, name)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    doctor(model)
    computed = mx.get_peak_memory() - before > 50e3  # its weights have more than 300 kB
    monkeypatch.undo()
    assert computed == (name in build_module.COMPUTES)


def capture(model, *taps):
    target = Target(model, taps)
    target.verify(mx.array([1, 2]), target.make_cache())


def refusal(question, *arguments, **options):
    """What a real run says."""
    with pytest.raises(DriftError) as refused:
        question(*arguments, **options)
    return str(refused.value)


WITHOUT_TAPS = {"gemma3n": 1, "iquestloopcoder": 1, "nanbeige": 1, "nanochat": 5, "talkie": 5}
"""Targets that run, but not with every drafter; and a tap that cannot be captured."""


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - LEFT_OUT.keys() - WITHOUT_TAPS.keys()))
def test_refuses_what_a_run_refuses_in_its_words(tmp_path, name):
    found = doctor(family(tmp_path, name))
    assert found.refused == [refusal(capture, build(name))]
    assert (found.caches, found.taps, found.memory.total) == ([], None, None)


@pytest.mark.parametrize(("name", "tap"), WITHOUT_TAPS.items())
def test_tells_which_taps_cannot_be_captured(tmp_path, name, tap):
    model = build(name)
    found = doctor(family(tmp_path, name))
    assert found.refused == []
    assert found.taps.refused[tap] == refusal(capture, model, tap)
    assert found.taps.refused[tap] in found.would_refuse
    capture(model, *found.taps.captured)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt_oss", {"kv_bits": 8}),
        ("mamba", {"kv_bits": 8}),
        ("qwen3", {"kv_bits": 3, "kv_group_size": 7}),
        ("qwen3", {"max_kv_size": 4}),
    ],
)
def test_refuses_options_as_a_run_does_and_tells_the_rest(tmp_path, name, options):
    model = build(name)
    expected = refusal(make_prompt_cache, model, tiny_drafter(model), **options)
    found = doctor(family(tmp_path, name), **options)
    assert found.refused == [expected]
    assert found.caches == doctor(family(tmp_path, name)).caches
    assert any("without the cache's options" in note for note in found.notes)


def test_tells_of_options_that_were_not_asked_for(tmp_path):
    (line,) = doctor(family(tmp_path, "gpt_oss")).would_refuse
    assert line.startswith("kv_bits: the target (gpt_oss) keeps a sliding window")
    with pytest.warns(DriftWarning, match="max_kv_size changes nothing"):
        assert doctor(family(tmp_path, "gpt_oss"), max_kv_size=64).refused == []


def nbytes(network):
    return sum(array.nbytes for _, array in tree_flatten(network.parameters()))


def test_the_embedded_pair():
    model, _, drafter = load_demo()
    target = Target(model, drafter.taps)
    cache, drafter_cache = target.make_cache(), drafter.make_cache()
    for _ in range(0, ROWS, STEP_SIZE):  # what is not looked at need not be computed
        tokens = mx.zeros(STEP_SIZE, mx.int32)
        drafter.ingest(tokens, target(tokens, cache)[1], drafter_cache)
    found = doctor(str(TARGET), EMBEDDED, context=ROWS, prefill_step_size=STEP_SIZE)
    assert found.refused == found.notes == []
    family, own, memory = found.family, found.drafter, found.memory
    assert (family.model_file, family.num_layers, family.vocab_size) == ("llama", 8, 4096)
    assert family.quantization == {"group_size": 64, "bits": 5, "mode": "affine"}
    assert own.taps == list(drafter.taps)
    assert (own.feedback, own.window, own.sinks) == ("post", drafter.window, drafter.sinks)
    assert (memory.weights, memory.weights_from) == (nbytes(model), "tensors")
    assert own.nbytes - nbytes(drafter.network) == 4 * own.draft_vocab_size  # the map
    assert memory.caches == cache.nbytes
    assert memory.drafter_caches == drafter_cache.nbytes
    assert memory.taps == STEP_SIZE * 3 * 256 * 4
    assert memory.total == sum(
        [memory.weights, memory.caches, own.nbytes, memory.drafter_caches, memory.taps]
    )
    assert memory.fits is (memory.total <= memory.machine) is True


def test_a_config_alone_tells_the_same(tmp_path):
    shutil.copy(TARGET / "config.json", tmp_path)
    alone, found = doctor(str(tmp_path), EMBEDDED), doctor(str(TARGET), EMBEDDED)
    assert alone.memory.weights_from == "config"
    for what in ("family", "caches", "taps"):
        assert getattr(alone, what) == getattr(found, what)
    assert (alone.memory.weights, alone.memory.total) == (found.memory.weights, found.memory.total)


def test_layers_that_are_quantized_otherwise(tmp_path):
    """As in the config of mlx-lm's mixed quantizations."""
    own = {"group_size": 64, "bits": 8}
    left_out = {f"model.layers.0.mlp.{name}_proj": False for name in ("up", "down")}
    quantization = {"group_size": 32, "bits": 4, "lm_head": own, **left_out}
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = tiny_llama(mx.bfloat16, **sizes)
    nn.quantize(
        model, 32, 4, class_predicate=lambda path, m: hasattr(m, "to_quantized") and path != "x"
    )
    whole = nbytes(model)
    model = tiny_llama(mx.bfloat16, **sizes)

    def chosen(path, module):
        return quantization.get(path, hasattr(module, "to_quantized"))

    nn.quantize(model, 32, 4, class_predicate=chosen)
    config = vars(model.args) | {"torch_dtype": "bfloat16", "quantization": quantization}
    assert doctor(write(tmp_path, config)).memory.weights == nbytes(model) != whole


@pytest.mark.parametrize(
    ("changes", "dtype", "assumed"),
    [
        ({"torch_dtype": "float16"}, "float16", False),
        ({"torch_dtype": None, "dtype": "float32"}, "float32", False),
        ({"torch_dtype": None}, "bfloat16", True),
        ({"torch_dtype": ["bfloat16"]}, "bfloat16", True),
    ],
)
def test_the_dtype_is_the_configs(tmp_path, changes, dtype, assumed):
    found = doctor(family(tmp_path, "qwen3", **changes))
    assert found.family.dtype == dtype
    assert any("bfloat16 is assumed" in note for note in found.notes) == assumed


def test_weights_that_others_quantized_are_unknown_without_files(tmp_path):
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    memory = doctor(family(tmp_path, "qwen3", quantization_config=fp8)).memory
    assert (memory.weights, memory.weights_from, memory.total, memory.fits) == (None,) * 4


def test_a_drafter_that_does_not_fit(tmp_path):
    model = build("qwen3")
    found = doctor(family(tmp_path, "qwen3"), EMBEDDED)
    assert found.refused == [refusal(load_drafter, EMBEDDED, model)]
    assert found.drafter is None
    assert found.caches


def test_a_drafter_that_reads_what_cannot_be_captured(tmp_path):
    config = json.loads((TARGET / "config.json").read_text())
    sizes = ("hidden_size", "vocab_size", "num_hidden_layers")
    model = family(tmp_path, "iquestloopcoder", **{key: config[key] for key in sizes})
    found = doctor(model, EMBEDDED)
    (line,) = found.refused
    assert "tap 2 cannot be captured" in line


def test_a_drafter_to_be_converted_first(tmp_path):
    specforge(PLAIN, tmp_path / "head")
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    found = doctor(family(tmp_path / "t", "qwen3", **sizes), str(tmp_path / "head"))
    (line,) = found.refused
    assert "Convert it first: mlx-drift convert" in line
    assert found.drafter.taps == [2, 6, 9]
    found = doctor(str(tmp_path / "t"), str(tmp_path / "head" / "model.safetensors"))
    assert "is a file; expected a converted drafter's folder" in found.refused[0]


def test_a_drafter_for_fewer_ids_than_a_padded_target_has(tmp_path):
    specforge(PLAIN, tmp_path / "head")
    convert_drafter(str(tmp_path / "head"), tmp_path / "out")
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB + 3}
    found = doctor(family(tmp_path / "t", "qwen3", **sizes), str(tmp_path / "out"))
    assert found.refused == []
    assert any(f"made for {VOCAB} of the target's {VOCAB + 3} ids" in n for n in found.notes)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with the embedded pair: the target in its root, the drafter in a folder."""
    settle(monkeypatch, tmp_path / "home")
    folder = tmp_path / "repo"
    shutil.copytree(TARGET, folder)
    embedded_checkpoint(folder / "head")
    with StubHub(folder, "someone/pair").serve() as hub:
        set_endpoint(monkeypatch, hub.endpoint)
        yield hub
    utils.close_session()


def test_downloads_no_weights(hub):
    found = doctor("someone/pair", "someone/pair/head")
    assert found.refused == []
    size = (TARGET / "model.safetensors").stat().st_size
    assert (found.memory.weights, found.memory.weights_from) == (size, "sizes")
    assert found.caches == doctor(str(TARGET)).caches
    assert found.drafter.nbytes == doctor(str(TARGET), EMBEDDED).drafter.nbytes
    assert hub.sent < 100e3
    weights = [r for r in hub.requests if r.path.endswith(".safetensors")]
    assert all(r.method == "HEAD" or r.range for r in weights)
    assert not any(r.path.endswith("tokenizer.json") for r in hub.requests)


def test_weights_in_the_local_cache_are_looked_at(hub):
    for name in ("config.json", "model.safetensors"):
        build_module.find_hub_folder("someone/pair", None, "model").path(name)
    assert doctor("someone/pair").memory.weights_from == "tensors"


def test_the_known_drafter(hub, tmp_path):
    model = write(tmp_path / "Llama-3.3-70B-Instruct-4bit", LLAMA_70B)
    found = doctor(model, "auto")
    assert found.notes == [
        "drafter: yuhuili/EAGLE3-LLaMA3.3-Instruct-70B, by the name " + model + "."
    ]
    assert "no such repository on the Hub" in found.refused[0]
    (line,) = doctor(family(tmp_path / "other", "qwen3"), "auto").refused
    assert "no drafter is known for it" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type is None, expected the name of a family"),
        ({"model_type": "nothing"}, "mlx-lm cannot load it (Model type nothing not supported.)"),
        ({"model_type": "../models/llama"}, "not supported"),
        ({"model_type": "dbrx"}, "cannot be looked at without its weights"),
        ({"model_file": "evil.py"}, "add --trust-remote-code"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected at most 2048"),
        ({"layer_types": ["full_attention"] * 3000}, "layer_types has a length of 3000"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; expected at least 1"),
        ({"quantization": {"bits": 0, "group_size": 64}}, "bits is 0; expected at least 1"),
        ({"quantization": {"bits": 4}}, "mlx-lm cannot load it ('group_size')"),
        ({"quantization": {"bits": 4, "group_size": 64, "lm_head": {"group_size": 0}}}, "is 0;"),
        ({"hidden_size": 2**40}, "mlx-lm cannot load it"),
        ({"hidden_size": "many"}, "mlx-lm cannot load it"),
        ({"rms_norm_eps": {}}, ""),
        ({"num_hidden_layers": 0}, "mlx-lm cannot load it"),
        ({"vocab_size": 0}, "mlx-lm cannot load it"),
        ({"num_attention_heads": 3}, "mlx-lm cannot run the target (llama)"),
    ],
)
def test_a_strange_config_gives_one_line(cli, tmp_path, changes, message):
    code, _, err = cli("doctor", write(tmp_path, LLAMA_70B | changes))
    assert (code, len(err.splitlines())) == (1, 1)
    assert err.startswith("error: ")
    assert message in err


def test_no_code_of_a_checkpoint_is_run(refuses, tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('code from a checkpoint was run')")
    config = LLAMA_70B | {"model_file": "evil.py", "auto_map": {"AutoModel": "evil.Model"}}
    refuses("needs code of its own", "doctor", write(tmp_path, config))
    config.pop("model_file")
    assert doctor(write(tmp_path, config)).refused == []  # as in mlx-lm, auto_map says nothing


def test_a_model_that_is_missing_or_damaged(refuses, tmp_path):
    refuses("no such folder", "doctor", tmp_path / "none")
    refuses("config.json: No such file", "doctor", tmp_path)
    refuses("is a file", "doctor", TARGET / "config.json")
    (tmp_path / "config.json").write_text("{")
    refuses("not valid JSON", "doctor", tmp_path)
    shutil.copy(TARGET / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    refuses("cannot be read as safetensors", "doctor", tmp_path)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"model.norm.weight": mx.ones(256)})
    refuses("mlx-lm cannot load it (Missing", "doctor", tmp_path)


def test_numbers_that_make_no_sense():
    for numbers in ({"context": 0}, {"prefill_step_size": 0}, {"context": 10**12}):
        with pytest.raises(DriftError, match="context is"):
            doctor(str(TARGET), **numbers)


def test_the_command(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli("doctor", "--context", "300")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    for words in (
        "8 layers, hidden size 256, vocabulary 4096, activations in float32",
        "8 × keys and values: 8.2 kB a token, 4.2 MB at 300",
        "0 … 9: all can be captured",
        "eagle3, taps 2, 4, 5, feedback post, drafts 2048 tokens",
        "4.9 MB weights: the tensors on this machine",
        "refused nothing that was asked for",
    ):
        assert words in text


def test_prompt_lookup_needs_no_taps(cli, tmp_path):
    code, _, err = cli("doctor", family(tmp_path, "nanbeige"), "--drafter", "prompt-lookup")
    assert (code, err) == (0, "")
    assert cli("doctor", "--drafter", "prompt-lookup")[0] == 0


def test_the_command_tells_what_is_refused(cli, tmp_path):
    model = family(tmp_path, "gpt_oss")
    code, out, err = cli("doctor", model, "--kv-bits", 8, "--drafter", EMBEDDED)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "refused" in out
    code, out, err = cli("doctor", model, "--kv-bits", 8, "--drafter", EMBEDDED, "--json")
    report = json.loads(out)
    assert code == 1
    assert err == f"error: {model}: {report['refused'][0]} (and 1 more)\n"
    assert report["refused"][0].startswith("kv_bits: ")
    assert "made for a target whose hidden size is 256" in report["refused"][1]
    assert report == json.loads(json.dumps(doctor(model, EMBEDDED, kv_bits=8).to_dict()))
