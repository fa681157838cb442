"""OpenAI's own client against `mlx-drift serve`: chat/completions, Responses, a tool.

pip install openai
mlx-drift serve --model mlx-community/Qwen3-8B-4bit --drafter auto &
python examples/clients/with_openai.py
"""

import json
import os

import openai

QUESTION = "What does `shutil.copytree` do?"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def main():
    """Asks in several ways and prints the answers."""
    client = openai.OpenAI(
        base_url=os.environ.get("BASE", "http://127.0.0.1:8080") + "/v1",
        api_key=os.environ.get("MLX_DRIFT_API_KEY", "none"),
    )
    model = client.models.list().data[0].id

    print("chat:", end=" ")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    print(f"\n[{chunk.usage.model_extra['speculative']['acceptance_length']:.2f} drafts a round]")

    response = client.responses.create(model=model, input=QUESTION, max_output_tokens=40)
    print("responses:", response.output_text)

    messages = [{"role": "user", "content": "How is the weather in Bern?"}]
    try:
        answer = call(client, model, messages)
    except openai.BadRequestError as error:  # the model's template knows of no tools
        print(error.body["message"])
        return
    for tool_call in answer.tool_calls or []:
        print("tools:", tool_call.function.name, json.loads(tool_call.function.arguments))
        messages += [
            answer,
            {"role": "tool", "tool_call_id": tool_call.id, "content": "sunny, 21 degrees"},
        ]
    if answer.tool_calls:
        answer = call(client, model, messages)
    print("tools:", answer.content)


def call(client, model, messages):
    """Asks with a tool on offer; returns the message."""
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=[TOOL], max_tokens=400
    )
    return answer.choices[0].message


if __name__ == "__main__":
    main()
