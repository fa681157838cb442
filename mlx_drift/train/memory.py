"""What a training takes, by term, before it begins.

An estimate from shapes: what is kept for the gradients is counted an array at a time.
"""

from dataclasses import asdict, dataclass
from typing import Any

from mlx.utils import tree_flatten

from mlx_drift.doctor.memory import machine_memory
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.train.learner import Recipe
from mlx_drift.train.rows import CHUNK

FLOAT = 4
LOGITS_KEPT, WEIGHTS_KEPT = 3, 1.25
"""Arrays of the size of logits, and of attention, that a step keeps for the gradients: both
distributions and the logits; the weights and a mask."""

WEIGHTS_AT_WORK, LOGITS_AT_WORK, LOGITS_AGAIN = 5, 2, 8
"""Those that are there at once besides, as measured; the last where they are computed again."""


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        target: The target's weights.
        head: The head's, in float32.
        gradients: Those of a text, and what was summed before.
        optimizer: AdamW's two moments.
        states: The target's states and logits over one text, and what the target takes to read it.
        chain: What is kept of the train-time test's steps for the gradients.
        device: What the device has.
    """

    target: int
    head: int
    gradients: int
    optimizer: int
    states: int
    chain: int
    device: int

    @property
    def total(self) -> int:
        """All terms but what there is."""
        return sum(self.terms.values())

    @property
    def terms(self) -> dict[str, int]:
        """The terms by name."""
        return {name: size for name, size in asdict(self).items() if name != "device"}

    def check(self) -> None:
        """Refuses what does not fit.

        Raises:
            DriftError: If it does not, with the terms.
        """
        if self.total > self.device:
            told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.terms.items())
            raise DriftError(
                f"the training would take about {self.total / 1e9:.1f} GB ({told}) and this device "
                f"has {self.device / 1e9:.1f}; --grad-checkpoint, a smaller --max-seq-length, "
                "--steps or --rank take less"
            )


def estimate_memory(
    target: Target, drafter: ChainDrafter, recipe: Recipe, max_seq_length: int
) -> Memory:
    """Estimates what a training takes.

    Args:
        target: The target.
        drafter: The head, loaded to be trained.
        recipe: How.
        max_seq_length: Tokens of the longest text.
    """
    network: Any = drafter.network
    length, config = max_seq_length, drafter.config
    trained = _nbytes(network.trainable_parameters())
    vocabulary = getattr(config, "draft_vocab_size", config.target.vocab_size)
    heads = getattr(config, "num_attention_heads", None) or _heads(config)
    states = length * len(config.taps) * config.target.hidden_size * FLOAT
    states += length * vocabulary * target.dtype.size
    states += min(length, CHUNK) * config.target.vocab_size * 2 * FLOAT
    logits, attention = length * vocabulary * FLOAT, heads * length * length * FLOAT
    steps = 0 if recipe.grad_checkpoint else recipe.steps
    attended: float = steps * config.num_layers
    if hasattr(config, "block"):  # mlx-lm's, which attends to the rows of all steps, and keeps them
        attended = recipe.steps * (recipe.steps + 1) / 2
    kept = steps * LOGITS_KEPT * logits + attended * WEIGHTS_KEPT * attention
    kept += WEIGHTS_AT_WORK * attention
    kept += (LOGITS_AGAIN if recipe.grad_checkpoint else LOGITS_AT_WORK) * logits
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    width = config.num_layers * length * (12 * config.hidden_size + 4 * inner) * FLOAT
    return Memory(
        target=_nbytes(target.model.parameters()),
        head=_nbytes(network.parameters()),
        gradients=2 * trained,
        optimizer=2 * trained,
        states=states,
        chain=int(kept) + recipe.steps * width,
        device=machine_memory(),
    )


def _nbytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))


def _heads(config: Any) -> int:
    block = getattr(config, "block", {})
    heads = block.get("num_attention_heads") or block.get("n_head") or 1
    return int(heads)
