"""Training is PyTorch's: gradients of every kind of head and loss, and ten steps of AdamW."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from heads import KINDS, LENGTH, TinyHead, tiny_head
from mlx.utils import tree_flatten

from mlx_drift.train.losses import LOSSES
from mlx_drift.train.objective import Objective

STEPS, DECAY = 3, 0.8
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05

pytestmark = pytest.mark.torch


class InTorch:
    """The same head and objective in float64, an independent writing."""

    def __init__(self, head: TinyHead):
        import torch
        from eagle3_torch import Eagle3Reference
        from heads_torch import EagleReference, MtpReference

        self.torch, self.row = torch, head.row()
        self.parameters = {
            name: torch.tensor(weight, dtype=torch.float64, requires_grad=True)
            for name, weight in head.weights.items()
        }
        kinds = {"eagle": EagleReference, "mtp": MtpReference}
        reference = kinds.get(head.kind.split()[0], Eagle3Reference)
        self.head = reference(
            head.config,
            self.parameters,
            torch.tensor(head.embed),
            torch.tensor(head.target_head),
            torch.float64,
        )

    def loss(self, name: str):
        """Σ over steps of 0.8^step times the mean over what counts."""
        torch = self.torch
        taps = torch.tensor(np.array(self.row.taps), dtype=torch.float64)
        target = torch.tensor(np.array(self.row.logits), dtype=torch.float64)
        logits, _ = self.head.train_time_test(self.row.tokens.tolist(), taps, STEPS)
        total = 0
        for step in range(STEPS):
            each = []
            for i in range(LENGTH - step):
                if not self.row.counted[i + 1 + step].item():
                    continue
                p = torch.softmax(target[i + 1 + step], dim=0)
                log_q = torch.log_softmax(logits[step, i], dim=0)
                q = log_q.exp()
                rejected = 0.5 * (p - q).abs().sum()
                if name == "soft-ce":
                    each.append(-(p * log_q).sum())
                elif name == "tv":
                    each.append(rejected)
                elif name == "nla":
                    each.append(-torch.log(1 - rejected))
                else:
                    weight = math.exp(-3.0 * (1 - rejected.item()))
                    kl = torch.nn.functional.kl_div(log_q, p, reduction="sum")
                    each.append(weight * kl + (1 - weight) * rejected)
            total = total + DECAY**step * torch.stack(each).mean()
        return total


def close(ours: mx.array, theirs, tolerance: float, scale: float | None = None) -> bool:
    """Whether the distance of two tensors is small beside the length of the second."""
    expected = theirs.detach().numpy()
    distance = np.linalg.norm(np.array(ours, dtype=np.float64) - expected)
    return distance <= tolerance * (np.linalg.norm(expected) if scale is None else scale)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, loss):
    head = tiny_head(kind)
    drafter, row, objective = head.drafter(), head.row(), Objective(STEPS, loss, DECAY)
    value, gradients = nn.value_and_grad(drafter.network, lambda: objective(drafter, row))()
    theirs = InTorch(head)
    expected = theirs.loss(loss)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = dict(tree_flatten(gradients))
    assert ours.keys() == theirs.parameters.keys()
    for name, parameter in theirs.parameters.items():
        assert np.linalg.norm(parameter.grad) > 0, name
        assert close(ours[name], parameter.grad, 1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps(kind):
    """The difference is held against how far the weights have gone, not how long they are."""
    head = tiny_head(kind)
    drafter, row, objective = head.drafter(), head.row(), Objective(STEPS, "lk", DECAY)
    optimizer = optim.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY, bias_correction=True)
    step = nn.value_and_grad(drafter.network, lambda: objective(drafter, row))
    theirs = InTorch(head)
    parameters = theirs.parameters
    torch_optimizer = theirs.torch.optim.AdamW(
        parameters.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses = []
    for _ in range(10):
        value, gradients = step()
        optimizer.update(drafter.network, gradients)
        mx.eval(drafter.network.parameters(), optimizer.state)
        losses.append(value.item())
        torch_optimizer.zero_grad()
        theirs.loss("lk").backward()
        torch_optimizer.step()
    assert losses[-1] < losses[0]
    ours = dict(tree_flatten(drafter.network.trainable_parameters()))
    for name, parameter in parameters.items():
        moved = (parameter - before[name]).norm().item()
        assert close(ours[name], parameter, 1e-3, moved), name
