"""Heads whose target has another hidden size than they, whether their config says so or not."""

import json

import numpy as np
import pytest

from checkpoints import specforge_config, specforge_tensors, write_checkpoint
from mlx_drift import DriftError, convert_drafter, inspect_drafter, load_drafter, stream_generate
from mlx_drift.target.model import TargetShape
from tiny import HIDDEN, LAYERS, VOCAB, NoText, plain_greedy, tiny_llama

WIDE = 2 * HIDDEN
SHAPE = TargetShape(hidden_size=WIDE, vocab_size=VOCAB, num_layers=LAYERS)


def head(folder, width=WIDE, taps=3, fc_norm=False, embedding=True, **config):
    """A head of the usual width, for a target of another."""
    rng = np.random.default_rng(4)
    tensors = {k: t for k, t in specforge_tensors().items() if not k.startswith("fc_norm")}
    tensors["fc.weight"] = rng.normal(0, 0.1, (HIDDEN, taps * width)).astype(np.float16)
    if fc_norm:
        tensors |= {f"fc_norm.{i}.weight": np.ones(width, np.float16) for i in range(taps)}
    if embedding:
        tensors["embed_tokens.weight"] = rng.normal(0, 1, (VOCAB, HIDDEN)).astype(np.float16)
    config = specforge_config(fc_norm=fc_norm, norm_output=None, **config)
    return str(write_checkpoint(folder, tensors, config))


def ids(*layers):
    return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}}


@pytest.mark.parametrize("width", [WIDE, HIDDEN // 2])
@pytest.mark.parametrize(
    ("taps", "config"), [(3, ids(1, 2, 3)), (2, ids(1, 3)), (3, {"eagle_config": None})]
)
def test_the_given_target_tells_the_width(width, taps, config, tmp_path):
    source = head(tmp_path / "head", width, taps, **config)
    shape = TargetShape(hidden_size=width, vocab_size=VOCAB, num_layers=10)
    done = convert_drafter(source, tmp_path / "out", target=shape)
    assert (done.config.target.hidden_size, len(done.config.taps)) == (width, taps)
    note = f"hidden size is taken to be {width}: fc suits {taps} taps of the one that is given"
    assert note in done.notes[0]
    stated = head(tmp_path / "stated", width, taps, target_hidden_size=width, **config)
    convert_drafter(stated, tmp_path / "as stated", target=shape)
    weights = [tmp_path / out / "model.safetensors" for out in ("out", "as stated")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_it_drafts_for_that_target(tmp_path):
    convert_drafter(head(tmp_path / "head"), tmp_path / "out", target=SHAPE)
    model = tiny_llama(hidden_size=WIDE)
    drafter = load_drafter(str(tmp_path / "out"), model)
    prompt = [3, 1, 4]
    said = [r.token for r in stream_generate(model, NoText(), prompt, 20, drafter=drafter)]
    assert said == plain_greedy(model, prompt, 20)


def test_the_norms_of_the_taps_tell_the_width_without_a_target(tmp_path):
    done = convert_drafter(head(tmp_path / "head", fc_norm=True), tmp_path / "out")
    assert done.config.target.hidden_size == WIDE
    assert done.notes == ["the target's hidden size is taken to be 64: fc_norm has that width"]


def test_without_a_target_the_message_asks_for_it(tmp_path):
    with pytest.raises(DriftError, match=r"fc was made for 6, .* wider .*--target MODEL"):
        convert_drafter(head(tmp_path / "head"), tmp_path / "out")
    odd = head(tmp_path / "odd", 40)
    with pytest.raises(DriftError, match=r"multiple of the target's hidden size 32\).*--target"):
        convert_drafter(odd, tmp_path / "out")


def test_another_target_is_refused(tmp_path):
    source = head(tmp_path / "head", HIDDEN)
    with pytest.raises(DriftError, match="hidden size is 32, but this target's is 64"):
        convert_drafter(source, tmp_path / "out", target=SHAPE)


def test_a_stated_width_is_not_doubted(tmp_path):
    source = head(tmp_path / "head", target_hidden_size=HIDDEN, **ids(1, 2, 3))
    with pytest.raises(DriftError, match="names 3 tap layers"):
        convert_drafter(source, tmp_path / "out", target=SHAPE)


def test_without_an_embedding_of_its_own(tmp_path):
    source = head(tmp_path / "head", embedding=False)
    with pytest.raises(DriftError, match="needs an embed_tokens and an lm_head of its own"):
        convert_drafter(source, tmp_path / "out", target=SHAPE)


def test_inspect_tells_it(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    sizes = {"hidden_size": WIDE, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}
    (target / "config.json").write_text(json.dumps(sizes))
    found = inspect_drafter(head(tmp_path / "head"), str(target))
    assert found.passed
    assert found.values["target"]["hidden_size"] == WIDE
