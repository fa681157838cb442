"""Texts that survive the run: a file of one conversation's a line, written as they come.

The first line says what they depend on; a last line that a killed run left unfinished is taken
away. It grows by what is asked and no more: a conversation has `max_seq_length` tokens at most.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_drift.errors import DriftError, brief
from mlx_drift.train.layout import Text

FORMAT = "mlx_drift_texts"
FORMAT_VERSION = 1


class AnswerFile:
    """Texts by conversation.

    Args:
        path: The file; it goes on if it is there. Whoever writes it holds its folder.
        settings: What the texts depend on.
        vocab_size: Of the target: a token from there on is damage.

    Raises:
        DriftError: If the file is of other settings, damaged, or cannot be read and written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], vocab_size: int):
        self.path, self.vocab_size = path, vocab_size
        self._known: dict[str, list[Text]] = {}
        header = {FORMAT: FORMAT_VERSION, "settings": json.loads(json.dumps(settings))}
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            for number, line in enumerate(whole.splitlines(), 1):
                self._take(line, number, header)
            if not whole:
                path.write_bytes(self._line(header))
            elif len(whole) < len(data):
                os.truncate(path, len(whole))
        except OSError as error:
            raise self._unwritten(error) from None

    def find(self, digest: str) -> list[Text] | None:
        """Returns the texts of a conversation, if they are there."""
        return self._known.get(digest)

    def add(self, digest: str, texts: list[Text]) -> None:
        """Writes the texts of a conversation.

        Raises:
            DriftError: If the disk does not take them.
        """
        told = [{"tokens": text.tokens, "said": text.said} for text in texts]
        self._known[digest] = texts
        try:
            with self.path.open("ab") as stream:
                stream.write(self._line({"conversation": digest, "texts": told}))
        except OSError as error:
            raise self._unwritten(error) from None

    @staticmethod
    def _line(value: Mapping[str, Any]) -> bytes:
        return json.dumps(value, separators=(",", ":")).encode() + b"\n"

    def _unwritten(self, error: OSError) -> DriftError:
        return DriftError(f"{self.path}: cannot be read and written ({error.strerror})")

    def _take(self, line: bytes, number: int, header: Mapping[str, Any]) -> None:
        try:
            read = json.loads(line)
            if number > 1:
                self._known[read["conversation"]] = [self._text(one) for one in read["texts"]]
                return
            theirs, ours = read["settings"], header["settings"]
            version = read[FORMAT]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DriftError(
                f"{self.path}: damaged in line {number}; remove it, and it is written anew"
            ) from None
        if version != FORMAT_VERSION:
            raise DriftError(f"{self.path}: of another version; remove it, and it is written anew")
        for key in sorted({*theirs, *ours}):
            if theirs.get(key) != ours.get(key):
                raise DriftError(
                    f"{self.path}: holds answers of another {key}, {brief(theirs.get(key))}, not "
                    f"{brief(ours.get(key))}; remove it, or give another --mlx-path"
                )

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
