"""The three tables of Anthropic's Messages API."""

from typing import Any

from mlx_drift.serve.api.fields import Accepted, Fields, Honoured
from mlx_drift.serve.api.kinds import (
    Kind,
    anything,
    boolean,
    choice,
    either,
    integer,
    list_of,
    mapping,
    number,
    shape,
    text,
)
from mlx_drift.serve.api.tables import (
    ABOUT_THE_CALLER,
    HINT,
    MOST_CHARACTERS,
    MOST_MESSAGES,
    MOST_STOPS,
    MOST_TOKENS,
    NAME,
    REFUSED,
    SAMPLING,
    STOP,
    TOOLS,
)

THINKING = either(
    shape(
        {"type": choice("enabled")}, {"budget_tokens": integer(0, MOST_TOKENS), "display": anything}
    ),
    shape({"type": choice("adaptive")}, {"display": anything}),
    shape({"type": choice("disabled")}),
)
CHOICE = either(
    shape({"type": choice("auto", "any")}, {"disable_parallel_tool_use": boolean}),
    shape({"type": choice("none")}),
    shape({"type": choice("tool"), "name": NAME}, {"disable_parallel_tool_use": boolean}),
)
OUTPUT = shape(
    {},
    {
        "effort": choice("low", "medium", "high", "xhigh", "max"),
        "format": shape({"type": choice("json_schema"), "schema": mapping}),
    },
)


def _forgets_thinking_alone(value: Any) -> bool:
    edits = value.get("edits", []) if isinstance(value, dict) and value.keys() <= {"edits"} else 0
    return isinstance(edits, list) and all(
        isinstance(edit, dict) and str(edit.get("type")).startswith("clear_thinking_")
        for edit in edits
    )


PROMPT: dict[str, Honoured] = {
    "model": SAMPLING["model"],
    "messages": Honoured(
        list_of(mapping, MOST_MESSAGES, 1),
        "the conversation so far; if the assistant has the last word, the answer goes on from it; "
        "a result with `is_error` that does not say so is told as `Error: …`",
        required=True,
    ),
    "system": Honoured(
        either(text(MOST_CHARACTERS), list_of(mapping, MOST_MESSAGES)),
        "what the model is told first; a block that starts with `x-anthropic-billing-header:` "
        "loses that line",
    ),
    "tools": Honoured(
        TOOLS,
        "functions that may be called, each with an `input_schema`; what `strict` ones are given "
        "fits it, where calls are JSON between marks",
    ),
    "tool_choice": Honoured(
        CHOICE, "whether and which; with `none` the model is not told of the tools"
    ),
    "thinking": Honoured(
        THINKING,
        "`enabled` and `disabled` set the chat template's `enable_thinking`; `budget_tokens`: "
        "tokens of reasoning at most, then its end is forced; `display` is read over",
    ),
    "output_config": Honoured(
        OUTPUT,
        "`format`: the answer is held to the schema (the `grammar` extra); `effort`: the chat "
        "template's `reasoning_effort`, if it reads that",
    ),
    "chat_template_kwargs": Honoured(mapping, "keywords of the chat template"),
}

ACCEPTED: dict[str, Accepted] = {
    "metadata": Accepted(mapping, ABOUT_THE_CALLER),
    "user_profile_id": Accepted(NAME, ABOUT_THE_CALLER),
    "workspace_id": Accepted(NAME, ABOUT_THE_CALLER),
    "cache_control": Accepted(mapping, HINT),
    "speed": Accepted(NAME, HINT),
    "service_tier": Accepted(NAME, "there is one"),
    "inference_geo": Accepted(NAME, "the answer is made where the server is"),
    "diagnostics": Accepted(mapping, "about caches, not the answer"),
    "context_management": Accepted(
        Kind("an object whose `edits` clear thinking alone", _forgets_thinking_alone),
        "chat templates leave earlier reasoning out by themselves",
    ),
}

HOSTED = {
    "container": "this server runs no code",
    "mcp_servers": "this server calls no other servers",
    "compaction": "this server shortens no conversation",
    "thread": "nothing is stored; send the whole conversation",
    "fallbacks": "the model that is asked answers",
    "fallback_credit_token": "nothing is billed",
    "billing_policy": "nothing is billed",
    "output_format": "give it as `output_config.format`",
}

MESSAGES = Fields(
    "/v1/messages",
    {
        **PROMPT,
        "max_tokens": Honoured(
            integer(1, MOST_TOKENS), "tokens of the answer at most; default: the server's"
        ),
        "stop_sequences": Honoured(list_of(STOP, MOST_STOPS), "texts before which the answer ends"),
        "stream": SAMPLING["stream"],
        "temperature": Honoured(number(0, 1), SAMPLING["temperature"].what),
        **{name: SAMPLING[name] for name in ("top_p", "top_k", "min_p", "seed")},
        "num_draft_tokens": SAMPLING["num_draft_tokens"],
    },
    ACCEPTED,
    REFUSED | HOSTED,
)

COUNT_TOKENS = Fields("/v1/messages/count_tokens", PROMPT, ACCEPTED, HOSTED)
