"""The three tables of keys: what the documentation says is what the endpoints do."""

import inspect
from pathlib import Path

import pytest
from anthropic.resources.beta.messages import Messages as BetaMessages
from anthropic.resources.messages import Messages
from openai.resources.chat.completions import Completions as Chat
from openai.resources.completions import Completions
from openai.resources.responses import Responses

import mlx_drift.serve
from mlx_drift.serve.api.endpoints import EVERY
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.messages_fields import COUNT_TOKENS, MESSAGES
from mlx_drift.serve.api.responses_fields import RESPONSES
from mlx_drift.serve.api.tables import ACCEPTED, CHAT, COMPLETIONS

README = Path(mlx_drift.serve.__file__).parent / "README.md"

GOOD = {
    "model": "m",
    "messages": [{"role": "user", "content": "a"}],
    "prompt": "a",
    "max_tokens": 1,
    "max_completion_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 4,
    "min_p": 0.1,
    "xtc_probability": 0.1,
    "xtc_threshold": 0.2,
    "seed": 1,
    "n": 2,
    "stop": ["a"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "presence_penalty": 1,
    "presence_context_size": 5,
    "frequency_penalty": -1.5,
    "frequency_context_size": 5,
    "repetition_penalty": 1.1,
    "repetition_context_size": 5,
    "logit_bias": {"5": -100},
    "num_draft_tokens": 2,
    "logprobs": None,
    "top_logprobs": 2,
    "chat_template_kwargs": {"a": 1},
    "speculative": {"tokens": True},
    "add_generation_prompt": False,
    "add_special_tokens": False,
    "return_token_strs": True,
    "user": "u",
    "safety_identifier": "u",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit"},
    "prediction": {"type": "content", "content": "a"},
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "tools": [{"type": "function", "function": {"name": "a"}}],
    "tool_choice": {"type": "function", "function": {"name": "a"}},
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "thinking_budget": 5,
    "echo": False,
    "best_of": 1,
}
BAD = {
    "model": 5,
    "messages": [],
    "prompt": [[]],
    "max_tokens": 0,
    "max_completion_tokens": 1.5,
    "temperature": 2.1,
    "top_p": -0.1,
    "top_k": 1.0,
    "min_p": True,
    "xtc_probability": "0.1",
    "xtc_threshold": 0.6,
    "seed": -1,
    "n": 17,
    "stop": [5],
    "stream": "true",
    "stream_options": {"include": True},
    "presence_penalty": 3,
    "presence_context_size": 0,
    "frequency_penalty": 10**400,
    "frequency_context_size": -1,
    "repetition_penalty": 0,
    "repetition_context_size": 1e9,
    "logit_bias": {"five": 1},
    "num_draft_tokens": 65,
    "prediction": {"type": "content"},
    "logprobs": 21,
    "top_logprobs": 21,
    "chat_template_kwargs": [],
    "speculative": {"token": True},
    "add_generation_prompt": 1,
    "add_special_tokens": 0,
    "return_token_strs": "",
    "user": ["u"],
    "safety_identifier": "u" * 1000,
    "metadata": "a",
    "store": True,
    "service_tier": 5,
    "prompt_cache_key": {},
    "prompt_cache_retention": 24,
    "prompt_cache_options": "explicit",
    "modalities": ["audio"],
    "response_format": {"type": "jsonobject"},
    "tools": ["a"],
    "tool_choice": {"type": "function"},
    "parallel_tool_calls": "yes",
    "reasoning_effort": "much",
    "thinking_budget": -1,
    "echo": True,
    "best_of": 2,
}

MESSAGES_GOOD = {
    "system": [{"type": "text", "text": "a"}],
    "tools": [{"name": "a", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "tool", "name": "a", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
    "stop_sequences": ["a"],
    "user_profile_id": "u",
    "workspace_id": "w",
    "cache_control": {"type": "ephemeral"},
    "speed": "standard",
    "inference_geo": "us",
    "diagnostics": {"previous_message_id": None},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
}
MESSAGES_BAD = {
    "system": 5,
    "tools": ["a"],
    "tool_choice": {"type": "tool"},
    "thinking": {"type": "disabled", "budget_tokens": 5},
    "output_config": {"format": {"type": "json_schema"}},
    "stop_sequences": "a",
    "user_profile_id": 5,
    "workspace_id": 5,
    "cache_control": "ephemeral",
    "speed": 5,
    "inference_geo": 5,
    "diagnostics": 5,
    "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
}
RESPONSES_GOOD = {
    "input": [{"role": "user", "content": "a"}],
    "instructions": "a",
    "max_output_tokens": 1,
    "tools": [{"type": "function", "name": "a"}],
    "tool_choice": {"type": "function", "name": "a"},
    "reasoning": {"effort": "low", "summary": "auto"},
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "include": ["reasoning.encrypted_content"],
    "stream_options": {"include_obfuscation": False},
    "background": False,
    "truncation": "disabled",
    "max_tool_calls": 3,
    "client_metadata": {"a": "b"},
    "top_logprobs": 0,
    "previous_response_id": None,
    "conversation": None,
}
RESPONSES_BAD = {
    "input": [],
    "instructions": 5,
    "max_output_tokens": 0,
    "tools": ["a"],
    "tool_choice": {"type": "function"},
    "reasoning": {"effort": "much"},
    "text": {"format": {"type": "xml"}},
    "include": ["file_search_call.results"],
    "stream_options": {"include_usage": True},
    "background": True,
    "truncation": "auto",
    "max_tool_calls": 0,
    "client_metadata": 5,
    "top_logprobs": 5,
    "previous_response_id": "resp_1",
    "conversation": "conv_1",
}
OF = {
    "/v1/responses": (RESPONSES_GOOD, RESPONSES_BAD),
    "/v1/messages": (MESSAGES_GOOD, MESSAGES_BAD),
    "/v1/messages/count_tokens": (MESSAGES_GOOD, MESSAGES_BAD),
}
"""What an endpoint's keys hold where others hold something else under the same name."""


def good(fields):
    return GOOD | OF.get(fields.path, ({}, {}))[0]


def bad(fields):
    return BAD | OF.get(fields.path, ({}, {}))[1]


def least(fields):
    return {name: good(fields)[name] for name, field in fields.honoured.items() if field.required}


@pytest.mark.parametrize("fields", EVERY, ids=lambda fields: fields.path)
def test_the_documentation_has_the_tables(fields):
    assert f"### `POST {fields.path}`\n\n{fields.tables()}\n" in README.read_text()


@pytest.mark.parametrize("fields", EVERY, ids=lambda fields: fields.path)
def test_keys_are_honoured_accepted_or_refused_by_name(fields):
    for name in fields.honoured:
        assert (
            name in fields.read(least(fields) | {name: good(fields)[name]})
            or good(fields)[name] is None
        )
    for name in fields.accepted:
        assert fields.read(least(fields) | {name: good(fields)[name]}) == least(fields)
    for name in (*fields.refused, "suffixes", "x" * 500, "a\nb"):
        with pytest.raises(BadRequest) as refused:
            fields.read(least(fields) | {name: "a"})
        assert refused.value.param.startswith(name[:1])
        assert name[:80].replace("\n", "\\n") in refused.value.message
        assert "\n" not in refused.value.message
    for name in (*fields.honoured, *fields.accepted):
        if name in bad(fields):
            with pytest.raises(BadRequest, match=name) as refused:
                fields.read(least(fields) | {name: bad(fields)[name]})
            assert refused.value.param == name
            assert fields.read(least(fields) | {name: None} | least(fields)) == least(fields)
    for name in least(fields):
        with pytest.raises(BadRequest, match=f"{name} is missing"):
            fields.read({})


def test_every_key_has_an_example():
    for fields in EVERY:
        assert {*fields.honoured, *fields.accepted} <= good(fields).keys()
        assert {*fields.honoured, *fields.accepted} <= bad(fields).keys()


def test_what_the_clients_know_is_decided():
    """Every key of OpenAI's and Anthropic's own clients is in one of the tables."""
    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    transport |= {"betas"}
    for create, fields in (
        (Chat.create, CHAT),
        (Completions.create, COMPLETIONS),
        (Responses.create, RESPONSES),
        (Messages.create, MESSAGES),
        (BetaMessages.create, MESSAGES),
        (Messages.count_tokens, COUNT_TOKENS),
        (BetaMessages.count_tokens, COUNT_TOKENS),
    ):
        keys = {*inspect.signature(create).parameters} - transport
        assert keys <= {*fields.honoured, *fields.accepted, *fields.refused}, fields.path
    assert ACCEPTED.keys() <= CHAT.accepted.keys() & COMPLETIONS.accepted.keys()
