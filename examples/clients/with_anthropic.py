"""Anthropic's own client against `mlx-drift serve`: Messages, a tool.

pip install anthropic
mlx-drift serve --model mlx-community/Qwen3-8B-4bit --drafter auto &
python examples/clients/with_anthropic.py
"""

import os

import anthropic

QUESTION = "What does `shutil.copytree` do?"
TOOL = {
    "name": "get_weather",
    "description": "Tells the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def main():
    """Asks in several ways and prints the answers."""
    client = anthropic.Anthropic(
        base_url=os.environ.get("BASE", "http://127.0.0.1:8080"),
        api_key=os.environ.get("MLX_DRIFT_API_KEY", "none"),
    )
    model = client.models.list().data[0].id

    print("messages:", end=" ")
    messages = [{"role": "user", "content": QUESTION}]
    with client.messages.stream(model=model, max_tokens=40, messages=messages) as stream:
        for text in stream.text_stream:
            print(text, end="", flush=True)
        usage = stream.get_final_message().usage
    print(f"\n[{usage.cache_read_input_tokens} tokens of the prompt were cached]")

    counted = client.messages.count_tokens(model=model, messages=messages)
    print("tokens of the prompt:", counted.input_tokens)

    messages = [{"role": "user", "content": "How is the weather in Bern?"}]
    keywords = {"model": model, "max_tokens": 400, "tools": [TOOL]}
    try:
        message = client.messages.create(messages=messages, **keywords)
    except anthropic.BadRequestError as error:  # the model's template knows of no tools
        print(error.body["error"]["message"])
        return
    results = []
    for block in message.content:
        if block.type == "tool_use":
            print("tools:", block.name, block.input)
            told = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny, 21 degrees"}
            results.append(told)
    if results:
        messages += [
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": results},
        ]
        message = client.messages.create(messages=messages, **keywords)
    print("tools:", *(block.text for block in message.content if block.type == "text"))


if __name__ == "__main__":
    main()
