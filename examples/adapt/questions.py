"""Questions about Python's library for the embedded pair's target, to learn from and to measure on.

python -m adapt.questions (from examples/) writes `questions/{train,valid}.jsonl`.
"""

import json
import random
from pathlib import Path

from train_demo_pair.data import WORDINGS, load_facts

COUNTS = {"train": 96, "valid": 24}
LEAST = 150
"""Characters of an answer that is worth asking for."""


def main() -> None:
    """Writes them: no question stands in both files, nor in the held-out ones of the pair."""
    rng = random.Random(21)
    facts = [fact for fact in load_facts() if len(fact.answer) >= LEAST and not fact.held_out]
    rng.shuffle(facts)
    folder = Path(__file__).with_name("questions")
    folder.mkdir(exist_ok=True)
    for name, count in COUNTS.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(count):
                fact = facts.pop()
                asked = rng.choice(WORDINGS[fact.kind][:-1]).format(s=fact.symbol)
                line = {"turns": [asked], "category": fact.kind}
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
