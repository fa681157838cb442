"""What mlx-lm alone makes the embedded target say."""

import mlx_lm

from mlx_drift import load_demo
from mlx_drift.demo import QUESTION


def expected_text(max_tokens, question=QUESTION, **keywords):
    model, tokenizer, _ = load_demo()
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=max_tokens)
