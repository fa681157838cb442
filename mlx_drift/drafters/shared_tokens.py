"""Which token ids mean the same to a draft model as to its target.

Tokenizers of one family differ in what was added to them: Llama 3.2 renamed reserved tokens of
3.1's, Qwen3 has tokens that Qwen2.5 lacks. A draft model never needs to draft those. But where an
ordinary token of one is another token of the other, the draft model reads another text.
"""

from typing import Any

from mlx_drift.errors import DriftError, brief


def shared_ids(tokenizer: Any, its_tokenizer: Any, name: str) -> list[int] | None:
    """Returns the ids that mean the same token to both; None if all do.

    Args:
        tokenizer: The target's.
        its_tokenizer: The draft model's.
        name: The draft model, for the message.

    Raises:
        DriftError: If an id of an ordinary token of one is another token of the other.
    """
    theirs, ours = tokenizer.get_vocab(), its_tokenizer.get_vocab()
    if theirs == ours:
        return None
    added = [_added(t) for t in (tokenizer, its_tokenizer)]
    target, draft = ({index: token for token, index in vocab.items()} for vocab in (theirs, ours))
    for index in sorted(target.keys() & draft.keys()):
        tokens = target[index], draft[index]
        if tokens[0] != tokens[1] and not all(t in a for t, a in zip(tokens, added, strict=True)):
            raise DriftError(
                f"{name} has another tokenizer than the target (token {index} is "
                f"{brief(tokens[1])} and not {brief(tokens[0])}); give a draft model of the same "
                "family"
            )
    same = sorted(index for index, token in draft.items() if target.get(index) == token)
    if not same:
        raise DriftError(
            f"{name} has another tokenizer than the target (they share no token); give a draft "
            "model of the same family"
        )
    return same


def difference(tokenizer: Any, its_tokenizer: Any, same: list[int], name: str) -> str:
    """Says in what the tokenizers differ, `same` being what `shared_ids` returned."""
    vocabularies = tokenizer.get_vocab(), its_tokenizer.get_vocab()
    shared = set(same)
    odd = sorted((index, token) for v in vocabularies for token, index in v.items())
    odd = [(index, token) for index, token in odd if index not in shared]
    shown = ", ".join(f"{index} {brief(token)}" for index, token in odd[:3])
    return (
        f"{name} has not quite the target's tokenizer: {len(odd)} tokens are not the same in both "
        f"({shown}{', …' if len(odd) > 3 else ''}); only the {len(same)} others are drafted"
    )


def _added(tokenizer: Any) -> set[str]:
    """The tokens that were added to a tokenizer's own vocabulary."""
    return set(getattr(tokenizer, "get_added_vocab", dict)())
