"""What a draft's distribution is held against the target's by: one number a position.

p is the target's distribution and q the drafter's, both over the draft vocabulary; everything is
computed in float32. Trainers differ in which loss they take (SafeAILab/EAGLE and SpecForge soft
cross-entropy, speculators any of these), not in what the losses are.
"""

from collections.abc import Callable

import mlx.core as mx

ETA = 3.0
"""How soon LK turns from cross-entropy to total variation: the best of the paper's settings."""

SMALLEST = 1e-6
"""The least acceptance whose logarithm is taken."""


def soft_cross_entropy(logits: mx.array, target: mx.array) -> mx.array:
    """Returns −Σ p log q: the Kullback–Leibler divergence but for p's own entropy.

    Args:
        logits: The drafter's `[…, D]`.
        target: The target's, of the same tokens, `[…, D]`.

    Returns:
        `[…]` float32.
    """
    return -(_softmax(target) * _log_softmax(logits)).sum(axis=-1)


def total_variation(logits: mx.array, target: mx.array) -> mx.array:
    """Returns ½ Σ |p − q| = 1 − Σ min(p, q): the chance that a sampled draft is rejected.

    Arguments and result as of `soft_cross_entropy`.
    """
    return 1 - acceptance(logits, target)


def negative_log_acceptance(logits: mx.array, target: mx.array) -> mx.array:
    """Returns −log Σ min(p, q), whose gradient does not fade where little is accepted.

    LK's first form (Samarin et al., arXiv 2602.23881); `nla` in speculators. Arguments and result
    as of `soft_cross_entropy`.
    """
    return -mx.log(mx.maximum(acceptance(logits, target), SMALLEST))


def lk(logits: mx.array, target: mx.array) -> mx.array:
    """Returns λ KL(p‖q) + (1 − λ) TV(p, q), λ = exp(−η α), α being the acceptance, held fixed.

    LK's hybrid form (Samarin et al., arXiv 2602.23881): Kullback–Leibler's strong gradient where
    little is accepted, what acceptance itself asks for where much is. Arguments and result as of
    `soft_cross_entropy`.
    """
    accepted = acceptance(logits, target)
    weight = mx.exp(-ETA * mx.stop_gradient(accepted))
    p, log_p = _softmax(target), _log_softmax(target)
    divergence = (p * (log_p - _log_softmax(logits))).sum(axis=-1)
    return weight * divergence + (1 - weight) * (1 - accepted)


def acceptance(logits: mx.array, target: mx.array) -> mx.array:
    """Returns Σ min(p, q): the chance that a sampled draft is accepted (Leviathan et al., 2022).

    Arguments and result as of `soft_cross_entropy`.
    """
    return mx.minimum(_softmax(target), _softmax(logits)).sum(axis=-1)


Loss = Callable[[mx.array, mx.array], mx.array]

LOSSES: dict[str, Loss] = {
    "soft-ce": soft_cross_entropy,
    "tv": total_variation,
    "nla": negative_log_acceptance,
    "lk": lk,
}
"""The losses by name."""


def _softmax(logits: mx.array) -> mx.array:
    return mx.softmax(logits.astype(mx.float32), axis=-1)


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
