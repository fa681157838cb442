"""SpecForge (sgl-project/SpecForge): one `midlayer.*` or `layers.0.*`, a flat config.

Tap ids, in `eagle_config`, are outputs of layers. The switches of EAGLE-3.1 are `fc_norm` and
`norm_output`; until its pull request 879 (September 2026) the latter was *trained* as "norm before
the head", which the file cannot tell. thoughtworks, lmsys and nebius publish this layout.
"""

from mlx_drift.convert.dialects import Config, Dialect, Names, Trap, has, other_theta

NORM_OUTPUT = (
    "norm_output is true: SpecForge before its pull request 879 trained such heads with the state "
    "before the norm fed back. If acceptance falls after the first draft, convert again with "
    "--feedback pre, or let --probe-conventions decide"
)
NO_NORM = (
    "norm_output is false: SpecForge before its pull request 879 trained such heads without any "
    "norm before the head, which mlx-drift does not run. If hardly any draft is accepted, that is "
    "why; say --feedback pre if you know better"
)
THETA = (
    "rope_theta is not 10000: SpecForge before November 2025 (its pull request 270) trained with "
    "10000 whatever the file says. If acceptance is low, try --rope-theta 10000"
)


def recognises(config: Config, names: Names) -> bool:
    """Takes what is left of the EAGLE-3 family: the norm of the hidden state shows it."""
    return has(names, "hidden_norm.weight")


SPECFORGE = Dialect(
    "SpecForge",
    recognises,
    tap_ids="output",
    bookkeeping=frozenset({"target_model_type", "decoder_sparse_step"}),
    traps=(
        Trap("feedback", lambda config: config.get("norm_output") is True, NORM_OUTPUT),
        Trap("feedback", lambda config: config.get("norm_output") is False, NO_NORM),
        Trap("rope_theta", other_theta, THETA),
    ),
)
