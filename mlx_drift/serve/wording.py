"""From tokens to the text that is sent: whole characters, nothing past a stop text."""

from collections.abc import Sequence

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import TokenizerWrapper

TEXT = "text"


class Wording:
    """The text of one answer, piece by piece.

    Args:
        tokenizer: The target's.
        stop: Texts before which the answer ends.

    Attributes:
        stopped: One of them came.
    """

    def __init__(self, tokenizer: TokenizerWrapper, stop: Sequence[str]):
        self.stopped = False
        self._detokenizer = tokenizer.detokenizer
        machine = TextStateMachine({TEXT: [(text, None) for text in stop]})
        self._state = machine.make_state(TEXT)

    def add(self, token: int) -> str:
        """Takes a token; returns the text that is now certain."""
        self._detokenizer.add_token(token)
        return self._certain(self._detokenizer.last_segment)

    def end(self) -> str:
        """Returns what was held back: the answer ends otherwise than by a stop text."""
        self._detokenizer.finalize()
        text = self._certain(self._detokenizer.last_segment)
        if self.stopped:
            return text
        self._state, rest, _ = TextStateMachine.flush(self._state)
        return text + rest

    def _certain(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        self._state, certain, name = TextStateMachine.step(self._state, text)
        self.stopped = name is None
        return certain
