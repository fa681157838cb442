"""Wordings: the ways in which one and the same conversation becomes tokens.

A target and its drafter were trained on conversations as one chat template lays them out, with one
beginning-of-text token (BoS) in front. How much worse a drafter gets when that changes is its
sensitivity to the template (arXiv 2605.09992, §5.2).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.errors import DriftError
from mlx_drift.files.text import check_text, read_text

MOST_BYTES = 1 << 20
"""Of a chat template's file."""


@dataclass(frozen=True)
class Wording:
    """How conversations become tokens; by default as `mlx-drift generate` has them.

    Attributes:
        name: What reports call it.
        chat_template: A template in place of the tokenizer's own, as Jinja text.
        ignore_chat_template: Lay nothing around: the texts of all messages, a blank line between
            them. So it is, too, with a tokenizer that has no template.
        bos: True for exactly one BoS in front, False for none, whatever the template or tokenizer
            put there. None leaves what they did: a template its own, and without one what the
            tokenizer adds by itself. Of no effect where the tokenizer has no BoS.
        system_prompt: In place of what the question says as the system, if anything.
        keywords: Of the template.
    """

    name: str = "regular"
    chat_template: str | None = None
    ignore_chat_template: bool = False
    bos: bool | None = None
    system_prompt: str | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def encode(
        self, tokenizer: TokenizerWrapper, texts: Sequence[str], system_prompt: str | None = None
    ) -> list[int]:
        """Turns a conversation into the tokens of a prompt for what the assistant says next.

        Args:
            tokenizer: The target's.
            texts: What the user and the assistant said in turn, the user first and last.
            system_prompt: What the question says as the system, if anything.

        Raises:
            DriftError: If the template refuses, or no text is left.
        """
        system = self.system_prompt or system_prompt
        messages = [{"role": "system", "content": system}] if system else []
        for role, text in zip(itertools.cycle(("user", "assistant")), texts, strict=False):
            messages.append({"role": role, "content": text})
        raw = self.ignore_chat_template or not (tokenizer.has_chat_template or self.chat_template)
        if raw:
            laid_out = "\n\n".join(message["content"] for message in messages)
        else:
            laid_out = self.lay_out(tokenizer, messages)
        check_text(laid_out, f"{self.name}: a prompt, as it is laid out,")
        tokens: list[int] = tokenizer.encode(laid_out, add_special_tokens=raw)
        bos = tokenizer.bos_token_id
        if self.bos is not None and bos is not None:
            while tokens and tokens[0] == bos:
                tokens = tokens[1:]
            tokens = [bos, *tokens] if self.bos else tokens
        if not tokens:
            raise DriftError(f"{self.name}: nothing is left of a prompt")
        return tokens

    def head(self, tokenizer: TokenizerWrapper, system_prompt: str | None = None) -> int:
        """Counts the tokens before the user's first words: BoS, template, system prompt."""
        pair = (self.encode(tokenizer, [text], system_prompt) for text in ("Why?", "7"))
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False))
        return sum(1 for _ in same)

    def lay_out(
        self, tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]], **more: Any
    ) -> str:
        """Lays the chat template around messages; `more` are keywords of its own.

        Raises:
            DriftError: If the template refuses.
        """
        keywords = {"add_generation_prompt": True, **self.keywords, **more, "tokenize": False}
        if self.chat_template is not None:
            keywords["chat_template"] = self.chat_template
        try:
            return tokenizer.apply_chat_template(messages, **keywords)
        except Exception as error:  # a template is a program and raises what it likes
            raise DriftError(f"{self.name}: the chat template refuses ({error})") from error


def read_chat_template(path: Path) -> str:
    """Reads a chat template, Jinja text.

    Raises:
        DriftError: If there is no such file, or it is no text of reasonable size.
    """
    return read_text(path, MOST_BYTES)
