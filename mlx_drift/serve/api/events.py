"""Server-sent events, as OpenAI's API has them."""

import json
from typing import Any

DONE = "data: [DONE]\n\n"
KEEPALIVE = ": keepalive\n\n"
"""A comment: clients that count silent seconds hear it, parsers do not."""


def data(value: dict[str, Any]) -> str:
    """Returns one event."""
    return f"data: {dumps(value)}\n\n"


def dumps(value: Any) -> str:
    """Writes JSON; lone surrogates, which UTF-8 cannot hold, as escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text
