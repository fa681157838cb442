"""How many tokens a prompt and its answer may have together."""

from mlx_drift.serve.model import LoadedModel
from mlx_drift.target.context import longest_text


def context(loaded: LoadedModel, cache_bytes: int) -> tuple[int, str]:
    """Returns the limit, and what sets it in words.

    Args:
        loaded: The model.
        cache_bytes: What its caches may take.
    """
    room = loaded.footprint.tokens(cache_bytes), f"--cache-bytes is {cache_bytes}"
    return min(room, longest_text(loaded.model, loaded.tokenizer) or room)
