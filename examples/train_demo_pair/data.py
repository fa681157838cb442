"""The Python standard library as a chat corpus.

Sources are read with `ast`, never imported, so nothing runs and a docstring is exactly what the
file says. Every *fact* is a (symbol, kind, answer) triple; a chat is one or more facts, each asked
in one of several wordings. Two things are held out of training, to be reported apart:

* whole symbols (one in 33 functions and classes, by a hash of the name; a method shares the fate
  of its class): the target was never told these answers;
* the last wording of every kind: the target knows these answers but never saw the question.

Writes `heldout.jsonl` when run as a script.
"""

import argparse
import ast
import copy
import itertools
import json
import random
import sysconfig
import textwrap
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, str]
Chat = list[Message]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef

MODULES = """
abc argparse base64 bisect calendar collections colorsys concurrent.futures.thread contextlib copy
csv dataclasses datetime difflib enum filecmp fnmatch fractions functools getpass glob graphlib
gzip hashlib heapq hmac html html.parser io json json.decoder json.encoder linecache logging
numbers operator os pathlib pickle plistlib pprint queue random re reprlib sched secrets selectors
shelve shlex shutil statistics string subprocess tempfile textwrap threading timeit tokenize types
urllib.parse uuid warnings weakref
""".split()

MAX_DOC_CHARS = 700  # with MAX_SOURCE_CHARS: nearly every answer fits in 256 tokens
MAX_SOURCE_CHARS = 900
MAX_LISTED = 40
HELD_OUT_ONE_IN = 33

# `{s}` is the symbol. The last wording of every kind is held out of training.
WORDINGS: dict[str, list[str]] = {
    "doc": [
        "What does `{s}` do?",
        "Explain `{s}`.",
        "What is `{s}` for?",
        "Describe `{s}` to me.",
        "Tell me about `{s}`.",
        "Show me the documentation of `{s}`.",
        "How does `{s}` work?",
        "Can you explain what `{s}` does?",
    ],
    "brief": [
        "In one sentence, what does `{s}` do?",
        "Explain `{s}` briefly.",
        "Summarise `{s}` in one sentence.",
        "Give me a one-line summary of `{s}`.",
        "What is `{s}`, in short?",
        "Describe `{s}` in a single sentence.",
        "Briefly, what is `{s}` for?",
    ],
    "source": [
        "Show me the source of `{s}`.",
        "How is `{s}` implemented?",
        "What is the source code of `{s}`?",
        "Print the implementation of `{s}`.",
        "Show the code of `{s}`.",
        "Can I see how `{s}` is written?",
        "Give me the code of `{s}`, please.",
        "Let me see the source code of `{s}`.",
    ],
    "signature": [
        "What is the signature of `{s}`?",
        "Which arguments does `{s}` take?",
        "How do I call `{s}`?",
        "Show me the signature of `{s}`.",
        "What parameters does `{s}` accept?",
        "How is `{s}` called?",
        "Tell me the arguments of `{s}`.",
    ],
    "members": [
        "Which methods does `{s}` have?",
        "List the public methods of `{s}`.",
        "What can I call on `{s}`?",
        "Show me the methods of `{s}`.",
        "What are the methods of `{s}`?",
        "Name the public methods of `{s}`.",
    ],
    "contents": [
        "What is in the `{s}` module?",
        "List the functions and classes of `{s}`.",
        "Which names does `{s}` define?",
        "What does the module `{s}` offer?",
        "Show me what `{s}` contains.",
        "Name the public functions and classes of `{s}`.",
    ],
}
SYSTEM_PROMPTS = [
    "You are a helpful assistant for Python programmers.",
    "You answer questions about the Python standard library.",
    "Be concise.",
    "You are a Python expert.",
    "Answer from the documentation.",
]
SYSTEM_SHARE = 0.2
MULTI_TURN_SHARE = 0.25


@dataclass(frozen=True)
class Fact:
    """One question's answer: `kind` picks the wordings, `symbol` fills them."""

    module: str
    symbol: str
    kind: str
    answer: str
    held_out: bool


def source_file(module: str) -> Path:
    path = Path(sysconfig.get_path("stdlib"), *module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def first_paragraphs(text: str, limit: int) -> str:
    """The longest prefix of whole paragraphs within `limit` characters; '' where none fits."""
    kept = ""
    for paragraph in text.strip().split("\n\n"):
        longer = f"{kept}\n\n{paragraph}" if kept else paragraph
        if len(longer) > limit:
            break
        kept = longer
    return kept.rstrip()


def first_sentence(doc: str) -> str:
    paragraph = " ".join(doc.split("\n\n")[0].split())
    sentence = paragraph.split(". ")[0]
    return sentence if sentence.endswith(".") else sentence + "."


def signature(symbol: str, node: Function, bound: bool) -> str:
    """The call as a user writes it: without `self` where the method is bound."""
    arguments = copy.deepcopy(node.args)
    if bound:
        positional = arguments.posonlyargs or arguments.args
        del positional[:1]
    return f"{symbol}({ast.unparse(arguments)})"


def facts_of(module: str) -> Iterator[Fact]:
    text = source_file(module).read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    definitions = public_definitions(tree.body)
    for kind, answer in doc_answers(tree):
        yield Fact(module, module, kind, answer, held_out=False)
    if definitions:
        yield Fact(module, module, "contents", listing(definitions), held_out=False)
    for node in definitions:
        symbol = f"{module}.{node.name}"
        held_out = zlib.crc32(symbol.encode()) % HELD_OUT_ONE_IN == 0
        for kind, answer in definition_answers(symbol, node, lines, bound=False):
            yield Fact(module, symbol, kind, answer, held_out)
        if not isinstance(node, ast.ClassDef):
            continue
        methods = public_definitions(node.body)
        if methods:
            yield Fact(module, symbol, "members", listing(methods), held_out)
        for method in methods:  # a method shares the fate of its class
            name = f"{symbol}.{method.name}"
            for kind, answer in definition_answers(name, method, lines, bound=True):
                yield Fact(module, name, kind, answer, held_out)


def public_definitions(body: list[ast.stmt]) -> list[Definition]:
    return [n for n in body if isinstance(n, Definition) and not n.name.startswith("_")]


def listing(nodes: list[Definition]) -> str:
    names = list(dict.fromkeys(node.name for node in nodes))
    return "\n".join(f"- `{name}`" for name in names[:MAX_LISTED])


def doc_answers(node: Definition | ast.Module) -> Iterator[tuple[str, str]]:
    doc = ast.get_docstring(node)
    if doc and (answer := first_paragraphs(doc, MAX_DOC_CHARS)):
        yield "doc", answer
        brief = first_sentence(doc)
        if len(brief) < len(answer):
            yield "brief", brief


def definition_answers(
    symbol: str, node: Definition, lines: list[str], bound: bool
) -> Iterator[tuple[str, str]]:
    yield from doc_answers(node)
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    source = textwrap.dedent("\n".join(lines[start : node.end_lineno]))
    if len(source) <= MAX_SOURCE_CHARS:
        yield "source", f"```python\n{source}\n```"
    if not isinstance(node, ast.ClassDef):
        static = any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
        yield "signature", f"```python\n{signature(symbol, node, bound and not static)}\n```"


def load_facts() -> list[Fact]:
    """Every fact once; a symbol defined twice (platform branches) keeps its first definition."""
    unique: dict[tuple[str, str], Fact] = {}
    for module in MODULES:
        for fact in facts_of(module):
            unique.setdefault((fact.symbol, fact.kind), fact)
    return list(unique.values())


def ask(fact: Fact, rng: random.Random) -> Chat:
    question = rng.choice(WORDINGS[fact.kind][:-1]).format(s=fact.symbol)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": fact.answer}]


def with_system_prompt(chat: Chat, rng: random.Random) -> Chat:
    if rng.random() >= SYSTEM_SHARE:
        return chat
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *chat]


def training_chats(facts: list[Fact], rng: random.Random, turns: int | None = None) -> list[Chat]:
    """One epoch: every fact once, in a random wording, grouped into chats of one or more turns.

    A multi-turn chat stays inside one module, as a curious reader would. `turns` fixes the length
    of all chats (for rows of long context).
    """
    by_module: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        if not fact.held_out:
            by_module[fact.module].append(fact)
    chats = []
    for group in by_module.values():
        rng.shuffle(group)
        while group:
            multi = rng.random() < MULTI_TURN_SHARE
            length = turns or (rng.randint(2, 4) if multi else 1)
            chat = [m for fact in group[-length:] for m in ask(fact, rng)]
            del group[-length:]
            chats.append(with_system_prompt(chat, rng))
    rng.shuffle(chats)
    return chats


def heldout_records(facts: list[Fact], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` records, half on unseen symbols and half on unseen wordings of seen symbols."""
    rng = random.Random(seed)
    long_enough = [f for f in facts if len(f.answer) >= 150]  # 30 tokens or more
    records = []
    for split in ("symbol", "wording"):
        pool = [f for f in long_enough if f.held_out == (split == "symbol")]
        rng.shuffle(pool)
        by_kind: dict[str, list[Fact]] = defaultdict(list)
        for fact in pool:
            by_kind[fact.kind].append(fact)
        # One of each kind, then the next of each: the rare kinds are not drowned.
        in_turn = itertools.chain(*itertools.zip_longest(*map(reversed, by_kind.values())))
        for fact in list(filter(None, in_turn))[: count // 2]:
            wording = rng.choice(WORDINGS[fact.kind][:-1])
            if split == "wording":
                wording = WORDINGS[fact.kind][-1]
            question = {"role": "user", "content": wording.format(s=fact.symbol)}
            messages = with_system_prompt([question], rng)
            records.append({"split": split, "messages": messages, "answer": fact.answer})
    return records


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("heldout.jsonl"))
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    facts = load_facts()
    records = heldout_records(facts, args.count, args.seed)
    args.out.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    symbols, held_out = {f.symbol for f in facts}, {f.symbol for f in facts if f.held_out}
    print(f"{len(facts)} facts on {len(symbols)} symbols, {len(held_out)} of them held out")
    for kind, count in Counter(fact.kind for fact in facts).items():
        characters = sum(len(fact.answer) for fact in facts if fact.kind == kind)
        print(f"{kind}: {count} facts, {characters} characters")


if __name__ == "__main__":
    main()
