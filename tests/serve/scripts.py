"""What the scripted checkpoint says, for the tests of every dialect."""

CITY = {"city": "Zürich — now"}
WEATHER_CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich — now"}}\n</tool_call>'
)
TIME_CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "CET"}}\n</tool_call>'
LONG = "a line of the file\\n" * 60

SCRIPTS = {
    "[[weather]]": f"I look it up.\n{WEATHER_CALL}",
    "[[both]]": f"{WEATHER_CALL}\n{TIME_CALL}",
    "[[sunny]]": "It is sunny there.",
    "[[write]]": '<tool_call>\n{"name": "write", "arguments": {"path": "a.txt", "content": "'
    f'{LONG}"}}}}\n</tool_call>',
    "[[garbled]]": "Well, <tool_call>look up the weather</tool_call> if you please.",
    "[[broken]]": 'Hm. <tool_call>{"name": "get_weather", "arguments": {"city": oops}}</tool_call>',
    "[[unended]]": '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}',
    "[[think]]": "<think>\nFirst <tool_call> second third fourth.\n</think>\n\nSo it is five.",
    "[[think-call]]": f"<think>I need the weather.</think>\n\n{TIME_CALL[:-1]}>",
    "[[stop]]": "One two three END four.",
    "[[patch]]": '<tool_call>\n{"name": "apply_patch", "arguments": {"input": '
    '"*** Begin Patch\\n+é \\"x\\"\\n*** End Patch"}}\n</tool_call>',
    "[[namespaced]]": '<tool_call>\n{"name": "crm__find", "arguments": {"id": 5}}\n</tool_call>',
    "<think>": "It is asked whether five is odd or even.</think>\n\nFive is odd.",
    "</think>": "Enough of that.",
    "<tool_call>": '\n{"name": "get_time", "arguments": {"zone": "forced"}}\n</tool_call>',
    ' "get_weather", "arguments": ': '{"city": "forced"}}\n</tool_call>',
}

WRITTEN = {
    "json_tools": '<tool_call>\n{"name": "look", "arguments": {"a": 5}}\n</tool_call>',
    "mistral": '[TOOL_CALLS]look[ARGS]{"a": 5}',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0"
    '<|tool_call_argument_begin|>{"a": 5}<|tool_call_end|><|tool_calls_section_end|>',
    "qwen3_coder": "<tool_call>\n<function=look>\n<parameter=a>\n5\n</parameter>\n</function>\n"
    "</tool_call>",
    "glm47": "<tool_call>look\n<arg_key>a</arg_key>\n<arg_value>5</arg_value>\n</tool_call>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="look">\n<parameter name="a">5</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
    "pythonic": "<|tool_call_start|>[look(a=5)]<|tool_call_end|>",
    "function_gemma": "<start_function_call>call:look{a:5}<end_function_call>",
    "gemma4": "<|tool_call>call:look{a:5}<tool_call|>",
    "longcat": "<longcat_tool_call>look\n<longcat_arg_key>a</longcat_arg_key>\n"
    "<longcat_arg_value>5</longcat_arg_value>\n</longcat_tool_call>",
}
"""A call in the format of every family that is told apart, by the name of mlx-lm's parser."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string"} for key in keys},
                "required": keys,
            },
        },
    }
    for name, keys in {
        "get_weather": ["city"],
        "get_time": ["zone"],
        "write": ["path", "content"],
    }.items()
]
