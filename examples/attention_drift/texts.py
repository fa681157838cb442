"""What the target says to every prompt of the study, recorded once for all drafters.

Greedy speculative decoding changes nothing of what the target says, nor the states it says it with:
so the target, which takes nearly all of a round's time, need not speak again for each drafter.
"""

import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.demo import load_demo
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.measure.acceptance.asking import Settings
from mlx_drift.measure.acceptance.context import Contexts
from mlx_drift.measure.acceptance.perturb import perturbations
from mlx_drift.measure.acceptance.questions import Question, read_questions
from mlx_drift.measure.acceptance.wording import Wording
from mlx_drift.target.model import Target

QUESTIONS = Path(__file__).parents[1] / "train_demo_pair" / "heldout.jsonl"
HELD_OUT = "held out"

EVERY_PERTURBED, EVERY_LONG = 3, 5
"""Every third question is asked in other wordings, every fifth behind long contexts: the first half
of the 60 is about symbols the target was not told of, the second words trained ones in a new way.
"""

LENGTHS = 512, 2048
"""Tokens of the contexts."""

ROW = 512
"""Tokens of a row of training: `features.ROW`, which needs PyTorch."""

ANSWER, LONG_ANSWER = 96, 32
"""Tokens of an answer at most, and of one in a long context."""

TAPS = 2, 4, 5, 8, 9
"""What the heads of this target read, and what MTP heads could: its last state, normed or not."""

TEMPLATES = {
    "ChatML": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
        "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    ),
    "Alpaca": (
        "{{ bos_token }}{% for message in messages %}### {{ message['role'] | capitalize }}:\n"
        "{{ message['content'] }}\n\n{% endfor %}### Assistant:\n"
    ),
}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are an expert in Python. Answer briefly and to the point, in plain text, no examples.",
)

REGULAR, *OTHERS = perturbations(TEMPLATES, SYSTEM_PROMPTS)
WORDINGS = [wording.name for wording in OTHERS]


def context(length: int) -> str:
    """Names the condition of contexts of some length."""
    return f"{length} tokens"


@dataclass(frozen=True)
class Text:
    """A prompt and the target's greedy answer, L + 1 tokens in all.

    Attributes:
        tokens: All of them.
        prompt: How many are the prompt's.
        room: How many the answer might have had.
        head: Tokens before the user's first words.
        states: What the target had at `TAPS` for all tokens but the last, `[L, len(TAPS), H]`.
    """

    tokens: list[int]
    prompt: int
    room: int
    head: int
    states: mx.array

    def taps(self, drafter: ChainDrafter) -> mx.array:
        """Returns what a drafter reads of the states, `[L, A, H]`."""
        return self.states[:, mx.array([TAPS.index(tap) for tap in drafter.taps])]


@dataclass(frozen=True)
class Condition:
    """One way of asking.

    Attributes:
        name: Its name.
        prompts: Makes the prompts, each with the number of tokens before the user's first words.
        room: Tokens of an answer, at most.
    """

    name: str
    prompts: Callable[[], Iterator[tuple[list[int], int]]]
    room: int


def conditions(tokenizer: TokenizerWrapper, drafter: ChainDrafter) -> Iterator[Condition]:
    """Yields every way of asking; the drafter only speeds up the answers of long dialogues."""
    questions = read_questions(QUESTIONS)

    def worded(wording: Wording, asked: Sequence[Question]) -> Iterator[tuple[list[int], int]]:
        for question in asked:
            yield wording.encode(tokenizer, [question.turns[0]]), wording.head(tokenizer)

    yield Condition(HELD_OUT, partial(worded, REGULAR, questions), ANSWER)
    for other in OTHERS:
        prompts = partial(worded, other, questions[::EVERY_PERTURBED])
        yield Condition(other.name, prompts, ANSWER)

    asked = questions[::EVERY_LONG]
    settings = Settings(max_tokens=LONG_ANSWER)
    contexts = Contexts(
        drafter.model, tokenizer, {"": drafter}, asked, REGULAR, settings, window=max(LENGTHS)
    )

    def long(length: int) -> Iterator[tuple[list[int], int]]:
        for number in range(len(asked)):
            yield contexts.prompt(number, length), REGULAR.head(tokenizer)

    for length in LENGTHS:
        yield Condition(context(length), partial(long, length), LONG_ANSWER)


def answer(target: Target, prompt: list[int], head: int, room: int, stop: Container[int]) -> Text:
    """Has the target answer greedily, one token a step."""
    cache = target.make_cache()
    logits, taps = target(mx.array(prompt), cache)
    tokens, states = list(prompt), [taps]
    while True:
        mx.eval(logits, taps)
        tokens.append(int(mx.argmax(logits[-1]).item()))
        if tokens[-1] in stop or len(tokens) == len(prompt) + room:
            return Text(tokens, len(prompt), room, head, mx.concatenate(states))
        logits, taps = target(mx.array(tokens[-1:]), cache)
        states.append(taps)


def save(texts: Sequence[Text], path: Path) -> None:
    """Writes the texts of one condition; the file appears when it is whole."""
    arrays = {}
    for number, text in enumerate(texts):
        arrays[f"{number}.tokens"] = mx.array(text.tokens, dtype=mx.int32)
        arrays[f"{number}.about"] = mx.array([text.prompt, text.room, text.head])
        arrays[f"{number}.states"] = text.states
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.safetensors")
    mx.save_safetensors(str(partial), arrays)
    partial.rename(path)


def load(path: Path) -> list[Text]:
    """Reads the texts of one condition; the states only when they are used."""
    arrays = mx.load(str(path))
    return [
        Text(
            arrays[f"{number}.tokens"].tolist(),
            *arrays[f"{number}.about"].tolist(),
            arrays[f"{number}.states"],
        )
        for number in range(len(arrays) // 3)
    ]


def record(folder: Path) -> None:
    """Records the texts of every condition that is not in the folder yet."""
    model, tokenizer, drafter = load_demo()
    target = Target(model, TAPS)
    stop = tokenizer.eos_token_ids
    for one in conditions(tokenizer, drafter):
        path = folder / f"{one.name}.safetensors"
        if path.exists():
            continue
        started = time.monotonic()
        said = [answer(target, prompt, head, one.room, stop) for prompt, head in one.prompts()]
        save(said, path)
        print(f"{one.name}: {time.monotonic() - started:.0f} s", flush=True)


def recorded(folder: Path) -> dict[str, list[Text]]:
    """Reads the texts of every condition."""
    names = [HELD_OUT, *WORDINGS, *map(context, LENGTHS)]
    return {name: load(folder / f"{name}.safetensors") for name in names}
