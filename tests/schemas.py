"""Twelve JSON schemas, and what an answer to one must hold."""

import json

import jsonschema
import llguidance
from llguidance.hf import from_tokenizer

from mlx_drift import Grammar

NAME = {"type": "string", "maxLength": 8}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def closed(required=None, **properties):
    """An object of these keys alone."""
    names = [*properties] if required is None else required
    keys = {"type": "object", "properties": properties, "required": names}
    return keys | {"additionalProperties": False}


TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": closed(
            value=DIGIT,
            children={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
        )
    },
}

SCHEMAS = {
    "object": closed(name=NAME, age=DIGIT),
    "nested": closed(who=closed(first=NAME, last=NAME), where=closed(street=NAME, number=DIGIT)),
    "array": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 5},
    "enum": closed(colour={"enum": ["red", "green", "blue"]}, size={"enum": [1, 2, 3, None]}),
    "optional": closed(required=["a"], a=DIGIT, b=NAME, c={"type": "boolean"}),
    "anyOf": closed(value={"anyOf": [DIGIT, NAME, {"type": "null"}]}),
    "const": closed(kind={"const": "a kind of constant that is long"}, version={"const": 2}),
    "pattern": closed(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "format": closed(day={"type": "string", "format": "date"}),
    "recursive": TREE,
    "prefixItems": {
        "type": "array",
        "prefixItems": [DIGIT, {"type": "boolean"}, NAME],
        "minItems": 3,
        "items": False,
    },
    "map": {"type": "object", "additionalProperties": DIGIT, "minProperties": 1},
}


def assert_valid(schema, tokenizer, text, finish_reason):
    """Asserts that a text is valid; where it was cut off, that it may become so."""
    if finish_reason == "stop":
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
        return
    assert finish_reason == "length"
    # Written byte by byte and asked anew: nothing of how it came about plays a part.
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=spaces)
    tokens = from_tokenizer(tokenizer._tokenizer)
    matcher = llguidance.LLMatcher(tokens, grammar)
    written = tokens.greedy_tokenize(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert matcher.try_consume_tokens(written) == len(written)


def grammar_of(name):
    return Grammar.json_schema(SCHEMAS[name])
