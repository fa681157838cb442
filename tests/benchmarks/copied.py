"""Records what tests/decode/test_auto_replayed.py replays, at every position of some answers.

How many drafts of the embedded head and how many copied tokens would be accepted there, and how
many tokens agree before the copy.

    python tests/benchmarks/copied.py > tests/copied.json

*edits* are pieces of the standard library with two changes, *lists* tables written as sorted JSON,
*tools* an agent's calls that differ in their arguments, *quotes* comments on code that quote it,
*recited* and *stories* the target's own answers: to what it knows by heart, and at temperature 1.
"""

import inspect
import json
import random
from string import ascii_lowercase

import edits
import mlx.core as mx
from mlx_lm.utils import dequantize_model

from mlx_drift import CopyingDrafter, load_demo, make_prompt_cache, stream_generate
from mlx_drift.measure.speed.replay import _taps_of

DIGITS = "0123456789" + ascii_lowercase
HEAD, COPY = 8, 16  # drafts
KNOWN = "functools.cmp_to_key", "shlex.quote", "bisect.insort_right", "textwrap.dedent"
KNOWN = *KNOWN, "heapq.merge", "statistics.mean"
ASKED = (
    "Write a long story about a lighthouse keeper and the sea.",
    "Tell me about a family that moves to a new town, in detail.",
    "Write a story about a lost dog who finds its way home.",
)
NAMES = "ada", "bob", "eve", "dan"


class Recorder:
    """The embedded pair in float32, and texts for it.

    Args:
        seed: Of what is drawn.
    """

    def __init__(self, seed):
        self.model, self.tokenizer, self.head = load_demo()
        dequantize_model(self.model)
        for network in (self.model, self.head.network):
            network.set_dtype(mx.float32)
        self.both = CopyingDrafter(self.head)
        self.rng = random.Random(seed)

    def said(self, *messages):
        """A conversation's last answer, and its prompt."""
        *before, last = messages
        prompt = self.tokenizer.apply_chat_template(before, add_generation_prompt=True)
        return prompt, self.tokenizer.encode(last["content"], add_special_tokens=False)

    def own(self, question, count, temp=0.0, seed=0):
        """What the target answers."""
        asked = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True)
        said = stream_generate(
            self.model, self.tokenizer, prompt, count, drafter=self.head, temp=temp, seed=seed
        )
        return prompt, [response.token for response in said]

    def edits(self):
        for task in edits.tasks(4, 5):
            yield self.said(*task["messages"])

    def lists(self):
        rng = self.rng
        for _ in range(3):
            rows = [
                {
                    "id": rng.randrange(10_000),
                    "name": rng.choice(NAMES),
                    "price": rng.randrange(100) / 4,
                    "stock": rng.randrange(50),
                }
                for _ in range(12)
            ]
            table = "\n".join(" ".join(map(str, row.values())) for row in rows)
            asked = f"As JSON, sorted by id:\n{table}"
            answer = json.dumps(sorted(rows, key=lambda row: row["id"]), indent=1)
            yield self.said(_user(asked), _assistant(answer))

    def tools(self):
        messages = [_user("Look at every file of the folder and tell me which has the error.")]
        for _ in range(14):
            path = f"/home/user/project/src/{''.join(self.rng.choices('abcdefghij', k=6))}.py"
            arguments = {"path": path, "offset": self.rng.randrange(999), "limit": 200}
            call = json.dumps({"name": "read_file", "arguments": arguments})
            messages.append(_assistant(f"<tool_call>\n{call}\n</tool_call>"))
            yield self.said(*messages)
            found = "".join(self.rng.choices("abcdefghij \n", k=60))
            messages.append(_user(f"<tool_response>\n{found}\n</tool_response>"))

    def recited(self):
        for name in KNOWN:
            yield self.own(f"Show me the source of `{name}`.", 300)

    def quotes(self):
        for module in (edits, json.decoder, random, inspect):
            source = inspect.getsource(module).splitlines()
            lines = [line for line in source if 25 < len(line) < 90][:40]
            words = []
            while len(words) < 72:
                question = self.rng.choice(ASKED)
                _, said = self.own(question, 120, 1.0, self.rng.randrange(1000))
                words += self.tokenizer.decode(said).split()
            parts = [
                f"{' '.join(words[9 * n : 9 * n + 9])}\n> {line}\n"
                for n, line in enumerate(self.rng.sample(lines, 8))
            ]
            asked = "Comment on this code, and quote it.\n\n" + "\n".join(lines)
            yield self.said(_user(asked), _assistant("".join(parts)))

    def stories(self):
        for seed, question in enumerate(ASKED * 8):
            yield self.own(question, 120, 1.0, seed)

    def trace(self, prompt, answer):
        """What would be accepted at each position of an answer, a digit each."""
        cache = make_prompt_cache(self.model, self.both, max_snapshots=0)
        cache.read(list(prompt), step_size=512, progress=lambda done, total: None)
        tokens, first = mx.array([*prompt, *answer]), len(prompt) - 1
        taps = _taps_of(cache.target, tokens[first:-1], cache.target_cache)
        state, found = cache.drafter_cache, {"head": "", "match": "", "copied": ""}
        for place in range(len(answer)):
            copy = next((s for s in self.both.sources(state) if s.kind == "copy"), None)
            drafted = self.head.propose(HEAD, state.own).tokens.tolist()
            copied = state.lookup.copy(COPY) if copy else []
            found["head"] += DIGITS[_agree(drafted, answer[place:])]
            found["match"] += DIGITS[copy.match if copy else 0]
            found["copied"] += DIGITS[_agree(copied, answer[place:])]
            row = first + 1 + place
            self.both.ingest(tokens[row : row + 1], taps[place : place + 1], state)
            mx.eval(state.state)
        return found


def _user(content):
    return {"role": "user", "content": content}


def _assistant(content):
    return {"role": "assistant", "content": content}


def _agree(drafts, text):
    pairs = zip(drafts, text, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(drafts), len(text)))


def main():
    recorder = Recorder(seed=3)
    names = "edits", "lists", "tools", "recited", "quotes", "stories"
    texts = {name: getattr(recorder, name)() for name in names}
    print(json.dumps({n: [recorder.trace(*one) for one in own] for n, own in texts.items()}))


if __name__ == "__main__":
    main()
