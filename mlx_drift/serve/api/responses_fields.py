"""The three tables of OpenAI's Responses API."""

from mlx_drift.serve.api.fields import Accepted, Fields, Honoured
from mlx_drift.serve.api.kinds import (
    Kind,
    anything,
    boolean,
    choice,
    either,
    flags,
    integer,
    list_of,
    mapping,
    shape,
    text,
)
from mlx_drift.serve.api.tables import (
    ABOUT_THE_CALLER,
    ACCEPTED,
    EFFORT,
    EFFORT_DOES,
    FORMAT,
    MOST_CHARACTERS,
    MOST_MESSAGES,
    MOST_TOKENS,
    NAME,
    REFUSED,
    SAMPLING,
    TOOLS,
)

NOTHING_KEPT = Kind(
    "null: nothing is kept, send the whole conversation as `input`", lambda value: value is None
)
CHOICE = either(
    choice("none", "auto", "required"), shape({"type": choice("function", "custom"), "name": NAME})
)


RESPONSES = Fields(
    "/v1/responses",
    {
        "input": Honoured(
            either(text(MOST_CHARACTERS), list_of(mapping, MOST_MESSAGES, 1)),
            "the conversation so far: a text, or messages, reasoning, calls and their outputs",
            required=True,
        ),
        "instructions": Honoured(text(MOST_CHARACTERS), "what the model is told first"),
        "model": SAMPLING["model"],
        "max_output_tokens": Honoured(
            integer(1, MOST_TOKENS), "tokens of the answer at most; default: the server's"
        ),
        "temperature": SAMPLING["temperature"],
        **{name: SAMPLING[name] for name in ("top_p", "top_k", "min_p", "seed")},
        "num_draft_tokens": SAMPLING["num_draft_tokens"],
        "stream": SAMPLING["stream"],
        "tools": Honoured(
            TOOLS,
            "what may be called: `function`, whose arguments fit its schema if `strict` (where "
            "calls are JSON between marks); `custom`, whose input is one text (its `format` is "
            "told to the model, not enforced); `namespace`, a group of those. `web_search` is read "
            "over: a model that is not told of a tool does not call it",
        ),
        "tool_choice": Honoured(
            CHOICE, "whether and which; with `none` the model is not told of the tools"
        ),
        "parallel_tool_calls": Honoured(boolean, "`false`: the answer ends after one call"),
        "reasoning": Honoured(
            shape({}, {"effort": EFFORT, "summary": anything, "generate_summary": anything}),
            f"`effort`: {EFFORT_DOES}; summaries are read over, reasoning is given whole",
        ),
        "thinking_budget": Honoured(
            integer(0, MOST_TOKENS), "tokens of reasoning at most; then its end is forced"
        ),
        "text": Honoured(
            shape({}, {"format": FORMAT, "verbosity": anything}),
            "`format`: as `response_format` of chat/completions, a schema beside its type; "
            "`verbosity` is read over, as no model here was trained to it",
        ),
        "chat_template_kwargs": Honoured(mapping, "keywords of the chat template"),
    },
    {
        **ACCEPTED,
        "include": Accepted(
            list_of(choice("reasoning.encrypted_content"), 8),
            "reasoning is given as it is, not encrypted",
        ),
        "stream_options": Accepted(flags("include_obfuscation"), "nothing is obfuscated"),
        "background": Accepted(choice(False), "`true` is refused"),
        "truncation": Accepted(choice("disabled"), "`auto` is refused"),
        "max_tool_calls": Accepted(integer(1, MOST_TOKENS), "about tools that the server calls"),
        "client_metadata": Accepted(mapping, ABOUT_THE_CALLER),
        "top_logprobs": Accepted(choice(0), "more are refused: chat/completions has them"),
        "previous_response_id": Accepted(NOTHING_KEPT, "there is none"),
        "conversation": Accepted(NOTHING_KEPT, "there is none"),
    },
    {
        **REFUSED,
        "prompt": "prompts are not kept; send the text",
        "context_management": "this server shortens no conversation",
        "moderation": "this server judges nothing",
        "access_programs": "this server has none",
        "background_options": "nothing is answered in the background",
        "image": "this server speaks text only",
        "max_tokens": "here it is called max_output_tokens",
    },
)
