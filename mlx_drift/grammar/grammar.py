"""Grammars as a caller writes them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.errors import DriftError
from mlx_drift.grammar.follow import GrammarProcessor
from mlx_drift.grammar.vocabulary import vocabulary_of

Kind = Literal["JSON schema", "regular expression", "Lark grammar"]


@dataclass(frozen=True)
class Grammar:
    r"""What an answer must be, whole; or, where it is cut off by its limit, the beginning of.

    JSON is written on one line, as Python's `json.dumps` writes it: `{"a": [1, 2]}`. No model can
    lose itself in spaces then, and all that the schema settles need not be waited for. (A schema
    may settle it otherwise by llguidance's own key, `x-guidance`.)

    Attributes:
        kind: In which language it is written.
        source: The grammar.
    """

    kind: Kind
    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> "Grammar":
        """JSON that a schema describes.

        Args:
            schema: The schema, or its text.

        Raises:
            DriftError: If it is no JSON object.
        """
        try:
            found = json.loads(schema) if isinstance(schema, str) else dict(schema)
            text = json.dumps(found, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise DriftError(f"the JSON schema is not valid JSON ({reason})") from None
        if not isinstance(found, dict):
            raise DriftError(f"the JSON schema is a {type(found).__name__}; expected an object")
        return cls("JSON schema", text)

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Text that a regular expression (of Rust's `regex` crate) matches from end to end."""
        return cls("regular expression", pattern)

    @classmethod
    def lark(cls, text: str) -> "Grammar":
        """Text that a grammar in llguidance's variant of Lark describes, from `start` on."""
        return cls("Lark grammar", text)

    def check(self, tokenizer: TokenizerWrapper) -> None:
        """Checks that answers can be held to the grammar.

        Args:
            tokenizer: The target's. What is prepared for it is kept as long as it lives.

        Raises:
            DriftError: If llguidance is not installed, cannot read the tokenizer, or cannot hold
                an answer to this grammar, with its reason.
        """
        vocabulary_of(tokenizer).matcher(self.kind, self.source)

    def processor(self, tokenizer: TokenizerWrapper, prompt: Sequence[int]) -> GrammarProcessor:
        """Returns the logits processor that holds one answer to the grammar.

        A reasoning model reasons freely first: the grammar begins after the reasoning.

        Args:
            tokenizer: The target's.
            prompt: Token ids of what is answered.

        Raises:
            DriftError: As `check` does.
        """
        vocabulary = vocabulary_of(tokenizer)
        return GrammarProcessor(
            vocabulary.matcher(self.kind, self.source),
            prompt,
            thought=vocabulary.thought,
            stops=vocabulary.stops,
            size=vocabulary.size,
        )
