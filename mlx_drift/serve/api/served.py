"""What the APIs know of a model: how to make tokens of a prompt, and how many it takes."""

from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.decode.sampling import Sampling


@dataclass(frozen=True)
class Defaults:
    """What holds for a request that does not say.

    Attributes:
        max_tokens: Tokens of an answer.
        temperature: 0 for greedy decoding.
        top_p: As in a request; so the rest.

    Raises:
        DriftError: If a value is out of range.
    """

    max_tokens: int = 4096
    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks what tokens are drawn from: a request would be told of what it did not say."""
        Sampling(temp=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p)


@dataclass(frozen=True)
class Served:
    """A model that is loaded.

    Attributes:
        name: What it is called.
        tokenizer: Its tokenizer.
        vocab_size: Token ids are below it.
        context: Tokens of prompt and answer together, at most.
        limited_by: What sets that limit, in words.
        branches: Prompts are to say where others may branch off: going back there takes a copy.
        defaults: What holds for a request that does not say.
    """

    name: str
    tokenizer: TokenizerWrapper
    vocab_size: int
    context: int
    limited_by: str
    branches: bool
    defaults: Defaults
