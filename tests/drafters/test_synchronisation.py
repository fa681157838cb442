"""One synchronisation a round, whatever drafts: the host waits for the verdict and nothing else.

Every way from an array to the host is counted, wherever it is taken in a round.
"""

import mlx.core as mx
import pytest

from kinds import KINDS, random_head
from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.decode.sampling import GREEDY, Sampling
from mlx_drift.decode.speculate import every, prefill, speculate
from mlx_drift.decode.trees import prepare_trees
from mlx_drift.target.model import Target
from tiny import tiny_drafter, tiny_llama

PROMPT = [5, 9, 2, 44, 17, 3]
LENGTH = 12
OF_AN_ARRAY = "tolist item __array__ __bool__ __int__ __float__ __index__".split()
WAYS = [*((mx.array, name) for name in OF_AN_ARRAY), (mx, "eval"), (mx, "synchronize")]
CONFIDENT = [kind for kind, config in KINDS.items() if config.get("confidence")]
MODES = {"greedy": GREEDY, "sampled": Sampling(temp=0.8), "tree": GREEDY}
ROUNDS = [(kind, mode) for kind in ("eagle3", *KINDS) for mode in MODES]


def waits_of(drafter, monkeypatch, mode="greedy"):
    """The rounds that a text takes, and what was waited for in them."""
    target = Target(drafter.model, drafter.taps)
    caches = target.make_cache(), drafter.make_cache()
    for _ in prefill(target, drafter, mx.array(PROMPT), *caches, cut=every(4)):
        pass
    draft_length = DraftLength(fixed=4)
    draft_length.tree = mode == "tree"
    if mode == "tree":
        prepare_trees(drafter, target)
    last, key = mx.array(PROMPT[-1:]), mx.random.key(0)
    rounds = speculate(
        target,
        drafter,
        last,
        *caches,
        num_draft_tokens=draft_length,
        max_tokens=LENGTH,
        stop_tokens=frozenset(),
        sampling=MODES[mode],
        key=key,
        history=PROMPT,
    )
    waits = []
    with monkeypatch.context() as patched:
        for owner, name in WAYS:
            patched.setattr(owner, name, counted(name, getattr(owner, name), waits))
        done = list(rounds)
    assert sum(len(round.tokens) for round in done) == LENGTH
    assert max(round.tested for round in done) > 0
    return done, waits


def counted(name, way, waits):
    def take(*inputs, **keywords):
        waits.append(name)
        return way(*inputs, **keywords)

    return take


@pytest.mark.parametrize(("kind", "mode"), ROUNDS)
def test_a_round_waits_once(kind, mode, monkeypatch):
    model = tiny_llama()
    drafter = tiny_drafter(model) if kind == "eagle3" else random_head(kind, model)
    rounds, waits = waits_of(drafter, monkeypatch, mode)
    assert waits == ["tolist"] * len(rounds)


@pytest.mark.parametrize("kind", CONFIDENT)
def test_stopping_by_confidence_waits_once_more(kind, monkeypatch):
    """How many drafts there are to verify is known only when they are drafted."""
    drafter = random_head(kind, tiny_llama()).confident(0.0)
    rounds, waits = waits_of(drafter, monkeypatch)
    expected = [("item", "tolist") if round.tested else ("tolist",) for round in rounds]
    assert waits == [name for names in expected for name in names]
