"""EAGLE-1/2 heads against an independent NumPy writing of SafeAILab/EAGLE `cnets1.py`."""

import mlx.core as mx
import numpy as np
import pytest

from dialects import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, eagle, eagle_head
from mlx_drift import convert_drafter, load_drafter
from mlx_drift.target.model import TargetShape
from tiny import VOCAB, tiny_llama

SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
STEPS = 3


def rotate(x, position):
    """RoPE of `[heads, HEAD_DIM]`, rotate-half, theta 10000."""
    angles = position / 10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = (np.concatenate([f(angles)] * 2) for f in (np.cos, np.sin))
    a, b = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-b, a], axis=-1) * sin


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean() + 1e-5) * weight


def chain(weights, tokens, features):
    """The outputs of a chain that starts at the last feature, one row at a time.

    tokens[i] comes after features[i]; tokens beyond the features are what the chain was given.
    """
    name = "layers.0.self_attn"
    keys, values, outputs = [], [], []
    for position, token in enumerate(tokens):
        feature = features[position] if position < len(features) else outputs[-1]
        both = np.concatenate([weights["embed_tokens.weight"][token], feature])
        x = weights["fc.weight"] @ both + weights["fc.bias"]

        def project(letter, heads, x=x):
            y = weights[f"{name}.{letter}_proj.weight"] @ x
            y = y + weights.get(f"{name}.{letter}_proj.bias", 0)
            return y.reshape(heads, HEAD_DIM)

        q = rotate(project("q", HEADS), position)
        keys.append(rotate(project("k", KV_HEADS), position))
        values.append(project("v", KV_HEADS))
        heads = []
        for h in range(HEADS):
            group = h // (HEADS // KV_HEADS)
            scores = np.array([q[h] @ k[group] for k in keys]) / np.sqrt(HEAD_DIM)
            scores = np.exp(scores - scores.max())
            heads.append((scores / scores.sum()) @ np.array([v[group] for v in values]))
        x = x + weights[f"{name}.o_proj.weight"] @ np.concatenate(heads)
        y = rms_norm(x, weights["layers.0.post_attention_layernorm.weight"])
        gate = weights["layers.0.mlp.gate_proj.weight"] @ y
        up = weights["layers.0.mlp.up_proj.weight"] @ y
        outputs.append(
            x + weights["layers.0.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        )
    return outputs[len(features) - 1 :]


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_equals_numpy(qkv_bias, tmp_path):
    made = eagle_head(qkv_bias=qkv_bias)
    eagle(made, tmp_path / "head")
    convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=SHAPE)
    model = tiny_llama(num_hidden_layers=LAYERS)
    drafter = load_drafter(str(tmp_path / "out"), model)
    assert drafter.taps == (LAYERS + 1,)  # the target's final norm

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, 9)
    features = rng.normal(0, 1, (8, HIDDEN)).astype(np.float32)
    logits, states = drafter.train_time_test(mx.array(tokens), mx.array(features[:, None]), STEPS)
    weights = {name: t.astype(np.float64) for name, t in made.tensors.items()}
    for row in range(8 - STEPS):
        expected = chain(weights, tokens[1 : row + 2 + STEPS - 1], features[: row + 1])
        for step in range(STEPS):
            np.testing.assert_allclose(states[step, row], expected[step], rtol=1e-5, atol=1e-4)
            head = np.array(model.lm_head.weight) @ expected[step]
            np.testing.assert_allclose(logits[step, row], head, rtol=1e-5, atol=1e-3)
