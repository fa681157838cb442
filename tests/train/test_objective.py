"""What heads are trained on: losses as they are defined, rows as the target sees them."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_drift import DriftError, convert_drafter, load_demo
from mlx_drift.demo import DEMO
from mlx_drift.drafters.load import WEIGHTS
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.target.model import Target
from mlx_drift.train.head import load_trainable
from mlx_drift.train.head_file import write_head
from mlx_drift.train.losses import LOSSES, acceptance
from mlx_drift.train.objective import Objective, Row
from mlx_drift.train.rows import see

P, Q = [0.7, 0.2, 0.1], [0.2, 0.2, 0.6]


@pytest.fixture(scope="module")
def pair():
    """The embedded target, its head to be trained, and a text of the target's own as it sees it."""
    model, tokenizer, _ = load_demo()
    drafter = load_trainable(DEMO / "eagle3.1", model)
    target = Target(model, drafter.taps)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    tokens = list(prompt)
    for _ in range(12):
        logits, _ = target(mx.array(tokens), target.make_cache())
        tokens.append(mx.argmax(logits[-1]).item())
    learned = mx.arange(len(tokens)) >= len(prompt)
    return drafter, target, see(target, drafter, mx.array(tokens), learned), len(prompt)


def test_losses_are_what_they_are_called():
    logits, target = mx.log(mx.array([Q])), mx.log(mx.array([P]))
    overlap = 0.2 + 0.2 + 0.1
    entropy = -sum(p * math.log(p) for p in P)
    cross = -sum(p * math.log(q) for p, q in zip(P, Q, strict=True))
    weight = math.exp(-3 * overlap)
    expected = {
        "soft-ce": cross,
        "tv": 1 - overlap,
        "nla": -math.log(overlap),
        "lk": weight * (cross - entropy) + (1 - weight) * (1 - overlap),
    }
    assert expected.keys() == LOSSES.keys()
    for name, value in expected.items():
        assert LOSSES[name](logits, target).item() == pytest.approx(value, rel=1e-5)
    assert acceptance(logits, target).item() == pytest.approx(overlap)


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_is_lower_than_the_targets_own(name):
    logits = mx.random.normal((5, 16), key=mx.random.key(1))
    own, other = (LOSSES[name](x, logits) for x in (logits, mx.roll(logits, 1, axis=-1)))
    assert mx.all(own < other).item()
    gradient = mx.grad(lambda x: LOSSES[name](x, logits).sum())(logits)
    if name != "tv":  # whose gradient jumps there
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_a_row_counts_what_the_assistant_says(pair):
    drafter, _, row, prompt = pair
    assert row.taps.shape == (row.tokens.size - 1, len(drafter.taps), 256)
    assert row.logits.shape == (row.tokens.size, drafter.config.draft_vocab_size)
    counted = np.flatnonzero(np.array(row.counted))
    known = np.array(drafter.drafts(row.tokens))
    said = [i for i in range(prompt - 1, row.tokens.size - 1) if known[i + 1]]
    assert counted.tolist() == said  # what is said before the first token of the answer, too
    likeliest = drafter.choose(row.logits)
    assert mx.array_equal(likeliest[mx.array(said)], row.tokens[mx.array(said) + 1])


def test_what_does_not_count_changes_nothing(pair):
    drafter, _, row, _ = pair
    noise = mx.random.normal(row.logits.shape, key=mx.random.key(0))
    logits = mx.where(row.counted[:, None], row.logits, noise)
    other = Row(row.tokens, row.taps, logits, row.counted)
    assert Objective()(drafter, row).item() == Objective()(drafter, other).item()
    none = Row(row.tokens, row.taps, row.logits, mx.zeros_like(row.counted))
    assert Objective()(drafter, none).item() == 0


def test_steps_beyond_the_text_are_nothing(pair):
    drafter, _, row, _ = pair
    short = Row(row.tokens[-3:], row.taps[-2:], row.logits[-3:], row.counted[-3:])
    assert Objective(2)(drafter, short).item() == Objective(9)(drafter, short).item()


def test_a_text_is_learned(pair):
    """The network that decodes is the one that is trained; the target's embedding stays."""
    _, target, row, _ = pair
    drafter = load_trainable(DEMO / "eagle3.1", target.model)
    step = nn.value_and_grad(drafter.network, lambda: Objective()(drafter, row))
    optimizer = optim.AdamW(1e-4, bias_correction=True)
    losses = []
    for _ in range(4):
        loss, gradients = step()
        optimizer.update(drafter.network, gradients)
        mx.eval(drafter.network.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_a_quantized_head_is_trained_from_its_dequantized_values(pair, tmp_path):
    _, target, row, _ = pair
    folder, floats = tmp_path / "quantized", read_safetensors(DEMO / "eagle3.1" / WEIGHTS)
    convert_drafter(str(DEMO / "eagle3.1"), folder, quantize=True, q_bits=8)
    drafter = load_trainable(folder, target.model)
    assert drafter.config.quantization is None
    trained = dict(tree_flatten(drafter.network.trainable_parameters()))
    for name, value in trained.items():
        np.testing.assert_allclose(value, floats[name].astype(mx.float32), atol=0.02)
    loss, gradients = nn.value_and_grad(drafter.network, lambda: Objective()(drafter, row))()
    assert np.isfinite(loss.item())
    assert dict(tree_flatten(gradients)).keys() == trained.keys()
    write_head(tmp_path / "out", trained, folder)
    written = load_trainable(tmp_path / "out", target.model)
    assert dict(tree_flatten(written.network.parameters())).keys() == trained.keys()


def test_a_folder_that_is_no_head_is_told(tmp_path):
    with pytest.raises(DriftError, match=r"lacks config\.json|config\.json"):
        load_trainable(tmp_path, None)
