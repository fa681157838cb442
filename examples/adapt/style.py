"""Lets a model answer in a style, and writes the answers without it: data to tune the model on.

python style.py --model MODEL --questions FILE --style "Answer as a pirate." --out FOLDER
"""

import argparse
import json
from pathlib import Path

from mlx_lm import generate, load

from mlx_drift.measure.acceptance.questions import read_questions

HELD_OUT = 10
"""One answer in so many is for validation."""


def main() -> None:
    """Writes `train.jsonl` and `valid.jsonl`, as `mlx_lm.lora` reads them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--style", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    with (
        (args.out / "train.jsonl").open("w") as train,
        (args.out / "valid.jsonl").open("w") as valid,
    ):
        for number, question in enumerate(read_questions(args.questions)):
            asked = {"role": "user", "content": question.turns[0]}
            prompt = tokenizer.apply_chat_template(
                [{"role": "system", "content": args.style}, asked], add_generation_prompt=True
            )
            said = generate(model, tokenizer, prompt, max_tokens=args.max_tokens)
            messages = [asked, {"role": "assistant", "content": said}]
            (train if (number + 1) % HELD_OUT else valid).write(
                json.dumps({"messages": messages}) + "\n"
            )


if __name__ == "__main__":
    main()
