"""The arms of the study, and the order in which their drafters are trained.

Which norm does what: six kinds of drafter, each with three seeds, trained on chains of four steps.
What depth does: the two ends of them, each with two seeds, on chains of one, two and eight steps.
What an MTP head does: with either of its states recycled, three seeds each, chains of four steps.
Seeds go round robin over the arms, so that a study that is cut short is still balanced.
"""

from collections.abc import Iterator
from dataclasses import dataclass

ARMS = {
    "neither": {},
    "norm_output": {"norm_output": True},
    "fc_norm": {"fc_norm": True},
    "both": {"norm_output": True, "fc_norm": True},
    "norm_before_residual": {"norm_before_residual": True},
    "gated_attention": {"attn_output_gate": True},
}
"""The switches that each has on, by the names of `recipe.Switches`."""

MTP_ARMS = {"mtp_post": "post", "mtp_pre": "pre"}
"""MTP heads, by which of their states the next step gets: after or before their final norm."""

DEPTH = 4
SEEDS = 3

DEPTH_ARMS = ("neither", "both")
OTHER_DEPTHS = (1, 2, 8)
OTHER_DEPTHS_SEEDS = 2


@dataclass(frozen=True)
class Run:
    """One drafter: an arm, the depth of its train-time test and a seed."""

    arm: str
    depth: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.arm}-ttt{self.depth}-seed{self.seed}"


def runs() -> Iterator[Run]:
    """All drafters of the study, in the order of training."""
    for seed in range(SEEDS):
        for arm in ARMS:
            yield Run(arm, DEPTH, seed)
        if seed < OTHER_DEPTHS_SEEDS:
            for depth in OTHER_DEPTHS:
                for arm in DEPTH_ARMS:
                    yield Run(arm, depth, seed)
    for seed in range(SEEDS):
        for arm in MTP_ARMS:
            yield Run(arm, DEPTH, seed)
