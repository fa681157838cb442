"""The draft vocabulary: what of `d2t` and `t2d` is read how, and what it drafts."""

import json

import mlx.core as mx
import numpy as np
import pytest

from checkpoints import DRAFT_VOCAB, specforge_config, specforge_tensors, write_checkpoint
from mlx_drift import DriftError, convert_drafter, inspect_drafter, load_drafter, stream_generate
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.target.model import TargetShape
from tiny import LAYERS, VOCAB, NoText, plain_greedy, tiny_llama

PLACES = np.arange(DRAFT_VOCAB)
BY_FREQUENCY = np.random.default_rng(1).permutation(VOCAB)[:DRAFT_VOCAB]
ASCENDING = np.sort(BY_FREQUENCY)
FIRST = np.isin(np.arange(VOCAB), PLACES)
OFFSETS = (BY_FREQUENCY - PLACES).astype(np.int64)
T2D = np.isin(np.arange(VOCAB), BY_FREQUENCY)
UNFILLED = np.zeros(VOCAB, bool)


def head(folder, d2t, t2d, rows=DRAFT_VOCAB, **config):
    """A head whose draft vocabulary is said so."""
    tensors = {k: t for k, t in specforge_tensors().items() if k not in ("d2t", "t2d")}
    weight = np.random.default_rng(2).normal(0, 0.3, (rows, 32)).astype(np.float16)
    tensors |= {"lm_head.weight": weight}
    tensors |= {k: t for k, t in (("d2t", d2t), ("t2d", t2d)) if t is not None}
    return write_checkpoint(
        folder, tensors, specforge_config(draft_vocab_size=rows, norm_output=None, **config)
    ).as_posix()


def ids_of(out):
    """The target's ids of a converted head, in the order of its rows; None for its own."""
    d2t = read_safetensors(out / "model.safetensors").get("d2t")
    return None if d2t is None else (np.array(d2t) + np.arange(d2t.size)).tolist()


READ = {
    "by frequency": (OFFSETS, None, BY_FREQUENCY, []),
    "by frequency, marked": (OFFSETS, T2D, BY_FREQUENCY, []),
    "by frequency, int32": (OFFSETS.astype(np.int32), T2D, BY_FREQUENCY, []),
    "by frequency, as ids": (BY_FREQUENCY, T2D, BY_FREQUENCY, []),
    "by frequency, as ids that none marks": (BY_FREQUENCY, None, BY_FREQUENCY, ["token ids"]),
    "t2d never filled": (OFFSETS, UNFILLED, BY_FREQUENCY, []),
    "t2d of numbers": (OFFSETS, T2D.astype(np.int64), BY_FREQUENCY, []),
    "ascending": (ASCENDING - PLACES, T2D, ASCENDING, []),
    "ascending, as ids": (ASCENDING, T2D, ASCENDING, []),
    "the first tokens, marked": (0 * OFFSETS, FIRST, PLACES, []),
    "no d2t": (None, T2D, ASCENDING, ["made of t2d"]),
}


@pytest.mark.parametrize("name", READ)
def test_a_vocabulary_is_read(name, tmp_path):
    d2t, t2d, expected, told = READ[name]
    source = head(tmp_path / "head", d2t, t2d)
    done = convert_drafter(source, tmp_path / "out")
    assert ids_of(tmp_path / "out") == expected.tolist()
    assert len(done.notes) == len(told)
    assert all(part in note for part, note in zip(told, done.notes, strict=True))
    found = inspect_drafter(source)
    assert found.passed
    assert found.notes == done.notes
    # What was settled once is not asked again, though the t2d is gone.
    convert_drafter(str(tmp_path / "out"), tmp_path / "again")
    assert ids_of(tmp_path / "again") == expected.tolist()
    load_drafter(str(tmp_path / "again"), tiny_llama())


TWICE = OFFSETS.copy()
TWICE[1] = OFFSETS[0] - 1
OUTSIDE = OFFSETS.copy()
OUTSIDE[3] = VOCAB
REFUSED = {
    "zeros": (0 * OFFSETS, None, "all zeros for a draft vocabulary of 40 of 64"),
    "zeros, t2d never filled": (0 * OFFSETS, UNFILLED, "all zeros"),
    "zeros, other tokens marked": (0 * OFFSETS, T2D, "d2t and t2d disagree"),
    "a token twice": (TWICE, None, "two ids to one token"),
    "a token twice, marked": (TWICE, T2D, "d2t and t2d disagree"),
    "outside": (OUTSIDE, None, "outside the target's vocabulary of 64"),
    "below": (OFFSETS - VOCAB, None, "outside the target's vocabulary"),
    "wrapped round": (OFFSETS.astype(np.uint64), UNFILLED, None),
    "either": (np.arange(20), None, "may hold offsets or token ids"),
    "other tokens": (OFFSETS, ~T2D, r"disagree on the draft vocabulary \(40 and 24 tokens\)"),
    "no d2t, too few marked": (None, ~T2D, "t2d marks 24 tokens for a draft vocabulary of 40"),
    "neither": (None, None, "lacks d2t"),
    "too short": (OFFSETS[:-1], T2D, "39 ids for a draft vocabulary of 40"),
    "floats": (OFFSETS.astype(np.float32), T2D, "expected a row of at most"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_vocabulary_is_refused(name, tmp_path):
    d2t, t2d, message = REFUSED[name]
    rows = 20 if name == "either" else DRAFT_VOCAB
    source = head(tmp_path / "head", d2t, t2d, rows)
    if message is None:  # bits that mean the same
        convert_drafter(source, tmp_path / "out")
        assert ids_of(tmp_path / "out") == BY_FREQUENCY.tolist()
        return
    with pytest.raises(DriftError, match=message):
        convert_drafter(source, tmp_path / "out")
    assert [check.name for check in inspect_drafter(source).checks if not check.passed] == ["d2t"]


@pytest.mark.parametrize("t2d", [UNFILLED, ~UNFILLED, T2D, None])
@pytest.mark.parametrize("d2t", [np.zeros(VOCAB, np.int64), np.arange(VOCAB), None])
def test_buffers_of_equal_vocabularies_say_nothing(d2t, t2d, tmp_path):
    source = head(tmp_path / "head", d2t, t2d, VOCAB)
    assert convert_drafter(source, tmp_path / "out").notes == []
    assert ids_of(tmp_path / "out") is None
    assert inspect_drafter(source).passed


def test_equal_vocabularies_in_another_order(tmp_path):
    order = np.random.default_rng(3).permutation(VOCAB)
    source = head(tmp_path / "head", order - np.arange(VOCAB), None, VOCAB)
    convert_drafter(source, tmp_path / "out")
    assert ids_of(tmp_path / "out") == order.tolist()


def test_a_map_for_a_head_that_is_the_targets_own(tmp_path):
    tensors = specforge_tensors()
    del tensors["lm_head.weight"], tensors["t2d"]
    tensors["d2t"] = np.random.default_rng(3).permutation(VOCAB) - np.arange(VOCAB)
    source = write_checkpoint(tmp_path / "head", tensors, specforge_config(draft_vocab_size=VOCAB))
    with pytest.raises(DriftError, match=r"no lm_head.weight"):
        convert_drafter(str(source), tmp_path / "out")
    write_checkpoint(source, tensors | {"d2t": np.zeros(VOCAB, np.int64)})
    config = specforge_config(draft_vocab_size=VOCAB)
    (source / "config.json").write_text(json.dumps(config))
    convert_drafter(str(source), tmp_path / "out")


def test_the_order_of_the_rows_changes_nothing(tmp_path):
    """Rows by frequency draft what the same rows in ascending order draft."""
    order = np.argsort(BY_FREQUENCY)
    tensors = specforge_tensors(np.float32) | {"d2t": OFFSETS}
    del tensors["t2d"]
    rows = tensors["lm_head.weight"]
    sorted_rows = {"lm_head.weight": rows[order], "d2t": ASCENDING - PLACES}
    model = tiny_llama()
    drafted = []
    for name, changed in (("frequency", {}), ("ascending", sorted_rows)):
        source = write_checkpoint(tmp_path / name, tensors | changed)
        convert_drafter(str(source), tmp_path / f"out {name}")
        drafter = load_drafter(str(tmp_path / f"out {name}"), model)
        cache = drafter.make_cache()
        drafter.ingest(mx.array([1, 2, 3]), mx.ones((3, 3, 32)), cache)
        spread = drafter._spread(cache.draft_logits)
        drafted.append((drafter.propose(6, cache).tokens.tolist(), np.array(spread)))
    (by_frequency, logits), (ascending, expected) = drafted
    assert by_frequency == ascending
    np.testing.assert_allclose(logits, expected, atol=1e-5)  # a matrix product by another order
    assert np.isinf(logits[0]).nonzero()[0].tolist() == np.flatnonzero(~T2D).tolist()


def test_a_converted_map_is_checked_again_at_load(tmp_path):
    convert_drafter(head(tmp_path / "head", OFFSETS, T2D), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = read_safetensors(path)
    mx.save_safetensors(str(path), tensors | {"d2t": mx.array(TWICE)})
    with pytest.raises(DriftError, match="two draft ids to one token"):
        load_drafter(str(tmp_path / "out"), tiny_llama())


PADDED = VOCAB + 3
SHAPE = TargetShape(hidden_size=32, vocab_size=PADDED, num_layers=LAYERS)


@pytest.mark.parametrize("temp", [0.0, 1.0])
@pytest.mark.parametrize("embedding", [False, True], ids=["", "own embedding"])
@pytest.mark.parametrize("kind", ["reduced", "whole", "whole by config", "target's head"])
@pytest.mark.filterwarnings("ignore:only .* of the first drafts")
def test_a_target_with_padding(kind, embedding, temp, tmp_path):
    """A head made for 64 of 67 ids runs, and says so; its text is the target's, padding and all."""
    model = tiny_llama(vocab_size=PADDED)
    d2t, t2d, rows = (OFFSETS, T2D, DRAFT_VOCAB) if kind == "reduced" else (None, None, VOCAB)
    size = PADDED if kind == "whole by config" else VOCAB
    source = tmp_path / "head"
    head(source, d2t, t2d, rows, vocab_size=size)
    tensors = {k: np.array(t) for k, t in read_safetensors(source / "model.safetensors").items()}
    if kind == "target's head":
        del tensors["lm_head.weight"]
    if embedding:
        tensors["embed_tokens.weight"] = np.ones((size, 32), np.float16)
    write_checkpoint(source, tensors, json.loads((source / "config.json").read_text()))
    done = convert_drafter(str(source), tmp_path / "out", target=SHAPE)
    told = [] if size == PADDED else ["the drafter was made for 64 of the target's 67 ids"]
    assert [note.partition(";")[0] for note in done.notes] == told
    drafter = load_drafter(str(tmp_path / "out"), model)
    prompt = [PADDED - 1, 5, 9]  # a padding id, which the head's own embedding lacks
    said = [
        response.token
        for response in stream_generate(
            model, NoText(), prompt, 40, drafter=drafter, temp=temp, seed=1
        )
    ]
    if temp == 0.0:
        assert said == plain_greedy(model, prompt, 40)
    assert all(0 <= token < PADDED for token in said)


@pytest.mark.parametrize("vocab_size", [63, 69, 128, 32000])
def test_what_is_more_than_padding_is_another_target(vocab_size, tmp_path):
    source = head(tmp_path / "head", OFFSETS, T2D)
    convert_drafter(source, tmp_path / "out")
    with pytest.raises(DriftError, match="vocabulary size is 64"):
        load_drafter(str(tmp_path / "out"), tiny_llama(vocab_size=vocab_size))


def test_padding_is_inspected(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    sizes = {"hidden_size": 32, "vocab_size": PADDED, "num_hidden_layers": LAYERS}
    (target / "config.json").write_text(json.dumps(sizes))
    found = inspect_drafter(head(tmp_path / "head", OFFSETS, T2D), str(target))
    assert found.passed
    detail = next(check.detail for check in found.checks if check.name == "vocabulary")
    assert detail == "made for 64, the target has 67: the others are taken for padding"
