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
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_drift
from attention_drift.settings import Setting
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.measure.acceptance.asking import Settings
from mlx_drift.measure.acceptance.context import Contexts
from mlx_drift.measure.acceptance.questions import Question, read_questions
from mlx_drift.measure.acceptance.wording import Wording
from mlx_drift.target.model import Target

HELD_OUT = "held out"


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
        tapped: Which taps `states` are of.
        states: What the target had at them for all tokens but the last, `[L, len(tapped), H]`.
    """

    tokens: list[int]
    prompt: int
    room: int
    head: int
    tapped: tuple[int, ...]
    states: mx.array

    def taps(self, drafter: ChainDrafter) -> mx.array:
        """Returns what a drafter reads of the states, `[L, A, H]`."""
        return self.states[:, mx.array([self.tapped.index(tap) for tap in drafter.taps])]


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


def conditions(
    model: nn.Module, tokenizer: TokenizerWrapper, setting: Setting
) -> Iterator[Condition]:
    """Yields every way of asking."""
    files = [read_questions(file)[: setting.limit] for file in setting.questions]
    questions = [question for file in files for question in file]
    regular, *others = setting.wordings

    def worded(wording: Wording, asked: Sequence[Question]) -> Iterator[tuple[list[int], int]]:
        for question in asked:
            yield wording.encode(tokenizer, [question.turns[0]]), wording.head(tokenizer)

    yield Condition(HELD_OUT, partial(worded, regular, questions), setting.answer)
    for other in others:
        prompts = partial(worded, other, questions[:: setting.every_perturbed])
        yield Condition(other.name, prompts, setting.answer)

    asked = questions[:: setting.every_long]
    drafter = PromptLookupDrafter(model)  # it only speeds up the answers of long dialogues
    settings = Settings(max_tokens=setting.long_answer)
    contexts = Contexts(
        model, tokenizer, {"": drafter}, asked, regular, settings, window=max(setting.lengths)
    )

    def long(length: int) -> Iterator[tuple[list[int], int]]:
        for number in range(len(asked)):
            yield contexts.prompt(number, length), regular.head(tokenizer)

    for length in setting.lengths:
        yield Condition(context(length), partial(long, length), setting.long_answer)


def answer(target: Target, prompt: list[int], head: int, room: int, stop: Container[int]) -> Text:
    """Has the target answer greedily, one token a step."""
    cache = target.make_cache()
    logits, taps = target(mx.array(prompt), cache)
    tokens, states = list(prompt), [taps]
    while True:
        mx.eval(logits, taps)
        tokens.append(int(mx.argmax(logits[-1]).item()))
        if tokens[-1] in stop or len(tokens) == len(prompt) + room:
            return Text(tokens, len(prompt), room, head, target.taps, mx.concatenate(states))
        logits, taps = target(mx.array(tokens[-1:]), cache)
        states.append(taps)


def save(texts: Sequence[Text], path: Path) -> None:
    """Writes the texts of one condition; the file appears when it is whole."""
    arrays = {"tapped": mx.array(texts[0].tapped)}
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
    tapped = tuple(arrays.pop("tapped").tolist())
    return [
        Text(
            arrays[f"{number}.tokens"].tolist(),
            *arrays[f"{number}.about"].tolist(),
            tapped,
            arrays[f"{number}.states"],
        )
        for number in range(len(arrays) // 3)
    ]


def record(folder: Path, setting: Setting) -> None:
    """Records the texts of every condition that is not in the folder yet."""
    model, tokenizer = mlx_drift.load(str(setting.target))
    target = Target(model, setting.taps)
    stop = tokenizer.eos_token_ids
    for one in conditions(model, tokenizer, setting):
        path = folder / f"{one.name}.safetensors"
        if path.exists():
            continue
        started = time.monotonic()
        said = [answer(target, prompt, head, one.room, stop) for prompt, head in one.prompts()]
        save(said, path)
        print(f"{one.name}: {time.monotonic() - started:.0f} s", flush=True)


def recorded(folder: Path, setting: Setting) -> dict[str, list[Text]]:
    """Reads the texts of every condition."""
    names = [HELD_OUT, *setting.others, *map(context, setting.lengths)]
    return {name: load(folder / f"{name}.safetensors") for name in names}
