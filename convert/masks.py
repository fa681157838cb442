"""What heads have in common that draft a block: the mask token, and how many drafts they make."""

from typing import Any

from mlx_drift.convert.conventions import Values
from mlx_drift.errors import DriftError, brief


def read_mask_token(values: Values, *keys: str) -> int:
    """Takes the token that stands where a draft is to be.

    Args:
        values: The config.
        keys: What it may be called.

    Raises:
        DriftError: If it is missing, or no token id.
    """
    values.look(*keys)
    said = {key: values.config[key] for key in keys if values.config.get(key) is not None}
    if not said:
        raise DriftError(
            f"{values.file} lacks the key {keys[0]!r}: add the id of the token that the head was "
            "trained with as its mask (its training's config has it)"
        )
    for key, token in said.items():
        if type(token) is not int or token < 0:
            raise DriftError(f"{values.file}: {key} is {brief(token)}; expected a token id")
    if len(set(said.values())) > 1:
        raise DriftError(f"{values.file}: {' and '.join(said)} disagree: {brief(said)}")
    key, token = next(iter(said.items()))
    values.provenance["mask_token_id"] = "file" if key == "mask_token_id" else f"file: {key}"
    return int(token)


def read_max_drafts(values: Values) -> int | None:
    """Takes how many drafts a round a speculators head was trained for; None if it is not said.

    Raises:
        DriftError: If it is no positive whole number.
    """
    methods: Any = values.config.get("speculators_config")
    methods = methods.get("proposal_methods") if isinstance(methods, dict) else None
    first = methods[0] if isinstance(methods, list) and methods else None
    drafts = first.get("speculative_tokens") if isinstance(first, dict) else None
    if drafts is None:
        return None
    if type(drafts) is not int or drafts < 1:
        raise DriftError(
            f"{values.file}: speculative_tokens is {brief(drafts)}; expected a positive whole "
            "number"
        )
    values.provenance["max_drafts"] = "file: speculative_tokens"
    return drafts
