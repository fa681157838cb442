"""How long a text a model was made for."""

from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

BEYOND = 1 << 30
"""Where a tokenizer says that there is no limit, it says a number far beyond this."""


def longest_text(model: Any, tokenizer: TokenizerWrapper) -> tuple[int, str] | None:
    """Returns how many tokens a text may have, and who says so; None if nothing does.

    Args:
        model: As `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
    """
    arguments = getattr(model, "args", None)
    inner = getattr(arguments, "text_config", None) or {}
    said = getattr(arguments, "max_position_embeddings", None) or (
        inner.get("max_position_embeddings") if isinstance(inner, dict) else None
    )
    if isinstance(said, int) and said > 0:
        return said, "max_position_embeddings of its config"
    said = getattr(tokenizer, "model_max_length", None)
    if isinstance(said, int) and 0 < said < BEYOND:
        return said, "model_max_length of its tokenizer"
    return None
