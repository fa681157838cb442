"""A conversation on this machine: its messages, and what the caches hold of it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.cli.drafts import Said
from mlx_drift.cli.transcripts import EXPECTED, messages_of
from mlx_drift.decode.prompt_cache import PromptCache, make_prompt_cache
from mlx_drift.decode.responses import DriftResponse
from mlx_drift.decode.speculate import Progress
from mlx_drift.decode.statistics import Statistics
from mlx_drift.decode.trees import Rows, drafting
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.errors import DriftError
from mlx_drift.files.text import check_text, read_text
from mlx_drift.generate import stream_generate
from mlx_drift.serve.said import Reasoning, Speech, Text
from mlx_drift.serve.wording import Wording
from mlx_drift.target.context import longest_text

TEXT, REASONING = "text", "reasoning"


@dataclass(frozen=True)
class Speaker:
    """Who answers.

    Attributes:
        name: What it is called.
        model: The target.
        tokenizer: Its tokenizer.
        drafter: Its drafter.
    """

    name: str
    model: nn.Module
    tokenizer: TokenizerWrapper
    drafter: Drafter

    def __post_init__(self) -> None:
        """Checks that it was made for conversations.

        Raises:
            DriftError: If it was not.
        """
        if not self.tokenizer.has_chat_template:
            raise DriftError(
                f"{self.name} has no chat template: it was not made for conversations. Let it go "
                "on from a text: mlx-drift generate"
            )


@dataclass(frozen=True)
class Settings:
    """How answers are generated.

    Attributes:
        max_tokens: Tokens of an answer at most; −1 for no limit.
        num_draft_tokens: Drafts a round.
        seed: Of the first answer; each further one has the next.
        sampling: Keywords of `stream_generate`.
        caches: Keywords of `make_prompt_cache`.
        template: Keywords of the chat template.
        tree: Rows the target verifies a round, their drafts a tree; None for chains.
    """

    max_tokens: int
    num_draft_tokens: int | Literal["auto"]
    seed: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    caches: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    tree: Rows | None = None


class Conversation:
    """Messages so far, and how they go on.

    Args:
        speaker: Who answers.
        settings: How.
        system_prompt: The system's message, if there is one.

    Attributes:
        speaker: The same.
        messages: Of the user and the model, in turns.
        system_prompt: The same.
        said: The last answer's tokens.
        last: Its last response; None before the first, or if it was stopped before it began.
        statistics: Of all answers.
        is_full: The last answer ended because nothing more fits.
    """

    def __init__(self, speaker: Speaker, settings: Settings, system_prompt: str | None = None):
        self.settings = settings
        self.system_prompt = system_prompt
        self.messages: list[dict[str, str]] = []
        self.said: list[Said] = []
        self.last: DriftResponse | None = None
        self.statistics = Statistics()
        self.is_full = False
        self._answers = 0
        self.speak_with(speaker)

    def speak_with(self, speaker: Speaker) -> None:
        """Goes on with another model."""
        self.speaker = speaker
        self.statistics.plain_step_seconds = None
        cache = make_prompt_cache(speaker.model, speaker.drafter, **self.settings.caches)
        # A fork does not warn where a prompt leaves the conversation: here someone asked for it.
        self._cache: PromptCache = cache.fork()

    def ask(
        self,
        text: str,
        is_stopped: Callable[[], bool] = lambda: False,
        progress: Progress = lambda done, total: None,
    ) -> Iterator[tuple[str, Said]]:
        """Says something and yields what is answered, as it comes.

        Args:
            text: What the user says.
            is_stopped: Asked between tokens and chunks of the prompt; the answer so far stays.
            progress: Told how much of the prompt is read.

        Yields:
            `TEXT` or `REASONING`, and a token of it, or the part of one.

        Raises:
            DriftError: If the conversation has become too long, or the template refuses it. It is
                then as it was before.
        """
        messages = [*self.messages, {"role": "user", "content": check_text(text, "the message")}]
        rendered = self._lay_out(messages)
        tokenizer = self.speaker.tokenizer
        tokens = tokenizer.encode(rendered, add_special_tokens=False)
        room = self._room(len(tokens))
        most = self.settings.max_tokens
        seed = self.settings.seed
        self.said, self.last, self.is_full = [], None, False

        def told(done: int, total: int) -> None:
            progress(done, total)
            _stop_if(is_stopped())

        start = tokenizer.think_start  # some templates open reasoning themselves
        opens = start is not None and rendered.rstrip().endswith(start)
        wording = Wording(tokenizer, (), Speech(begins_in_reasoning=opens))
        written = {TEXT: "", REASONING: ""}
        responses: Any = stream_generate(
            self.speaker.model,
            tokenizer,
            tokens,
            most if room is None else room if most < 0 else min(most, room),
            drafter=self.speaker.drafter,
            **drafting(self.settings.num_draft_tokens, self.settings.tree),
            seed=None if seed is None else seed + self._answers,
            prompt_cache=self._cache,
            compare_plain=self.statistics.plain_step_seconds is None,
            prompt_progress_callback=told,
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
            **self.settings.sampling,
        )
        self._answers += 1
        try:
            for response in responses:
                self.last = response
                self.said.append(Said(response.text, response.token, response.origin))
                ended = response.finish_reason
                pieces = [] if ended == "stop" else wording.add(response.token)
                if ended is not None:
                    pieces += wording.end(is_cut=ended == "length")
                for piece in pieces or [Text("")]:
                    if isinstance(piece, Text | Reasoning):
                        kind = TEXT if isinstance(piece, Text) else REASONING
                        written[kind] += piece.text
                        yield kind, Said(piece.text, response.token, response.origin)
                _stop_if(is_stopped() and ended is None)
        except _Stopped:
            pass
        finally:
            responses.close()
            if self.last is not None:
                known = self.last.statistics.plain_step_seconds
                self.statistics.plain_step_seconds = known or self.statistics.plain_step_seconds
                self.last.statistics.plain_step_seconds = self.statistics.plain_step_seconds
                self.statistics.add(self.last.statistics)
                self.is_full = (
                    self.last.finish_reason == "length" and self.last.generation_tokens == room
                )
                answer = {"role": "assistant", "content": written[TEXT]}
                if written[REASONING]:
                    answer["reasoning_content"] = written[REASONING]
                self.messages = [*messages, answer]

    def reset(self) -> None:
        """Forgets all messages; the system's stays."""
        self.messages = []

    def undo(self) -> str | None:
        """Takes back the last turn; returns what the user said in it, None if there is none."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not turns:
            return None
        said = self.messages[turns[-1]]["content"]
        self.messages = self.messages[: turns[-1]]
        return said

    def save(self, path: Path) -> None:
        """Writes the messages as a line of JSON, which `mlx-drift bench --replay` reads too.

        Raises:
            DriftError: If the file cannot be written.
        """
        line = {"model": self.speaker.name, "messages": self._with_system(self.messages)}
        try:
            path.expanduser().write_text(json.dumps(line) + "\n", encoding="utf-8")
        except OSError as error:
            raise DriftError(f"{path}: cannot be written ({error.strerror})") from None

    def load(self, path: Path) -> None:
        """Takes the messages of a file in place of its own: those of its first line.

        Raises:
            DriftError: If there is no conversation in it.
        """
        line = next(iter(read_text(path.expanduser()).splitlines()), "")
        try:
            messages = messages_of(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DriftError(f"{path}, line 1: {error}; {EXPECTED}") from None
        for message in messages:
            check_text(message["content"], f"{path}: a message")
        system = [message for message in messages if message["role"] == "system"]
        others = messages[len(system) :]
        if messages[: len(system)] != system or len(system) > 1:
            raise DriftError(f"{path}: a system message stands elsewhere than at the beginning")
        if roles := {message["role"] for message in others} - {"user", "assistant"}:
            raise DriftError(f"{path}: the role {min(roles)!r} is neither user nor assistant")
        self.system_prompt = system[0]["content"] if system else None
        self.messages = others

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        if self.system_prompt is None:
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _lay_out(self, messages: list[dict[str, str]]) -> str:
        keywords = self.settings.template | {"tokenize": False, "add_generation_prompt": True}
        tokenizer = self.speaker.tokenizer
        try:
            return str(tokenizer.apply_chat_template(self._with_system(messages), **keywords))
        except Exception as error:  # a template is a program and raises what it likes
            raise DriftError(
                f"the chat template of {self.speaker.name} refuses the messages ({error})"
            ) from None

    def _room(self, tokens: int) -> int | None:
        """Returns how many tokens an answer may have; None for no limit.

        Raises:
            DriftError: If there is no room for any.
        """
        limit = longest_text(self.speaker.model, self.speaker.tokenizer)
        if limit is None:
            return None
        most, who = limit
        if tokens >= most:
            raise DriftError(
                f"the conversation has {tokens} tokens with this message, and {self.speaker.name} "
                f"takes {most} with at least one of an answer ({who}): /undo takes back a turn, "
                "/reset begins anew, /save FILE keeps it"
            )
        return most - tokens


class _Stopped(Exception):
    """The answer is to end here."""


def _stop_if(stopped: bool) -> None:
    if stopped:
        raise _Stopped
