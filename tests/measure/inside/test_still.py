"""What there is to see of drafters that recycle nothing: where their rows look."""

import json

import mlx.core as mx
import numpy as np
import pytest

from kinds import BLOCK, random_head
from mlx_drift import DriftError, stream_generate
from mlx_drift.drafters.block_cache import BlockCache
from mlx_drift.measure.inside.drift import Settings, drift
from mlx_drift.measure.inside.drift_plot import plot_drift
from mlx_drift.measure.inside.still import WatchedPasses
from mlx_drift.watch.sums import CLASSES
from tiny import NoText, tiny_llama

PROMPTS = [[5, 9, 2, 44, 17, 3, 60, 11], [25, 8, 30]]
SETTINGS = Settings(steps=3, max_tokens=16, recent=2)
ATTEND = ["p-eagle", "dflash", "dflash sliding", "dflash causal", "dspark", "dspark rnn"]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by_slot", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (None, 1), (5, 0), (4, 2), (2, 1)])
def test_weights_are_what_a_block_attended_with(window, sinks, by_slot, causal):
    """With them, the values make what `attend` returned; whatever is not seen has none."""
    mx.random.seed(4)
    cache = BlockCache(window, sinks, by_slot and window is not None, causal)
    values = mx.random.normal((1, 1, 15, 6))
    cache.append(mx.random.normal((1, 1, 11, 6)), values[:, :, :11])
    queries, keys = mx.random.normal((1, 2, 4, 6)), mx.random.normal((1, 1, 4, 6))
    attended = cache.attend(queries, keys, values[:, :, 11:], 0.4)
    weights = cache.weights(queries, 0.4)
    assert weights.shape == (2, 4, 15)
    np.testing.assert_allclose(weights @ values[0], attended[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), np.ones((2, 4)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ATTEND)
def test_tokens_and_acceptance_are_those_of_nobody_watching(kind, model):
    head = random_head(kind, model)
    found = drift(model, NoText(), {"x": head}, PROMPTS, SETTINGS)
    assert found.arms == ()
    accepted = rounds = 0
    for prompt in PROMPTS:
        plain = list(stream_generate(model, NoText(), prompt, 16, drafter=head, num_draft_tokens=3))
        seen = head.through(WatchedPasses(head.network))
        watched = stream_generate(model, NoText(), prompt, 16, drafter=seen, num_draft_tokens=3)
        assert [r.token for r in watched] == [r.token for r in plain]
        accepted += sum(plain[-1].statistics.accepted)
        rounds += plain[-1].statistics.rounds
    (still,) = found.still
    assert still.acceptance_length.value == pytest.approx(accepted / rounds)
    looks = still.attention
    assert len(looks.entropy) == 3
    assert list(looks.attention) == list(CLASSES)
    for step in range(3):
        assert sum(of[step].value for of in looks.attention.values()) == pytest.approx(1, abs=1e-5)
    block = [of.value for of in looks.attention["drafts"]]
    if kind == "p-eagle":  # its first draft comes from a committed row
        assert block[0] == 0 < block[1]
    else:
        assert all(0 < share < 1 for share in block)
    assert len(looks.heads) == 2 * 2  # layers, heads


def test_a_slot_of_even_attention_looks_at_all_rows_alike(model):
    """Without an opinion every key weighs the same: the shares count rows."""
    head = random_head("dflash", model)
    for layer in head.network.layers:
        layer.self_attn.q_norm.weight = mx.zeros_like(layer.self_attn.q_norm.weight)
    (still,) = drift(model, NoText(), {"x": head}, [PROMPTS[0]], SETTINGS).still
    seen = head.through(WatchedPasses(head.network))
    shares = []
    for _ in stream_generate(model, NoText(), PROMPTS[0], 16, drafter=seen, num_draft_tokens=3):
        shares += [BLOCK / (committed + BLOCK) for _, committed in seen.network.take()]
    for share in still.attention.attention["drafts"]:
        assert share.value == pytest.approx(np.mean(shares), abs=1e-6)


@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra prefix"])
def test_heads_that_look_at_nothing_have_their_acceptance(kind, model):
    found = drift(model, NoText(), {"x": random_head(kind, model)}, PROMPTS, SETTINGS)
    (still,) = found.still
    assert still.attention is None
    told = json.loads(json.dumps(found.to_dict()))
    assert told["recycle_nothing"][0].keys() == {"drafter", "acceptance_length", "attention"}


@pytest.mark.parametrize("kind", ["eagle-attn", "eagle4"])
def test_chains_of_new_kinds_drift_as_others(kind, model):
    found = drift(model, NoText(), {"x": random_head(kind, model)}, PROMPTS, SETTINGS)
    assert [arm.drafter for arm in found.arms] == ["x"]
    assert found.still == ()


def test_what_has_nothing_to_change_or_draw_is_refused(model, tmp_path):
    heads = {"x": random_head("dflash", model)}
    with pytest.raises(DriftError, match="x recycles no state, so pin has nothing to change"):
        drift(model, NoText(), heads, PROMPTS, SETTINGS, ["pin"])
    found = drift(model, NoText(), heads, PROMPTS, SETTINGS)
    with pytest.raises(DriftError, match="leave --plot out"):
        plot_drift(found, tmp_path)
