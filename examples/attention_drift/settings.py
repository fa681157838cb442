"""The two settings of the study: the embedded target, and a real one, each with its questions.

What a drafter is asked depends on what its target can be asked: the embedded one knows a part of
Python's documentation by heart, SmolLM2-135M-Instruct answers anything, in ChatML.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mlx_drift.demo import TARGET
from mlx_drift.measure.acceptance.context import ATTENTION, condition
from mlx_drift.measure.acceptance.perturb import perturbations
from mlx_drift.measure.acceptance.wording import Wording

RESULTS = Path(__file__).parent / "results"
QUESTIONS = Path(__file__).parents[1] / "train_demo_pair" / "heldout.jsonl"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
ALPACA = (
    "{{ bos_token }}{% for message in messages %}### {{ message['role'] | capitalize }}:\n"
    "{{ message['content'] }}\n\n{% endfor %}### Assistant:\n"
)
LLAMA_3 = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA = (
    "{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else "
    "'user' }}\n{{ message['content'] }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
)


SEEN = "full", "window + first token"
"""Of the four ways to see a long context, those that the paper compares drafters by."""


@dataclass(frozen=True)
class Setting:
    """One target, and how it and its drafters are asked.

    Attributes:
        name: What the report calls it.
        results: The folder of its figures.
        taps: What its drafters read.
        templates: Chat templates that are not its own.
        system_prompts: System prompts that its drafters were not trained with.
        every_perturbed: Every nth question is asked in other wordings,
        every_long: and every nth behind long contexts.
        lengths: Tokens of these.
        seen: What a drafter sees of them, of the paper's four ways.
        window: Tokens that a drafter with a window sees of them.
        row: Tokens of a row of training, about.
        answer: Tokens of an answer, at most,
        long_answer: and of one in a long context.
        target: Its folder; None where a command has to name it,
        questions: and the files of questions,
        limit: of each of which so many are asked.
    """

    name: str
    results: Path
    taps: tuple[int, ...]
    templates: Mapping[str, str]
    system_prompts: tuple[str, ...]
    every_perturbed: int
    every_long: int
    lengths: tuple[int, ...] = (512, 2048)
    seen: tuple[str, ...] = SEEN
    window: int = 256
    row: int = 512
    answer: int = 96
    long_answer: int = 32
    target: Path | None = None
    questions: tuple[Path, ...] = field(default=())
    limit: int | None = None

    @cached_property
    def wordings(self) -> list[Wording]:
        """How questions are worded, as usual first."""
        return perturbations(self.templates, self.system_prompts)

    @property
    def others(self) -> list[str]:
        """The names of all wordings but the usual one."""
        return [wording.name for wording in self.wordings[1:]]

    @property
    def long(self) -> dict[str, tuple[int, str]]:
        """The long contexts by name: tokens, and what a drafter sees of them."""
        return {condition(n, seen): (n, seen) for n in self.lengths for seen in self.seen}


EMBEDDED = Setting(
    name="the embedded target",
    results=RESULTS,
    # What the heads read, and what MTP heads could: the target's last state, normed or not.
    taps=(2, 4, 5, 8, 9),
    templates={"ChatML": CHATML, "Alpaca": ALPACA},
    system_prompts=(
        "You are a helpful assistant.",
        "You are an expert in Python. Answer briefly and to the point, in plain text, no examples.",
    ),
    # The first half of the 60 questions is about symbols the target was not told of, the second
    # words trained ones in a new way.
    every_perturbed=3,
    every_long=5,
    target=TARGET,
    questions=(QUESTIONS,),
)

SMOLLM2 = Setting(
    name="SmolLM2-135M-Instruct",
    results=RESULTS / "smollm2",
    taps=(2, 15, 27),
    templates={"Llama-3": LLAMA_3, "Alpaca": ALPACA, "Gemma": GEMMA},
    system_prompts=(
        "You are a helpful assistant.",
        "You are an expert in your field. Answer briefly and to the point, without examples.",
        "Du bist ein höflicher Assistent. Answer in English.",
    ),
    every_perturbed=5,
    every_long=10,
    lengths=(512, 1024, 2048, 4096),
    seen=ATTENTION,
)
