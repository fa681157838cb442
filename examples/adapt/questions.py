"""Questions about Python's library, to learn from and to measure on, for any target.

python -m adapt.questions (from examples/) writes `questions/{train,valid,test}.jsonl`; with
`--tune FOLDER` other such questions with Python's own answers, to tune a target on.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from train_demo_pair.data import WORDINGS, Fact, load_facts

COUNTS = {"train": 96, "valid": 24, "tune/train": 400, "tune/valid": 20, "test": 48}
LEAST = 150
"""Characters of an answer that is worth asking for."""


def main() -> None:
    """Writes them: no question stands in two files, nor in the held-out ones of the pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", type=Path, metavar="FOLDER")
    folder = parser.parse_args().tune
    rng = random.Random(21)
    facts = [fact for fact in load_facts() if len(fact.answer) >= LEAST and not fact.held_out]
    rng.shuffle(facts)
    for name, count in COUNTS.items():
        drawn = [facts.pop() for _ in range(count)]
        part, _, file = name.rpartition("/")
        lines = [as_chat(fact, rng) if part else as_question(fact, rng) for fact in drawn]
        if part and folder is not None:
            write(folder / f"{file}.jsonl", lines)
        if not part and folder is None:
            write(Path(__file__).with_name("questions") / f"{file}.jsonl", lines)


def as_question(fact: Fact, rng: random.Random) -> dict[str, Any]:
    """Returns a question as `mlx-drift measure` reads it."""
    asked = rng.choice(WORDINGS[fact.kind][:-1]).format(s=fact.symbol)
    return {"turns": [asked], "category": fact.kind}


def as_chat(fact: Fact, rng: random.Random) -> dict[str, Any]:
    """Returns a question and its answer, as `mlx_lm.lora` reads them."""
    (asked,) = as_question(fact, rng)["turns"]
    messages = [("user", asked), ("assistant", fact.answer)]
    return {"messages": [{"role": role, "content": text} for role, text in messages]}


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes a line a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
