"""What llguidance makes of a tokenizer and of grammars: made once, shared by all answers."""

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.errors import DriftError

MOST_MATCHERS = 64
"""Grammars that are kept compiled, the last used ones."""

ON_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written, unless the schema says otherwise: llguidance's `JsonCompileOptions`."""


@dataclass(frozen=True)
class Thought:
    """How a model marks its reasoning.

    Attributes:
        start: The tokens that open it.
        end: The tokens that close it.
        added: Tokens of the tokenizer that stand for no text, such as those that end a turn.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    added: frozenset[int]


class Vocabulary:
    """A tokenizer's tokens, as llguidance sees them.

    Args:
        tokenizer: The tokenizer.

    Attributes:
        size: Token ids are below it.
        stops: Token ids that end a text.
        thought: How reasoning is marked; None if it is not.

    Raises:
        DriftError: If llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        llguidance = load_llguidance()
        from llguidance.hf import from_tokenizer

        self.stops = frozenset(tokenizer.eos_token_ids)
        try:
            self._tokens = from_tokenizer(tokenizer._tokenizer, eos_token=sorted(self.stops))
        except Exception as error:  # its own and PyO3's, of several types
            raise DriftError(
                f"no grammar can be followed with this tokenizer: {_first_line(error)}"
            ) from None
        self._matcher = llguidance.LLMatcher
        self._matchers: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()
        self.size = int(self._tokens.vocab_size)
        self.thought = None
        if tokenizer.has_thinking:
            added = frozenset(tokenizer.added_tokens_decoder)
            start, end = tokenizer.think_start_tokens, tokenizer.think_end_tokens
            self.thought = Thought(start, end, added.difference(start, end))

    def matcher(self, kind: str, source: str) -> Any:
        """Returns a `LLMatcher` of a grammar (`Grammar`), at its beginning.

        Raises:
            DriftError: If llguidance cannot follow it, with its reason.
        """
        with self._lock:
            found = self._matchers.get((kind, source))
        if found is None:
            found = self._compile(kind, source)  # it may take a while: others do not wait for it
        with self._lock:
            self._matchers[kind, source] = found
            self._matchers.move_to_end((kind, source))
            if len(self._matchers) > MOST_MATCHERS:
                self._matchers.popitem(last=False)
            return found.deep_copy()

    def _compile(self, kind: str, source: str) -> Any:
        try:
            if kind == "JSON schema":
                text = self._matcher.grammar_from_json_schema(source, defaults=ON_ONE_LINE)
            elif kind == "regular expression":
                text = self._matcher.grammar_from_regex(source)
            else:
                text = self._matcher.grammar_from_lark(source)
            matcher = self._matcher(self._tokens, text, log_level=0)
            reason = _first_line(matcher.get_error())
            if not reason:
                matcher.compute_bitmask()
                reason = "no text fits it" if matcher.is_error() else ""
        except ValueError as error:
            reason = _first_line(error)
        if reason:
            raise DriftError(f"no answer can be held to the {kind}: {reason}")
        return matcher


_vocabularies: weakref.WeakKeyDictionary[Any, dict[frozenset[int], Vocabulary]]
_vocabularies = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer: TokenizerWrapper) -> Vocabulary:
    """Returns a tokenizer's vocabulary, made when it is first asked for.

    Raises:
        DriftError: If llguidance is not installed, or cannot read the tokenizer.
    """
    of_ends = _vocabularies.setdefault(tokenizer._tokenizer, {})
    stops = frozenset(tokenizer.eos_token_ids)  # which may grow
    if stops not in of_ends:
        of_ends[stops] = Vocabulary(tokenizer)
    return of_ends[stops]


def load_llguidance() -> ModuleType:
    """Imports llguidance.

    Raises:
        DriftError: If it is not installed.
    """
    try:
        import llguidance
    except ImportError:
        raise DriftError(
            "a grammar needs llguidance, which is not installed: pip install 'mlx-drift[grammar]'"
        ) from None
    return llguidance


def _first_line(error: Any) -> str:
    """Returns llguidance's reason without the dump that follows it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
