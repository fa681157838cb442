"""Text as it comes in, from a file, stdin or a command line: UTF-8, or one clear line.

Half a surrogate pair is no text, and tokenizers raise at it: JSON's escapes can spell one, and
Python decodes bytes of a command line that are not UTF-8 to them (PEP 383).
"""

import codecs
import sys
from pathlib import Path

from mlx_drift.errors import DriftError

MOST_BYTES = 64 << 20
"""Of a text that is read at once."""

BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Reads a text file; its lines end in `\\n`, however they ended.

    Raises:
        DriftError: If it cannot be read, is larger than `most_bytes`, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:  # a pipe's size is known only when it is read
            data = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        reason = error.strerror if isinstance(error, OSError) else error
        raise DriftError(f"{path}: cannot be read ({reason})") from None
    return _text(data, str(path), most_bytes)


def read_stdin() -> str:
    """Reads all of stdin, as `read_text` does a file."""
    if sys.stdin is None:  # closed by whoever started the process
        raise DriftError("stdin is closed; give the text as an argument or in a file")
    try:
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
    except OSError as error:
        raise DriftError(f"stdin cannot be read ({error.strerror})") from None
    return _text(data, "stdin", MOST_BYTES)


def decode(data: bytes, where: str) -> str:
    """Decodes UTF-8, with a byte order mark or without.

    Raises:
        DriftError: If it is something else; `where` says of what.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bom = next((bom for bom in BOMS if data.startswith(bom)), None)
        found = BOMS[bom] if bom else f"byte {data[error.start]:#04x} at {error.start}"
        raise DriftError(f"{where}: not UTF-8 text ({found}); save it as UTF-8") from None


def check_text(text: str, what: str) -> str:
    """Returns a text.

    Raises:
        DriftError: If it has half a surrogate pair; `what` names it.
    """
    if half := lone_surrogate(text):
        raise DriftError(f"{what} has {half}; expected UTF-8 text")
    return text


def lone_surrogate(text: str) -> str | None:
    """Describes the first half of a surrogate pair in a text; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        if 0xDC80 <= half <= 0xDCFF:  # a byte, by PEP 383
            return f"the byte {half - 0xDC00:#04x} at {error.start}, which could not be decoded"
        return f"'\\u{half:04x}' at {error.start}, which is half a character"
    return None


def _text(data: bytes, where: str, most_bytes: int) -> str:
    if len(data) > most_bytes:
        raise DriftError(f"{where}: larger than {most_bytes >> 20} MiB; give a part of it")
    return decode(data, where).replace("\r\n", "\n").replace("\r", "\n")
