"""The study of `examples/attention_drift`: what is trained there is what the package runs."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_drift import convert_drafter, load_drafter
from mlx_drift.target import TargetShape
from tiny import HIDDEN, VOCAB, tiny_llama

pytestmark = pytest.mark.torch

STUDY = Path(__file__).parents[1] / "examples" / "attention_drift"
LAYERS, LENGTH, STEPS = 8, 24, 3
ARMS = "neither norm_output fc_norm both norm_before_residual gated_attention".split()


@pytest.fixture
def recipe(monkeypatch):
    """The study's modules, which import PyTorch."""
    monkeypatch.setattr(sys, "path", [str(STUDY), *sys.path])
    import recipe

    return recipe


@pytest.fixture
def target(recipe):
    """A random target in PyTorch."""
    import torch

    from target import LlamaConfig

    torch.manual_seed(0)
    return recipe.Llama(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            head_dim=8,
        )
    )


def drafter_of(recipe, target, arm):
    """A random drafter of one arm, gains and all."""
    import torch

    from arms import ARMS as SWITCHES

    drafter = recipe.Eagle3(target.config, torch.arange(1, VOCAB, 2), SWITCHES[arm])
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return drafter


def test_cut_short_it_is_balanced(recipe):
    from arms import ARMS as SWITCHES
    from arms import runs

    order = list(runs())
    assert list(SWITCHES) == ARMS
    assert len({run.name for run in order}) == len(order) == 6 * 3 + 6 * 2
    assert [run.seed for run in order] == [0] * 12 + [1] * 12 + [2] * 6


@pytest.mark.parametrize("arm", ARMS)
def test_a_trained_drafter_is_the_same_in_the_package(recipe, target, arm, tmp_path):
    import torch

    drafter = drafter_of(recipe, target, arm)
    drafter.save(tmp_path / "torch", torch.float32, also_bin=False)
    shape = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
    convert_drafter(str(tmp_path / "torch"), tmp_path / "mlx", target=shape, strict=True)
    model = tiny_llama(num_hidden_layers=LAYERS)
    model.model.embed_tokens.weight = mx.array(target.model.embed_tokens.weight.detach().numpy())
    ours = load_drafter(str(tmp_path / "mlx"), model)

    tokens = torch.randint(0, VOCAB, (LENGTH + 1,))
    taps = torch.randn(LENGTH, 3, HIDDEN)
    reads = torch.cat([tokens, torch.zeros(STEPS, dtype=torch.long)])
    with torch.no_grad():
        chain = drafter.unroll(
            [tap[None] for tap in taps.unbind(1)],
            lambda step, _: target.model.embed_tokens(reads[1 + step :][:LENGTH])[None],
            STEPS,
        )
        theirs = [(drafter.lm_head(normed)[0], state[0]) for normed, state in chain]
    logits, states = ours.train_time_test(mx.array(tokens.numpy()), mx.array(taps.numpy()), STEPS)
    for step, expected in enumerate(theirs):
        valid = slice(LENGTH - step)
        for got, wanted in zip((logits[step], states[step]), expected, strict=True):
            np.testing.assert_allclose(np.array(got)[valid], wanted[valid], rtol=0, atol=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_saved_and_loaded_it_is_the_same(recipe, target, arm, tmp_path):
    import torch

    drafter = drafter_of(recipe, target, arm)
    drafter.save(tmp_path, torch.float32, also_bin=False)
    loaded = recipe.Eagle3.load(tmp_path, target.config)
    assert loaded.switches == drafter.switches
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("arm", ["both", "gated_attention"])
def test_following_only_the_chains_that_count_changes_no_loss(recipe, target, arm):
    import torch

    from features import Row
    from train import chain_losses
    from train_drafters import unrolled_losses

    drafter = drafter_of(recipe, target, arm)
    ids = torch.randint(0, VOCAB, (1, LENGTH))
    said = torch.arange(LENGTH)[None] % 12 > 6
    with torch.no_grad():
        streams = target.hidden_states(ids)
        row = Row(
            ids[0],
            torch.zeros(LENGTH, dtype=torch.bool),
            [streams[tap] for tap in drafter.taps],
            target.model.norm(streams[-1])[0],
        )
        row.counted[1:] = said[0, 1:] & drafter.t2d[target.logits(streams[-1])[0, :-1].argmax(-1)]
        wanted = unrolled_losses({"it": drafter}, target, ids, said, STEPS)["it"]
        assert torch.allclose(chain_losses(drafter, target, row, STEPS), wanted, atol=1e-6)
