"""The one error a user meets."""

from typing import Any

_LONGEST = 1000


class DriftError(ValueError):
    """One line that a user can act on: what was found, what was expected, what to do.

    A `ValueError`, which is what mlx-lm raises for what it refuses.

    Names and values of untrusted files end up in messages, so characters that would break the line
    or steer a terminal are escaped, and a very long message is cut.
    """

    def __init__(self, message: str):
        message = message if len(message) <= _LONGEST else message[:_LONGEST] + " …"
        super().__init__(printable(message))


class DriftWarning(UserWarning):
    """Something that works, but that the user should change."""


def printable(text: str) -> str:
    """Escapes what would break a line or steer a terminal, in a text of an untrusted file."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def brief(value: Any) -> str:
    """Shows a value of an untrusted file in a message."""
    try:
        shown = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return f"an unspeakable {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:80] + "…"
