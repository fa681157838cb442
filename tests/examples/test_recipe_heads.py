"""The heads of `examples/recipe` that feed nothing back are, converted, what was trained."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_drift import convert_drafter, load_drafter
from mlx_drift.target.model import TargetShape
from tiny import HIDDEN, VOCAB, tiny_llama

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYERS, LENGTH, BLOCK, MASK = 8, 24, 5, 2
STEPS = {"dflash": BLOCK - 1, "medusa": 3}


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    """Makes the examples importable."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


def random_head(kind, target):
    """A random head in PyTorch, gains and all."""
    import torch

    from recipe.dflash import DFlash
    from recipe.medusa import Medusa

    ids = torch.arange(1, VOCAB, 2)
    made = DFlash(target.config, ids, 2, BLOCK, MASK) if kind == "dflash" else None
    head = made or Medusa(target.config, ids, STEPS[kind])
    head.init_from_target(target)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


@pytest.mark.torch
@pytest.mark.parametrize("kind", STEPS)
def test_a_trained_head_is_the_same_in_the_package(kind, tmp_path):
    import torch

    from recipe.rows import Row
    from recipe.target import Llama, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "head_dim": 8}
    target = Llama(LlamaConfig(**sizes, num_hidden_layers=LAYERS))
    head = random_head(kind, target)
    head.save(tmp_path / "torch", torch.float32)
    again = type(head).load(tmp_path / "torch", target if kind == "dflash" else target.config)
    shape = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
    convert_drafter(str(tmp_path / "torch"), tmp_path / "mlx", target=shape, strict=True)
    model = tiny_llama(num_hidden_layers=LAYERS)
    model.model.embed_tokens.weight = mx.array(target.model.embed_tokens.weight.detach().numpy())
    ours = load_drafter(str(tmp_path / "mlx"), model)

    ids, said = torch.randint(0, VOCAB, (LENGTH + 1,)), torch.ones(LENGTH, dtype=torch.bool)
    states = torch.randn(LENGTH, len(ours.taps), HIDDEN)
    row = Row(ids[:LENGTH], said, ids[1:], [tap[None] for tap in states.unbind(1)], states[:, -1])

    def read(step, _):
        assert step == 0, "nothing is fed back"
        return target.model.embed_tokens(ids[1:])[None]

    some = torch.tensor([0, 3, LENGTH - 1])
    steps = STEPS[kind]
    with torch.no_grad():
        chains = again.unroll(again.start(row), read, steps, some)
        drafts = [again.choose(target, normed[0], step) for step, (normed, _) in enumerate(chains)]
    for n, last in enumerate(some.tolist()):
        cache = ours.make_cache()
        tokens, taps = mx.array(ids[1 : last + 2].numpy()), mx.array(states[: last + 1].numpy())
        ours.ingest(tokens, taps, cache)
        for k in (1, steps, steps + 2):
            wanted = [draft[n].item() for draft in drafts][:k]
            assert ours.propose(k, cache).tokens.tolist() == wanted
