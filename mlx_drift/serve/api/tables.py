"""The three tables of the endpoints that OpenAI's API had from the beginning."""

from typing import Any

from mlx_drift.decode.sampling import COLDEST
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS
from mlx_drift.serve.api.fields import Accepted, Fields, Honoured
from mlx_drift.serve.api.kinds import (
    Kind,
    boolean,
    choice,
    either,
    flags,
    integer,
    list_of,
    mapping,
    number,
    shape,
    text,
)

MOST_CHARACTERS = 1 << 24
MOST_MESSAGES = 4096
MOST_CHOICES = 16
MOST_STOPS = 16
MOST_TOKENS = 1 << 24
MOST_TOOLS = 1024

NAME = text(512)
STOP = text(512)


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 1024
        and all(
            key.isascii() and key.isdecimal() and len(key) < 10 and number(-100, 100).passes(bias)
            for key, bias in value.items()
        )
    )


FORMATS = "text", "json_object", "json_schema", "regex", "grammar"
FORMAT = Kind(
    "an object whose `type` is " + ", ".join(f'"{name}"' for name in FORMATS),
    lambda value: isinstance(value, dict) and value.get("type") in FORMATS,
)
FORMAT_DOES = (
    "what the answer must be: `json_object`; `json_schema`, with `json_schema.schema`; `regex`, "
    "with `pattern`; `grammar`, with `grammar` (Lark's, as llguidance has it). Reasoning comes "
    "before it, calls of tools are ruled out by it. Needs the `grammar` extra"
)

EFFORT = choice("none", "minimal", "low", "medium", "high", "xhigh", "max")
EFFORT_DOES = (
    "the chat template's `reasoning_effort`, if it reads that; `none` sets its `enable_thinking` "
    "to false"
)
TOOLS = list_of(mapping, MOST_TOOLS)
TOOL_CHOICE = Kind(
    '"none", "auto", "required", or an object that names a function',
    either(
        choice("none", "auto", "required"),
        shape({"type": choice("function"), "function": shape({"name": NAME})}),
    ).passes,
)
PREDICTION = Kind(
    '{"type": "content", "content": a text, or a list of parts}',
    shape(
        {
            "type": choice("content"),
            "content": either(text(MOST_CHARACTERS), list_of(mapping, MOST_MESSAGES)),
        }
    ).passes,
)

CONTEXT_SIZE = integer(1, MOST_TOKENS)

SAMPLING: dict[str, Honoured] = {
    "model": Honoured(NAME, "which model answers; the default one if it is left out"),
    "max_tokens": Honoured(integer(1, MOST_TOKENS), "tokens of the answer at most"),
    "temperature": Honoured(
        number(0, 2), f"0 for greedy decoding, else at least {COLDEST:g}; default: the server's"
    ),
    "top_p": Honoured(number(0, 1), "the likeliest tokens that make up this mass; 0 or 1 for all"),
    "top_k": Honoured(integer(0, 1 << 31), "so many of the likeliest tokens; 0 for all"),
    "min_p": Honoured(number(0, 1), "tokens at least this likely, in parts of the likeliest"),
    "xtc_probability": Honoured(number(0, 1), "how often XTC removes the likeliest tokens but one"),
    "xtc_threshold": Honoured(number(0, 0.5), "what a token must reach for XTC to see it"),
    "seed": Honoured(
        integer(0, (1 << 63) - 1),
        "makes what is drawn reproducible; drafts are then of fixed length",
    ),
    "n": Honoured(integer(1, MOST_CHOICES), "answers to give"),
    "stop": Honoured(either(STOP, list_of(STOP, MOST_STOPS)), "texts before which the answer ends"),
    "stream": Honoured(boolean, "send the answer in pieces, as it is accepted"),
    "stream_options": Honoured(
        flags("include_usage", "include_obfuscation"),
        "`include_usage`: a last piece that holds the usage; `include_obfuscation`: accepted",
    ),
    "presence_penalty": Honoured(number(-2, 2), "as mlx-lm's"),
    "presence_context_size": Honoured(CONTEXT_SIZE, "last tokens it looks at; default 20"),
    "frequency_penalty": Honoured(number(-2, 2), "as mlx-lm's"),
    "frequency_context_size": Honoured(CONTEXT_SIZE, "last tokens it looks at; default 20"),
    "repetition_penalty": Honoured(number(0.01, 100), "as mlx-lm's"),
    "repetition_context_size": Honoured(CONTEXT_SIZE, "last tokens it looks at; default 20"),
    "logit_bias": Honoured(
        Kind("an object of token ids with a number from -100 to 100 each", _is_bias),
        "added to the logits of tokens",
    ),
    "num_draft_tokens": Honoured(
        integer(0, MAX_DRAFT_TOKENS), "drafts a round; 0 for plain decoding; default: the server's"
    ),
}
"""What the completions of all kinds have in common."""

HINT = "a hint about speed"
ABOUT_THE_CALLER = "about who asks, not what"

ACCEPTED: dict[str, Accepted] = {
    "user": Accepted(NAME, ABOUT_THE_CALLER),
    "safety_identifier": Accepted(NAME, ABOUT_THE_CALLER),
    "metadata": Accepted(mapping, ABOUT_THE_CALLER),
    "store": Accepted(choice(False), "nothing is stored; `true` is refused"),
    "service_tier": Accepted(NAME, "there is one"),
    "prompt_cache_key": Accepted(NAME, HINT),
    "prompt_cache_retention": Accepted(NAME, HINT),
    "prompt_cache_options": Accepted(mapping, HINT),
}

NOT_LOADED = "models are loaded by the server's operator alone"

REFUSED: dict[str, str] = {
    "draft_model": NOT_LOADED,
    "adapters": NOT_LOADED,
}

CHAT = Fields(
    "/v1/chat/completions",
    {
        "messages": Honoured(
            list_of(mapping, MOST_MESSAGES, 1), "the conversation so far", required=True
        ),
        **SAMPLING,
        "max_completion_tokens": Honoured(integer(1, MOST_TOKENS), "the same as `max_tokens`"),
        "logprobs": Honoured(boolean, "give the log-probability of every token"),
        "top_logprobs": Honoured(integer(0, 20), "and those of so many of the likeliest"),
        "chat_template_kwargs": Honoured(mapping, "keywords of the chat template"),
        "response_format": Honoured(FORMAT, FORMAT_DOES),
        "reasoning_effort": Honoured(EFFORT, EFFORT_DOES),
        "speculative": Honoured(
            flags("tokens", "drift"),
            "`tokens`: tell of every round who said its tokens, in `choices[].speculative`; "
            "`drift`: and what its drafter's chain recycled and attended to, which takes longer",
        ),
        "thinking_budget": Honoured(
            integer(0, MOST_TOKENS), "tokens of reasoning at most; then its end is forced"
        ),
        "tools": Honoured(
            TOOLS,
            "functions that may be called; the arguments of `strict` ones fit their schema, where "
            "calls are JSON between marks",
        ),
        "tool_choice": Honoured(
            TOOL_CHOICE,
            "whether and which; with `none` the model is not told of the tools",
        ),
        "parallel_tool_calls": Honoured(boolean, "`false`: the answer ends after one call"),
        "prediction": Honoured(
            PREDICTION,
            "what the answer may be: drafts are copied from it as long as they are right",
        ),
    },
    {
        **ACCEPTED,
        "modalities": Accepted(choice(["text"]), "text is what there is"),
    },
    {
        **REFUSED,
        "functions": "give them as tools",
        "function_call": "give it as tool_choice",
        "moderation": "this server judges nothing",
        "audio": "this server speaks text only",
        "web_search_options": "this server searches nothing",
        "verbosity": "no model here was trained to it",
        "role_mapping": "roles are the template's",
    },
)

TOKEN = integer(0, MOST_TOKENS)
TOKENS = list_of(TOKEN, MOST_TOKENS, 1)
PROMPT = text(MOST_CHARACTERS)

COMPLETIONS = Fields(
    "/v1/completions",
    {
        "prompt": Honoured(
            either(
                PROMPT,
                TOKENS,
                list_of(PROMPT, MOST_CHOICES, 1),
                list_of(TOKENS, MOST_CHOICES, 1),
            ),
            "texts or token ids to go on from",
            required=True,
        ),
        **SAMPLING,
        "logprobs": Honoured(integer(0, 5), "log-probabilities, and of so many of the likeliest"),
    },
    {
        **ACCEPTED,
        "echo": Accepted(choice(False), "`true` is refused"),
        "best_of": Accepted(choice(1), "more than one is refused"),
    },
    {**REFUSED, "suffix": "a decoder cannot see what comes after"},
)

TOKENIZE = Fields(
    "/tokenize",
    {
        "model": SAMPLING["model"],
        "prompt": Honoured(PROMPT, "a text"),
        "messages": Honoured(list_of(mapping, MOST_MESSAGES, 1), "or a conversation"),
        "chat_template_kwargs": CHAT.honoured["chat_template_kwargs"],
        "add_generation_prompt": Honoured(boolean, "end where the answer begins; default true"),
        "add_special_tokens": Honoured(boolean, "of a text: as the tokenizer does; default true"),
        "return_token_strs": Honoured(boolean, "give the text of each token too"),
    },
    {},
)
