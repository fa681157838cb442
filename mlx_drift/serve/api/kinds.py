"""What a field of a request may hold, each kind with the words that say so.

A kind is called with the value that came in and returns it, checked; it raises `ValueError` with
what was expected. Values are untrusted: a number may be huge, a list long, anything null.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A check, and what it expects in words.

    Attributes:
        expected: What a value must be, for messages and the documentation.
        passes: Whether a value is that.
    """

    expected: str
    passes: Callable[[Any], bool]

    def __call__(self, value: Any) -> Any:
        """Returns a value that passes.

        Raises:
            ValueError: If it does not.
        """
        if not self.passes(value):
            raise ValueError(f"expected {self.expected}")
        return value


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1 << 63 and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int)


def number(least: float, most: float) -> Kind:
    """A number in a range, ends included."""
    return Kind(
        f"a number from {least:g} to {most:g}",
        lambda value: _is_number(value) and least <= value <= most,
    )


def integer(least: int, most: int) -> Kind:
    """A whole number in a range, ends included."""
    return Kind(
        f"a whole number from {least} to {most}",
        lambda value: _is_integer(value) and least <= value <= most,
    )


def choice(*values: Any) -> Kind:
    """One of some values; of the same type, as 1 is not true."""
    shown = ", ".join("null" if v is None else repr(v).replace("'", '"') for v in values)
    shown = shown.replace("True", "true").replace("False", "false")
    return Kind(shown, lambda value: any(type(value) is type(v) and value == v for v in values))


boolean = Kind("true or false", lambda value: isinstance(value, bool))
mapping = Kind("an object", lambda value: isinstance(value, dict))
anything = Kind("anything", lambda value: True)


def text(most: int) -> Kind:
    """A text of so many characters at most, without lone surrogates, which UTF-8 cannot hold."""

    def passes(value: Any) -> bool:
        if not isinstance(value, str) or len(value) > most:
            return False
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True

    return Kind(f"a text of at most {most} characters", passes)


def list_of(kind: Kind, most: int, least: int = 0) -> Kind:
    """A list of so many values of one kind."""
    return Kind(
        f"a list of {least} to {most}, each {kind.expected}",
        lambda value: (
            isinstance(value, list)
            and least <= len(value) <= most
            and all(kind.passes(item) for item in value)
        ),
    )


def either(*kinds: Kind) -> Kind:
    """A value of any of some kinds."""
    return Kind(
        ", or ".join(kind.expected for kind in kinds),
        lambda value: any(kind.passes(value) for kind in kinds),
    )


def shape(keys: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """An object of known keys; optional ones may be null, which stands for not there."""
    optional = optional or {}
    shown = [f"`{key}`: {kind.expected}" for key, kind in keys.items()]
    shown += [f"`{key}` if you like: {kind.expected}" for key, kind in optional.items()]

    def passes(value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        given = {key: item for key, item in value.items() if key in keys or item is not None}
        return (
            given.keys() <= keys.keys() | optional.keys()
            and all(key in given and kind.passes(given[key]) for key, kind in keys.items())
            and all(kind.passes(given[key]) for key, kind in optional.items() if key in given)
        )

    return Kind("an object of " + ", ".join(shown) if shown else "an empty object", passes)


def flags(*names: str) -> Kind:
    """An object of known keys, each true or false if it is there."""
    passes = shape({}, dict.fromkeys(names, boolean)).passes
    return Kind("an object: " + ", ".join(f"`{name}`" for name in names), passes)
