"""What `doctor` finds out: plain facts, for a table or for `--json`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Source = Literal["tensors", "sizes", "config"]
"""What tells the bytes of weights."""


@dataclass(frozen=True)
class Family:
    """What a model is.

    Attributes:
        model_type: As its config says.
        model_file: The file of mlx-lm that runs it.
        num_layers: None where the layers are not where plain text models have them; so the rest.
        hidden_size: See `num_layers`.
        vocab_size: See `num_layers`.
        dtype: Of the activations, hence of caches and taps.
        quantization: As its config says; None if the weights are not quantized.
    """

    model_type: str
    model_file: str
    num_layers: int | None
    hidden_size: int | None
    vocab_size: int | None
    dtype: str | None
    quantization: dict[str, Any] | None


@dataclass(frozen=True)
class CacheKind:
    """Caches that are alike.

    Attributes:
        count: How many there are.
        kind: What they hold.
        rolled_back: How rejected drafts are taken back.
        goes_back: How a conversation goes further back, to another branch of it.
        bytes_per_token: Of all of them; None if their size is fixed.
        nbytes: Of all of them, once the context was fed.
    """

    count: int
    kind: str
    rolled_back: str
    goes_back: str
    bytes_per_token: int | None
    nbytes: int


@dataclass(frozen=True)
class Taps:
    """Which hidden states of a target can be captured, of all, or of some if not all can.

    Attributes:
        captured: Those that can, from the embedding (0) to the final norm.
        refused: Those that cannot, with the reason.
    """

    captured: list[int]
    refused: dict[int, str]


@dataclass(frozen=True)
class DrafterFacts:
    """What a drafter is, bound to the target.

    Attributes:
        name: Its folder or repository.
        drafter_type: Its kind.
        taps: The hidden states of the target that it reads.
        feedback: Which state the next chain step gets; None where the kind has no choice.
        window: How many rows a row sees at most: the length it was trained at; None if it keeps
            none.
        sinks: How many of the first rows it sees beyond that.
        sliding_window: The window it was trained with, if it was with one.
        draft_vocab_size: Tokens that it can draft.
        nbytes: Of its weights, as they are cast and folded when they are loaded.
        caches: What it keeps of a conversation.
        seed_nbytes: Of what it keeps beside them, however long the conversation is.
    """

    name: str
    drafter_type: str
    taps: list[int]
    feedback: str | None
    window: int | None
    sinks: int
    sliding_window: int | None
    draft_vocab_size: int
    nbytes: int
    caches: list[CacheKind]
    seed_nbytes: int


@dataclass(frozen=True)
class Memory:
    """Expected bytes. Not in it: activations, which come and go, the tokenizer, and Python itself.

    Attributes:
        weights: Of the target; None where nothing tells.
        weights_from: What tells: the `tensors` of the files on this machine, the `sizes` of those
            on the Hub, or the `config`, if there are no files.
        caches: Of the target at the context; None if it was refused. So the rest.
        drafter: The drafter's weights.
        drafter_caches: The drafter's caches at the context.
        taps: What is captured of one chunk of the prompt.
        total: Of all; None if one is not known.
        machine: What the machine has for it: recommended by Metal, the GPU's, or all of it.
        fits: Whether the total is no more than that; None if it is not known.
    """

    weights: int | None
    weights_from: Source | None
    caches: int | None
    drafter: int
    drafter_caches: int
    taps: int
    total: int | None
    machine: int
    fits: bool | None


@dataclass(frozen=True)
class RankMemory:
    """Expected bytes of one of several ranks.

    Attributes:
        rank: Its number.
        weights: Of its part of the target; None where nothing tells.
        caches: Of that part at the context.
        total: Those, and the drafter's, which each rank has whole; None if one is not known.
        fits: Whether a machine like this one has so much; None if it is not known.
    """

    rank: int
    weights: int | None
    caches: int
    total: int | None
    fits: bool | None


@dataclass(frozen=True)
class Diagnosis:
    """What a run would be.

    Attributes:
        model: The target as it was named.
        context: Tokens that the bytes of caches are told for.
        family: What the target is.
        caches: What it keeps of a conversation; empty if that is refused.
        taps: What an EAGLE drafter may read of it; None if nothing could be fed.
        drafter: None if none was named, or it is refused.
        memory: What to expect.
        refused: What was asked for and a run would refuse, a line each.
        would_refuse: What was not asked for, and would be.
        notes: What else the user should know, a line each.
        ranks: What each of several ranks would hold; empty for one process.
    """

    model: str
    context: int
    family: Family
    caches: list[CacheKind]
    taps: Taps | None
    drafter: DrafterFacts | None
    memory: Memory
    refused: list[str]
    would_refuse: list[str]
    notes: list[str]
    ranks: list[RankMemory]

    def to_dict(self) -> dict[str, Any]:
        """Returns it for `--json`."""
        return asdict(self)
