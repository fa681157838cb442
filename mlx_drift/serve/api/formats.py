"""What an answer must be: `response_format` of chat/completions, `text.format` of Responses."""

from typing import Any

from mlx_drift.errors import DriftError, brief, printable
from mlx_drift.grammar.grammar import Grammar
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.served import Served

SCHEMA_KEYS = {"name", "description", "schema", "strict"}
"""Keys beside a schema: every answer is held to it, strict or not."""


def response_format(given: Any, served: Served, at: str = "response_format") -> Grammar | None:
    """Reads a `response_format`; None if the answer is free.

    Args:
        given: What was given, of a known `type`; or None.
        served: The model.
        at: Where it stands in the request.

    Raises:
        BadRequest: If a key is unknown or missing, or no answer can be held to it.
    """
    if given is not None and given["type"] == "json_schema":
        _only(given, {"json_schema"}, at)
        inner = given.get("json_schema")
        if not isinstance(inner, dict):
            raise BadRequest(f"{at}.json_schema is {brief(inner)}; expected an object", at)
        _only(inner, SCHEMA_KEYS, f"{at}.json_schema")
        return held_to_schema(inner.get("schema"), served, f"{at}.json_schema.schema")
    return text_format(given, served, at)


def text_format(given: Any, served: Served, at: str = "text.format") -> Grammar | None:
    """Reads Responses' `text.format`, in which a schema lies beside its type.

    Arguments, result and errors are those of `response_format`.
    """
    if given is None:
        return None
    kind = given["type"]
    if kind == "json_schema":
        _only(given, SCHEMA_KEYS, at)
        return held_to_schema(given.get("schema"), served, f"{at}.schema")
    key = {"regex": "pattern", "grammar": "grammar"}.get(kind)
    _only(given, {key} if key else set(), at)
    if key is None:
        return checked(Grammar.json_object(), served, at) if kind == "json_object" else None
    source = given.get(key)
    if not isinstance(source, str):
        raise BadRequest(f"{at}.{key} is {brief(source)}; expected a text", f"{at}.{key}")
    grammar = Grammar.regex(source) if kind == "regex" else Grammar.lark(source)
    return checked(grammar, served, f"{at}.{key}")


def held_to_schema(schema: Any, served: Served, at: str) -> Grammar:
    """Returns the grammar of a JSON schema.

    Args:
        schema: What was given as one.
        served: The model.
        at: Where it stands in the request.

    Raises:
        BadRequest: If it is none, or no answer can be held to it.
    """
    if not isinstance(schema, dict):
        raise BadRequest(f"{at} is {brief(schema)}; expected a JSON schema, an object", at)
    try:
        return checked(Grammar.json_schema(schema), served, at)
    except DriftError as error:
        raise BadRequest(f"{at}: {error}", at) from None


def checked(grammar: Grammar, served: Served, at: str) -> Grammar:
    """Returns a grammar that answers can be held to.

    Raises:
        BadRequest: If they cannot, with the reason.
    """
    try:
        grammar.check(served.tokenizer)
    except DriftError as error:
        raise BadRequest(f"{at}: {error}", at, code="unsupported") from None
    return grammar


def _only(given: dict[str, Any], keys: set[str], at: str) -> None:
    """Refuses further keys."""
    if unknown := sorted(given.keys() - keys - {"type"}):
        shown = f"{at}.{printable(unknown[0][:80])}"
        raise BadRequest(f"{shown} is not supported; leave it out", shown)
