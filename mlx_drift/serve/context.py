"""How many tokens a prompt and its answer may have together."""

from mlx_drift.serve.model import LoadedModel

BEYOND = 1 << 30
"""Where a tokenizer says that there is no limit, it says a number far beyond this."""


def context(loaded: LoadedModel, cache_bytes: int) -> tuple[int, str]:
    """Returns the limit, and what sets it in words.

    Args:
        loaded: The model.
        cache_bytes: What its caches may take.
    """
    limits = [(loaded.footprint.tokens(cache_bytes), f"--cache-bytes is {cache_bytes}")]
    arguments = getattr(loaded.model, "args", None)
    inner = getattr(arguments, "text_config", None) or {}
    said = getattr(arguments, "max_position_embeddings", None) or (
        inner.get("max_position_embeddings") if isinstance(inner, dict) else None
    )
    if isinstance(said, int) and said > 0:
        limits.append((said, "max_position_embeddings of its config"))
    else:
        said = getattr(loaded.tokenizer, "model_max_length", None)
        if isinstance(said, int) and 0 < said < BEYOND:
            limits.append((said, "model_max_length of its tokenizer"))
    return min(limits)
