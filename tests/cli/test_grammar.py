"""`generate` under a grammar: what the flags take, what they refuse before a model is loaded."""

import json
import sys

import pytest

from schemas import SCHEMAS, assert_valid


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMAS["enum"]))
    return path


@pytest.mark.parametrize("flags", [(), ("--no-draft",), ("--drafter", "prompt-lookup")])
def test_json_by_a_schema(cli, schema, flags):
    code, out, err = cli("generate", "a colour", "--json-schema", schema, "--json", *flags)
    assert code == 0, err
    answer = json.loads(out)
    assert_valid(SCHEMAS["enum"], None, answer["text"], answer["finish_reason"])
    assert answer["finish_reason"] == "stop"


def test_a_regular_expression_and_a_lark_grammar(cli, tmp_path):
    code, out, _ = cli("generate", "sure?", "--regex", "(yes|no)[.]")
    assert (code, out.strip()) in ((0, "yes."), (0, "no."))
    path = tmp_path / "grammar.lark"
    path.write_text('start: "a" digits\ndigits: /[0-9]{3}/')
    code, out, _ = cli("generate", "a number", "--grammar", path)
    assert code == 0
    assert out.startswith("a")
    assert out.strip()[1:].isdecimal()
    assert len(out.strip()) == 4


def test_files_and_schemas_that_are_none(refuses, tmp_path):
    path = tmp_path / "schema.json"
    refuses(f"{path}: cannot be read", "generate", "x", "--json-schema", path)
    path.write_text("[1]")
    refuses(f"{path}: the JSON schema is a list", "generate", "x", "--json-schema", path)
    path.write_text("{")
    refuses(f"{path}: the JSON schema is not valid", "generate", "x", "--json-schema", path)
    path.write_text('{"uniqueItems": true}')
    refuses('Unimplemented keys: ["uniqueItems"]', "generate", "x", "--json-schema", path)
    refuses("no answer can be held to the regular expression", "generate", "x", "--regex", "(a")


def test_one_grammar_at_a_time(cli, schema):
    code, _, err = cli("generate", "x", "--json-schema", schema, "--regex", "a")
    assert code == 2
    assert "give one of" in err


def test_without_the_extra_it_is_told_before_anything_is_loaded(refuses, schema, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    refuses("mlx-drift[grammar]", "generate", "x", "--json-schema", schema, "--model", "/nowhere")
