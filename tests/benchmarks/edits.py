"""Writes edit tasks for `mlx-drift bench --replay`, made from Python's own standard library.

    python tests/benchmarks/edits.py > edits.jsonl
    mlx-drift bench --replay edits.jsonl

Each is a piece of a module of about 400 tokens, two changes that are asked for (a name, a
parameter), and the piece with the changes made: what a perfect answer would be.
"""

import argparse
import ast
import json
import random
import re
import sysconfig
from collections import Counter
from keyword import iskeyword
from pathlib import Path

CHARACTERS = 1100, 1700  # of about 400 tokens


def pieces(module):
    """Yields the functions and classes of a module that are neither short nor long."""
    source = module.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = "".join(lines[node.lineno - 1 : node.end_lineno])
            if CHARACTERS[0] <= len(text) <= CHARACTERS[1]:
                yield text


def edited(piece, rng):
    """Makes two changes: what is asked for, and the piece after it; None if it has no room."""
    names = Counter(re.findall(r"\b[a-z_]{4,}\b(?!\()", piece))
    often = sorted(n for n, count in names.items() if 3 <= count <= 8 and not iskeyword(n))
    heads = re.findall(r"def (\w+)\(([^()*]*\w)\):", piece)
    if not often or not heads:
        return None
    name, (function, parameters) = rng.choice(often), rng.choice(heads)
    new = f"{name}_{rng.choice(['value', 'item', 'given', 'found'])}"
    option = rng.choice(["verbose=False", "strict=True", "timeout=None", "retries=3"])
    head = f"def {function}({parameters}"
    after = piece.replace(f"{head}):", f"{head}, {option}):")
    after = re.sub(rf"\b{name}\b", new, after)
    asked = f"Rename `{name}` to `{new}`, and give `{function}` the parameter `{option}`."
    return asked, after


def tasks(count, seed):
    """Yields conversations."""
    rng = random.Random(seed)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    rng.shuffle(modules)
    for module in modules:
        found = list(pieces(module))
        made = found and edited(piece := rng.choice(found), rng)
        if not made:
            continue
        asked, after = made
        question = f"{asked} Give the whole code.\n\n```python\n{piece}```"
        answer = f"```python\n{after}```"
        roles = ("user", question), ("assistant", answer)
        yield {"messages": [{"role": role, "content": content} for role, content in roles]}
        count -= 1
        if not count:
            return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for task in tasks(options.count, options.seed):
        print(json.dumps(task))
