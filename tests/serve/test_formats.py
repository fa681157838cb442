"""`response_format`: answers are what it says, streamed or whole; what cannot be held is refused.

serving.md 3.15: others' servers read the field over and answer 200.
"""

import contextlib
import sys
from typing import Literal

import anthropic
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from mlx_drift import Grammar, load_demo, stream_generate
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.formats import response_format, text_format
from mlx_drift.serve.api.served import Defaults, Served
from mlx_drift.serve.api.tables import FORMATS
from schemas import SCHEMAS, assert_valid
from serving import PATIENCE, post, server

WORDS = st.sampled_from(
    "type properties items enum const pattern anyOf allOf $ref $defs required not x-guidance "
    "maximum minItems maxLength additionalProperties format name schema".split()
)
MODEL = "mlx-drift-demo"
QUESTION = [{"role": "user", "content": "Describe a colour as JSON."}]


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def served(demo):
    return Served(MODEL, demo[1], 4096, 2048, "the model", False, Defaults())


@pytest.fixture(scope="module")
def running():
    with server("--max-tokens", "60") as process:
        yield process
    assert process.returncode == 0, process.err


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=PATIENCE)


def by_schema(name):
    return {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMAS[name]}}


class Colour(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["red", "green"]
    is_warm: bool


def test_the_clients_own_helper_parses_the_answer(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Colour, temperature=0.8, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed, Colour)
    assert answer.choices[0].finish_reason == "stop"


def test_responses_helper_parses_the_answer(client):
    """serving.md 3.16: LM Studio's Responses endpoint knows no schema."""
    response = client.responses.parse(
        model=MODEL, input=QUESTION, text_format=Colour, temperature=0.8, extra_body={"seed": 3}
    )
    assert isinstance(response.output_parsed, Colour)
    assert response.status == "completed"


def test_anthropics_helper_parses_the_answer(running):
    client = anthropic.Anthropic(base_url=running.root, api_key="none", timeout=PATIENCE)
    message = client.messages.parse(
        model=MODEL, max_tokens=60, messages=QUESTION, output_format=Colour
    )
    assert isinstance(message.parsed_output, Colour)
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize("name", ["enum", "nested", "map"])
def test_it_says_what_plain_decoding_under_the_schema_says(client, demo, name):
    model, tokenizer, _ = demo
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    grammar = Grammar.json_schema(SCHEMAS[name])
    plain = [*stream_generate(model, tokenizer, prompt, 60, grammar=grammar)]
    expected = "".join(response.text for response in plain)
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, response_format=by_schema(name), stream=stream
        )
        if stream:
            chunks = [chunk.choices[0] for chunk in answer if chunk.choices]
            text = "".join(choice.delta.content or "" for choice in chunks)
            reason = chunks[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == (expected, plain[-1].finish_reason)
    assert_valid(SCHEMAS[name], tokenizer, text, reason)


def test_any_object_a_regular_expression_and_a_grammar(client, demo):
    def text(count=60, **form):
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, response_format=form, max_tokens=count, seed=1
        ).choices[0]
        return answer.message.content, answer.finish_reason

    assert_valid({"type": "object"}, demo[1], *text(type="json_object"))
    assert text(type="regex", pattern="(yes|no)[.]") in (("yes.", "stop"), ("no.", "stop"))
    assert text(type="grammar", grammar='start: "a" "b"') == ("ab", "stop")
    assert text(type="text", count=4)[1] == "length"


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"type": "json_schema"}, "", "json_schema is None"),
        ({"type": "json_schema", "json_schema": {}}, ".json_schema.schema", "a JSON schema"),
        ({"type": "json_schema", "schema": {}}, ".schema", "not supported"),
        ({"type": "json_object", "schema": {}}, ".schema", "not supported"),
        ({"type": "text", "strict": True}, ".strict", "not supported"),
        ({"type": "regex"}, ".pattern", "expected a text"),
        ({"type": "regex", "pattern": "(a"}, ".pattern", "regex parse error"),
        ({"type": "grammar", "grammar": "start: b"}, ".grammar", "unknown name"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}},
            ".json_schema.schema",
            'Unimplemented keys: ["uniqueItems"]',
        ),
    ],
)
def test_what_is_refused(served, given, param, words):
    with pytest.raises(BadRequest) as refused:
        response_format(given, served)
    assert refused.value.param == f"response_format{param}"
    assert words in refused.value.message
    assert "\n" not in refused.value.message


def test_over_http_a_refusal_is_a_400_and_the_server_goes_on(running):
    body = {"messages": QUESTION, "response_format": {"type": "regex", "pattern": "(a"}}
    refused = post(running.url + "/chat/completions", body)
    assert refused.status == 400
    assert refused.error["param"] == "response_format.pattern"
    assert post(running.url + "/chat/completions", body | {"response_format": None}).status == 200


def test_responses_lays_a_schema_beside_its_type(served):
    form = {"type": "json_schema", "name": "a", "strict": True, "schema": SCHEMAS["enum"]}
    assert text_format(form, served) == Grammar.json_schema(SCHEMAS["enum"])
    assert text_format({"type": "text"}, served) is None
    with pytest.raises(BadRequest, match=r"text\.format\.json_schema is not supported"):
        text_format(form | {"json_schema": {}}, served)


def test_without_the_extra(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    _, tokenizer, _ = load_demo()  # which nothing was prepared for
    fresh = Served(MODEL, tokenizer, 4096, 2048, "the model", False, Defaults())
    with pytest.raises(BadRequest, match=r"pip install 'mlx-drift\[grammar\]'"):
        response_format({"type": "json_object"}, fresh)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(JUNK, st.sampled_from(FORMATS), st.sampled_from(["schema", "json_schema", "pattern"]))
def test_whatever_is_sent_is_a_grammar_or_refused(served, junk, kind, key):
    forms = {"type": kind, key: junk}, {"type": kind, "json_schema": {"schema": junk}}
    for read in (response_format, text_format):
        for form in forms:
            with contextlib.suppress(BadRequest):
                read(form, served)
