"""Texts that survive the run: a file of one conversation's a line, written as they come.

It grows by what is asked and no more: a conversation has `max_seq_length` tokens at most.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_drift.files.line_file import LineFile
from mlx_drift.train.layout import Text

FORMAT_VERSION = 1


class TextFile:
    """Texts by conversation.

    Args:
        path: The file; it goes on if it is there. Whoever writes it holds its folder.
        settings: What the texts depend on.
        vocab_size: Of the target: a token from there on is damage.

    Raises:
        DriftError: If the file is of other settings, damaged, or cannot be read and written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], vocab_size: int):
        self.vocab_size = vocab_size
        self._known: dict[str, list[Text]] = {}
        advice = "remove it, and it is written anew, or give another --mlx-path"
        self._file = LineFile(path, "texts", FORMAT_VERSION, settings, self._take, advice)

    def find(self, digest: str) -> list[Text] | None:
        """Returns the texts of a conversation, if they are there."""
        return self._known.get(digest)

    def add(self, digest: str, texts: list[Text]) -> None:
        """Writes the texts of a conversation.

        Raises:
            DriftError: If the disk does not take them.
        """
        self._known[digest] = texts
        told = [{"tokens": text.tokens, "said": text.said} for text in texts]
        self._file.append({"conversation": digest, "texts": told})

    def _take(self, _: int, value: Any) -> None:
        self._known[value["conversation"]] = [self._text(one) for one in value["texts"]]

    def _text(self, value: Mapping[str, Any]) -> Text:
        """Reads a text.

        Raises:
            ValueError, KeyError, TypeError: If it is none.
        """
        tokens = [int(token) for token in value["tokens"]]
        said = [(int(start), int(stop)) for start, stop in value["said"]]
        if not all(0 < start < stop <= len(tokens) for start, stop in said):
            raise ValueError
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise ValueError
        return Text(tokens, said)
