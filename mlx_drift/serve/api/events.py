"""Server-sent events, as the APIs have them."""

import json
from typing import Any

DONE = "data: [DONE]\n\n"
KEEPALIVE = ": keepalive\n\n"
"""A comment: clients that count silent seconds hear it, parsers do not."""


def data(value: dict[str, Any]) -> str:
    """Returns one event."""
    return f"data: {dumps(value)}\n\n"


def event(type: str, **keys: Any) -> str:
    """Returns one event that is named by its type, as Messages and Responses have them."""
    return f"event: {type}\n{data({'type': type, **keys})}"


def dumps(value: Any) -> str:
    """Writes JSON; lone surrogates, which UTF-8 cannot hold, as escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text
