"""What Python programs pass, brought to one form: prompts, numbers, keywords of mlx-lm's."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import mlx.core as mx
import mlx.nn as nn
import numpy.typing as npt
from mlx_lm.generate import generate_step, speculative_generate_step, stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.errors import DriftError, brief
from mlx_drift.files.text import check_text

Prompt = (
    str | Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[Any] | mx.array | Mapping[str, Any]
)
"""Text; or token ids, as a sequence, an array, a batch of one row, or a tokenizer's result."""

P = ParamSpec("P")
R = TypeVar("R")


def encode(tokenizer: TokenizerWrapper, prompt: Prompt, vocab_size: int | None) -> list[int]:
    """Turns a prompt into token ids; a text as mlx-lm does: BoS is added unless the text has it.

    Args:
        tokenizer: The target's.
        prompt: Text, or token ids.
        vocab_size: How many ids the model has; None if that is not known.

    Raises:
        DriftError: If it is empty, no prompt at all, or has an id that the model does not have.
    """
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        has_bos = bos is not None and prompt.startswith(bos)
        check_text(prompt, "the prompt")
        prompt = tokenizer.encode(prompt, add_special_tokens=not has_bos) if prompt else []
    tokens = token_ids(prompt)
    if not tokens:
        raise DriftError("the prompt is empty; give some text")
    check_vocabulary(tokens, vocab_size)
    return tokens


def token_ids(prompt: Any, what: str = "the prompt") -> list[int]:
    """Turns the token ids of one text, of any make, into a list.

    Args:
        prompt: The token ids.
        what: What they are, for messages.

    Raises:
        DriftError: If they are anything else.
    """
    if isinstance(prompt, Mapping) and "input_ids" in prompt:  # transformers' BatchEncoding
        prompt = prompt["input_ids"]
    ids = _listed(prompt, what)
    while len(ids) == 1 and _is_listed(ids[0]):  # a batch of one text
        ids = _listed(ids[0], what)
    if set(map(type, ids)) <= {int}:
        return list(ids)
    return [_token_id(value, f"token {place} of {what}") for place, value in enumerate(ids)]


def check_vocabulary(ids: Sequence[int], vocab_size: int | None, what: str = "the prompt") -> None:
    """Checks that a model has some token ids.

    An id beyond its embedding would read outside an array, which can end the process.

    Args:
        ids: Token ids.
        vocab_size: How many ids the model has; None if that is not known.
        what: What they are, for the message.

    Raises:
        DriftError: Naming the first id that it does not have, and the id's place.
    """
    last = (1 << 31 if vocab_size is None else vocab_size) - 1
    if ids and not 0 <= min(ids) <= max(ids) <= last:
        place = next(place for place, value in enumerate(ids) if not 0 <= value <= last)
        raise DriftError(
            f"token {place} of {what} (counted from 0) is {brief(ids[place])}: outside the "
            f"model's vocabulary; expected 0 to {last}"
        )


def whole_number(name: str, value: Any, *others: Any) -> Any:
    """Turns a whole number of any make into Python's own; other values allowed stay as they are.

    Raises:
        DriftError: If it is neither.
    """
    number = _number(value)
    if number is not None and number == number // 1:
        return int(number)
    return _other(name, value, "a whole number", others)


def real_number(name: str, value: Any, *others: Any) -> Any:
    """Turns a number of any make into Python's own; other values allowed stay as they are.

    Raises:
        DriftError: If it is neither.
    """
    number = _number(value)
    return _other(name, value, "a number", others) if number is None else number


def takes_numbers(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function be given numbers of any make: numpy's, mlx's, torch's.

    Its annotations say which parameters are numbers, and what they may be instead: None, a word.
    """
    signature = inspect.signature(function)
    numbers = {name: _number_kind(hint) for name, hint in get_type_hints(function).items()}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if (kind := numbers.get(name)) is not None:
                convert, others = kind
                bound.arguments[name] = convert(name, value, *others)
        return function(*bound.args, **bound.kwargs)

    return call


def function(name: str, value: Any) -> Any:
    """Returns a function, or None.

    Raises:
        DriftError: If it is anything else.
    """
    if value is not None and not callable(value):
        raise DriftError(f"{name} is {_named(value)}; expected a function")
    return value


def functions(name: str, value: Any) -> tuple[Any, ...]:
    """Returns a list of functions as a tuple, an empty one for None.

    Raises:
        DriftError: If it is anything else.
    """
    given = () if value is None else value
    found = tuple(given) if isinstance(given, Iterable) else (None,)
    if not all(map(callable, found)):
        raise DriftError(f"{name} is {_named(value)}; expected a list of functions")
    return found


def without_defaults(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out keywords of mlx-lm's that ask for what it does anyway: its signatures say what."""
    defaults = {
        parameter.name: parameter.default
        for function in (generate_step, speculative_generate_step, stream_generate)
        for parameter in inspect.signature(function).parameters.values()
    }
    return {
        name: value
        for name, value in keywords.items()
        if not (name in defaults and _is_same(value, defaults[name]))
    }


def check_loaded(model: Any, tokenizer: Any, drafter: Any) -> None:
    """Checks that what has to be loaded was loaded.

    Raises:
        DriftError: Saying by what.
    """
    for name, value in (("model", model), ("tokenizer", tokenizer)):
        if value is None or isinstance(value, str | Path | tuple):
            raise DriftError(
                f"the {name} is {_named(value)}; expected a loaded one: model, tokenizer = "
                "load(path)"
            )
    if drafter is not None and not hasattr(drafter, "propose"):
        is_model = isinstance(drafter, nn.Module)
        call = "DraftModelDrafter(it, model)" if is_model else "load_drafter(path, model)"
        raise DriftError(f"the drafter is {_named(drafter)}; expected a drafter: drafter = {call}")


def _listed(ids: Any, what: str) -> Sequence[Any]:
    """Returns token ids as a sequence."""
    found = ids.tolist() if hasattr(ids, "tolist") else ids
    if not _is_listed(found):
        raise DriftError(f"{what} is {_named(ids)}; expected text, or a list of token ids")
    return found


def _is_listed(ids: Any) -> bool:
    is_text = isinstance(ids, str | bytes | bytearray)
    return (hasattr(ids, "tolist") and ids.ndim > 0) or (isinstance(ids, Sequence) and not is_text)


def _token_id(value: Any, which: str) -> int:
    number = _number(value)
    if not isinstance(number, int):
        kind = "the tokens of several texts" if _is_listed(value) else "no token id"
        if isinstance(value, Mapping):
            kind = "a message: give tokenizer.apply_chat_template(messages, ...)"
        raise DriftError(f"{which} (counted from 0) is {_named(value)}, {kind}")
    return number


def _number(value: Any) -> int | float | None:
    """Returns a number as Python's own; None if it is none."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _other(name: str, value: Any, expected: str, others: Sequence[Any]) -> Any:
    """Returns a value that is no number but allowed."""
    if any(value is other or (isinstance(value, str) and value == other) for other in others):
        return value
    allowed = " or ".join([expected, *map(str, others)])
    raise DriftError(f"{name} is {_named(value)}; expected {allowed}")


def _number_kind(hint: Any) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """Returns what converts a parameter of a type, and what it may be instead."""
    is_choice = get_origin(hint) in (Union, UnionType)
    kinds = get_args(hint) if is_choice else (hint,)
    if int not in kinds and float not in kinds:
        return None
    others: list[Any] = [None] if NoneType in kinds else []
    others += [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return whole_number if int in kinds else real_number, tuple(others)


def _is_same(value: Any, default: Any) -> bool:
    is_plain = isinstance(default, str | int | float) and type(value) is type(default)
    return value is default or (is_plain and value == default)


def _named(value: Any) -> str:
    """Shows a value in a message, if it is short; else what it is."""
    if (number := _number(value)) is not None:
        return brief(number)
    if value is None or isinstance(value, str | Path | bool):
        return brief(str(value) if isinstance(value, Path) else value)
    return f"of type {type(value).__name__}"
