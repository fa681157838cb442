"""The convention probe: finds what the metadata of the embedded drafters was scrambled to hide."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from safetensors.numpy import load_file, save_file

from kinds import random_head
from mlx_drift import DriftError, convert_drafter, generate, load_drafter
from mlx_drift.cli import main
from mlx_drift.convert.convert import Candidate
from mlx_drift.demo import DEMO, QUESTION, TARGET
from mlx_drift.errors import DriftWarning
from mlx_drift.measure.conventions import (
    UNTHINKABLE,
    ConventionProbe,
    Score,
    _forced,
    decide,
    round_by_round,
)
from tiny import HIDDEN, VOCAB, tiny_llama

TRAINED = {"pre": "eagle3", "post": "eagle3.1"}


@pytest.fixture(scope="module")
def pair():
    return load(str(TARGET))


@pytest.fixture(scope="module")
def probe(pair):
    return ConventionProbe(*pair, tokens=160)


def scrambled(folder, taps, feedback):
    """Writes an embedded drafter whose config denies how it was trained."""
    home = DEMO / TRAINED[feedback]
    config = json.loads((home / "config.json").read_text())
    true = config["taps"]
    folder.mkdir()
    save_file(load_file(home / "model.safetensors"), folder / "model.safetensors")
    same = "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
    same += "rms_norm_eps rope_theta max_position_embeddings draft_vocab_size fc_norm"
    keys = {key: config[key] for key in same.split()}
    keys |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "vocab_size": config["target"]["vocab_size"],
        "norm_output": feedback == "pre",
        "eagle_aux_hidden_state_layer_ids": true if taps == "input" else [i - 1 for i in true],
    }
    (folder / "config.json").write_text(json.dumps(keys))
    return folder, tuple(true)


@pytest.mark.parametrize("feedback", ["pre", "post"])
@pytest.mark.parametrize("taps", ["input", "output"])
def test_recovers_all_four_conventions(taps, feedback, tmp_path, probe):
    head, true = scrambled(tmp_path / "head", taps, feedback)
    out = tmp_path / "out"
    done = convert_drafter(str(head), out, target=str(TARGET), probe=probe)
    assert (done.config.taps, done.config.feedback) == (true, feedback)
    assert done.config.provenance["feedback"] == "probe"
    assert done.config.provenance["taps"] == f"file; probe: {taps} of layer"
    assert json.loads((out / "config.json").read_text())["feedback"] == feedback


def test_recovers_the_slots_of_a_block(tmp_path, pair, probe):
    """The embedded block drafter, whose config is made to say that slots predict what follows."""
    home, head = DEMO / "dflash", tmp_path / "head"
    config = json.loads((home / "config.json").read_text())
    stored, tensors = mx.load(str(home / "model.safetensors")), {}
    q = config["quantization"]
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            continue
        if f"{layer}.scales" in stored:
            parts = tensor, stored[f"{layer}.scales"], stored[f"{layer}.biases"]
            tensor = mx.dequantize(*parts, q["group_size"], q["bits"])
        tensors[name.replace("context_norm", "hidden_norm")] = np.array(tensor)
    tensors["t2d"] = np.isin(np.arange(4096), tensors["d2t"] + np.arange(2048))
    same = "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
    same += "rms_norm_eps rope_theta max_position_embeddings draft_vocab_size block_size"
    said = {key: config[key] for key in same.split()} | {
        "architectures": ["DFlashDraftModel"],
        "vocab_size": config["target"]["vocab_size"],
        "shift_label": True,
        "dflash_config": {
            "mask_token_id": config["mask_token_id"],
            "target_layer_ids": [tap - 1 for tap in config["taps"]],
        },
    }
    head.mkdir()
    save_file(tensors, head / "model.safetensors")
    (head / "config.json").write_text(json.dumps(said))
    done = convert_drafter(str(head), tmp_path / "out", target=str(TARGET), probe=probe)
    assert (done.config.slots, done.config.provenance["slots"]) == ("unshifted", "probe")
    assert any("settles slots = unshifted" in note for note in done.notes)


@pytest.mark.parametrize("kind", ["p-eagle", "eagle4", "eagle-attn"])
def test_round_by_round_a_head_drafts_what_its_chain_does(kind):
    model = tiny_llama()
    head = random_head(kind, model)
    text = [5, 9, 2, 44, 17, 3, 60, 11, 25, 8, 30, 12, 7, 19]
    taps = mx.random.normal((len(text) - 1, len(head.taps), HIDDEN), key=mx.random.key(5))
    for start in (4, 6):
        chain = list(_forced(head, text, start, taps, 3))
        rounds = list(round_by_round(head, text, start, taps, 3))
        for ours, theirs in zip(rounds, chain, strict=True):
            assert ours.shape == (len(text) - start, VOCAB)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dflash", "dspark rnn", "medusa", "hydra prefix"])
def test_every_kind_of_head_can_be_tried(kind, pair):
    head = random_head(kind, pair[0])
    probe = ConventionProbe(*pair, tokens=8)
    verdict = probe({("input", "pre"): Candidate(head.config, head.network, None)})
    assert verdict.taps is None
    (shares,) = probe.agreement.values()
    assert len(shares) == 3


def test_what_the_user_says_is_not_probed(tmp_path, probe):
    head, true = scrambled(tmp_path / "head", "output", "post")
    done = convert_drafter(
        str(head), tmp_path / "out", target=str(TARGET), probe=probe, taps="output", feedback="post"
    )
    assert (done.config.taps, done.config.feedback) == (true, "post")
    assert done.config.provenance["feedback"] == "override"
    assert done.notes == []


def score(agreement, likelihood, seed=0):
    """A score of three steps at 200 tokens, around the given means."""
    rng = np.random.default_rng(seed)
    return Score(rng.random((3, 200)) < agreement, rng.normal(likelihood, 0.5, (3, 200)))


def test_a_clear_winner():
    scores = {
        ("input", "pre"): score(0.5, -2.0),
        ("input", "post"): score(0.7, -1.0),
        ("output", "pre"): score(0.3, -3.0),
        ("output", "post"): score(0.4, -2.5),
    }
    verdict = decide(scores)
    assert (verdict.taps, verdict.feedback) == ("input", "post")
    assert "settles taps = input" in verdict.notes[0]
    assert "settles feedback = post" in verdict.notes[1]


def test_says_when_it_is_not_clear():
    scores = {
        ("input", "pre"): score(0.5, -2.0, seed=1),
        ("output", "pre"): score(0.5, -2.0, seed=2),
    }
    verdict = decide(scores)
    assert (verdict.taps, verdict.feedback) == (None, None)
    assert "does not settle taps" in verdict.notes[0]
    assert "--probe-on" in verdict.notes[0]
    assert len(verdict.notes) == 1  # one feedback was tried


def test_warns_of_a_drafter_that_is_hardly_ever_right():
    scores = {
        ("input", "pre"): score(0.05, -8.0),
        ("output", "pre"): score(0.04, -9.0, seed=1),
    }
    verdict = decide(scores)
    assert (verdict.taps, verdict.feedback) == (None, None)
    assert verdict.notes[0].startswith("the probe: even the best reading agrees with the target on")


def test_states_that_are_not_finite_are_told_and_never_win():
    broken = replace(score(0.0, UNTHINKABLE), finite=False)
    sound = score(0.8, -1)
    verdict = decide({("input", "pre"): broken, ("output", "pre"): sound})
    assert verdict.taps == "output"
    verdict = decide({("input", "pre"): broken, ("output", "pre"): broken})
    assert (verdict.taps, verdict.feedback) == (None, None)
    assert "not finite, whatever the reading" in verdict.notes[0]


def test_the_probe_sees_states_that_are_not_finite(tmp_path, pair):
    head, _ = scrambled(tmp_path / "head", "input", "pre")
    weights = load_file(head / "model.safetensors")
    weights["norm.weight"] = weights["norm.weight"] * np.nan
    save_file(weights, head / "model.safetensors")
    probe = ConventionProbe(*pair, tokens=20)
    done = convert_drafter(str(head), tmp_path / "out", target=str(TARGET), probe=probe)
    assert any("not finite, whatever the reading" in note for note in done.notes)


def test_two_names_of_one_reading_are_not_compared():
    same = score(0.5, -2.0)
    assert decide({("input", "pre"): same, ("output", "pre"): same}).notes == []


def test_tokens_outside_the_draft_vocabulary_do_not_count():
    better, worse = score(0.5, -1.0), score(0.5, -2.0)
    worse.log_likelihood[:, :50] = better.log_likelihood[:, :50] = np.nan
    assert better.lead(worse) > 3


def test_an_mtp_head_s_states_are_told_or_left_open_but_never_wrong(tmp_path, probe):
    """The gains of this target's final norm are nearly even: there is little to tell them by."""
    tensors = load_file(DEMO / "mtp" / "model.safetensors")
    layout = {"embedding_norm": "token_layernorm", "hidden_norm": "hidden_layernorm"}
    layout |= {"fc": "input_proj", "norm": "final_layernorm"}
    names = [name.removesuffix(".weight").removeprefix("layers.0.") for name in tensors]
    named = zip(names, tensors.values(), strict=True)
    tensors = {f"mtp_layers.0.{layout.get(name, name)}.weight": value for name, value in named}
    config = json.loads((DEMO / "mtp" / "config.json").read_text())
    stated = {"speculators_model_type": "mtp", "transformer_layer_config": config["block"]}
    (tmp_path / "head").mkdir()
    save_file(tensors, tmp_path / "head" / "model.safetensors")
    (tmp_path / "head" / "config.json").write_text(json.dumps(stated))
    done = convert_drafter(
        str(tmp_path / "head"), tmp_path / "out", target=str(TARGET), mtp=True, probe=probe
    )
    assert (done.config.taps, done.config.feedback) == (tuple(config["taps"]), "post")
    for what, note in zip(("taps", "feedback"), done.notes, strict=True):
        settled = done.config.provenance[what] == "probe"
        assert f"the probe {'settles' if settled else 'does not settle'} {what}" in note
    assert len(probe.agreement) == 4


def test_a_target_that_says_nothing(pair, tmp_path):
    head, _ = scrambled(tmp_path / "head", "output", "post")
    mute = ConventionProbe(*pair, prompts=())
    with pytest.raises(DriftError, match="answers none of the prompts"):
        convert_drafter(str(head), tmp_path / "out", target=str(TARGET), probe=mute)
    assert not (tmp_path / "out").exists()


def spoilt(folder):
    """An embedded drafter that is hardly ever right: its head's rows are in another order."""
    home = DEMO / "eagle3.1"
    tensors = load_file(home / "model.safetensors")
    tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"][::-1])
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((home / "config.json").read_text())
    return folder


def test_generate_warns_where_hardly_any_draft_is_accepted(pair, tmp_path):
    drafter = load_drafter(str(spoilt(tmp_path / "spoilt")), pair[0])
    messages = [{"role": "user", "content": QUESTION}]
    prompt = pair[1].apply_chat_template(messages, add_generation_prompt=True)
    with pytest.warns(DriftWarning, match="of the first drafts were accepted in 32 rounds"):
        generate(*pair, prompt, max_tokens=80, drafter=drafter, num_draft_tokens=1)


def test_the_command_probes_and_tells(tmp_path, capsys):
    head, true = scrambled(tmp_path / "head", "output", "post")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Show me the source of `shlex.quote`.\n\nWhat is `textwrap.dedent`?\n")
    arguments = ["convert", str(head), "--mlx-path", str(tmp_path / "out"), "--json"]
    arguments += ["--target", str(TARGET), "--probe-conventions", "--probe-on", str(prompts)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    out, error = capsys.readouterr()
    report = json.loads(out)
    assert report["taps"] == list(true)
    assert report["feedback"] == "post"
    assert set(report["probe"]) == {
        f"taps={taps} feedback={feedback}"
        for taps in ("input", "output")
        for feedback in ("pre", "post")
    }
    assert "the probe settles taps = output" in " ".join(error.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--probe-conventions"], "give it --target"),
        (["--probe-conventions", "--target", str(TARGET), "--probe-on", "/none"], "/none: cannot"),
    ],
)
def test_the_command_refuses(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(tmp_path), "--mlx-path", str(tmp_path / "out"), *flags])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err
