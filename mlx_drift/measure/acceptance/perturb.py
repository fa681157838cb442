"""Perturbed prompts: how much of a drafter's acceptance hangs on the template it was trained with.

The four conditions of arXiv 2605.09992, §5.2, and whatever else is to be tried. A condition changes
the prompt of target and drafter alike, so the target's text changes too; what is compared is how
well its drafters follow it. What each condition does to the tokens:

- template, BoS: the chat template, and exactly one BoS in front, whether the template writes one,
  none or two
- template, no BoS: the same without it
- no template, BoS: the texts of all messages, the target's own answers among them, a blank line
  between them; exactly one BoS in front, also where the tokenizer adds none by itself
- no template, no BoS: the same without it
- another chat template, another system prompt: as the first, but for that

A tokenizer without a BoS makes conditions the same that only differ in it, and one without a
template those that only differ in that. They are asked once, and the report says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.drafters.protocol import Drafter
from mlx_drift.measure.acceptance.answers import Task
from mlx_drift.measure.acceptance.asking import Answers, Settings, ask
from mlx_drift.measure.acceptance.questions import Question
from mlx_drift.measure.acceptance.wording import Wording

PLACEHOLDER = "An answer."
"""In place of the target's answers, where only wordings are compared."""


def perturbations(
    chat_templates: Mapping[str, str] | None = None,
    system_prompts: Sequence[str] = (),
    keywords: Mapping[str, Any] | None = None,
) -> list[Wording]:
    """Returns the wordings to compare, the one the drafter knows first.

    Args:
        chat_templates: Other chat templates by name, Jinja text.
        system_prompts: System prompts to try.
        keywords: Of the chat templates.
    """
    with_template: dict[str, Any] = {"bos": True, "keywords": keywords or {}}
    wordings = [
        Wording("template, BoS", **with_template),
        Wording("template, no BoS", **with_template | {"bos": False}),
        Wording("no template, BoS", ignore_chat_template=True, bos=True),
        Wording("no template, no BoS", ignore_chat_template=True, bos=False),
    ]
    for name, template in (chat_templates or {}).items():
        wordings.append(Wording(f"template {name}", chat_template=template, **with_template))
    for number, prompt in enumerate(system_prompts, 1):
        wordings.append(Wording(f"system prompt {number}", system_prompt=prompt, **with_template))
    return wordings


def same_prompts(
    tokenizer: TokenizerWrapper, wordings: Sequence[Wording], questions: Sequence[Question]
) -> dict[str, str]:
    """Finds wordings that make the same tokens of every question as an earlier one.

    All turns are looked at, with `PLACEHOLDER` for what the target answers between them.

    Returns:
        The names of those wordings, each with the earlier one's.
    """
    seen: dict[tuple[tuple[int, ...], ...], str] = {}
    same = {}
    for wording in wordings:
        prompts = tuple(
            tuple(wording.encode(tokenizer, texts, question.system_prompt))
            for question in questions
            for texts in _conversations(question)
        )
        if (earlier := seen.setdefault(prompts, wording.name)) != wording.name:
            same[wording.name] = earlier
    return same


def ask_all(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    drafters: Mapping[str, Drafter],
    questions: Sequence[Question],
    wordings: Sequence[Wording],
    settings: Settings,
) -> list[Task]:
    """Returns the tasks of asking questions in one wording or several, question by question.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        drafters: Drafters loaded for it, by name.
        questions: The questions.
        wordings: How they are laid out: the conditions.
        settings: How answers are generated.
    """

    def in_one(question: Question, wording: Wording) -> Answers:
        return {wording.name: ask(model, tokenizer, drafters, question, wording, settings)}

    return [
        Task(
            question,
            wording.name,
            {wording.name: list(drafters)},
            partial(in_one, question, wording),
        )
        for question in questions
        for wording in wordings
    ]


def _conversations(question: Question) -> Iterator[list[str]]:
    """Yields the conversation up to each turn, a placeholder for every answer."""
    texts: list[str] = []
    for turn in question.turns:
        texts.append(turn)
        yield list(texts)
        texts.append(PLACEHOLDER)
