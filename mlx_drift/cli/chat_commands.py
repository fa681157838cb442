"""What can be typed in a chat beside messages: `/help` and others."""

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mlx_drift.cli.conversation import Conversation, Speaker
from mlx_drift.cli.report import table
from mlx_drift.cli.show import as_is
from mlx_drift.errors import DriftError, brief

PREFIX = "/"
LEAVE = "quit"


class Commands:
    """Runs commands: each is the method of its name, and says of itself what its docstring does.

    Args:
        conversation: What they are about.
        load: Loads a model and its drafter by their names.
        console: What they show.
    """

    def __init__(
        self,
        conversation: Conversation,
        load: Callable[[str, str | None], Speaker],
        console: Console,
    ):
        self.conversation = conversation
        self.console = console
        self._load = load

    def run(self, line: str) -> bool:
        """Runs a line; returns whether the chat goes on.

        Raises:
            DriftError: If there is no such command, or it cannot be done.
        """
        name, _, argument = line.removeprefix(PREFIX).strip().partition(" ")
        if name == LEAVE:
            return False
        command = getattr(self, f"do_{name}", None) if name.isidentifier() else None
        if command is None:
            raise DriftError(
                f"there is no command {PREFIX}{name}; {PREFIX}help lists those there are "
                f"({2 * PREFIX} begins a message with a {PREFIX})"
            )
        command(argument.strip())
        return True

    def do_help(self, argument: str) -> None:
        """List the commands."""
        rows = Table(show_header=False, box=None, pad_edge=False)
        for name, command in inspect.getmembers(self, inspect.ismethod):
            if name.startswith("do_"):
                takes, _, what = (command.__doc__ or "").rpartition(": ")
                rows.add_row(f"{PREFIX}{name[3:]} {takes}", what)
        rows.add_row(f"{PREFIX}{LEAVE}", "Leave; so does Ctrl-D.")
        self.console.print(rows, highlight=False, markup=False)

    def do_system(self, argument: str) -> None:
        """[TEXT]: Change the system prompt, or show it."""
        if argument:
            self.conversation.system_prompt = argument
        said = self.conversation.system_prompt
        self._say("there is no system prompt" if said is None else f"system prompt: {said}")

    def do_reset(self, argument: str) -> None:
        """Forget the messages; the system prompt stays."""
        self.conversation.reset()
        self._say("the conversation begins anew")

    def do_undo(self, argument: str) -> None:
        """Take back the last message and its answer."""
        said = self.conversation.undo()
        if said is None:
            raise DriftError("there is nothing to take back")
        self._say(f"taken back: {brief(said)}")

    def do_stats(self, argument: str) -> None:
        """Show what drafting came to, in the last answer and in all."""
        last, total = self.conversation.last, self.conversation.statistics
        if last is None:
            raise DriftError("there is no answer yet")
        self.console.print(table(last, interrupted=last.finish_reason is None))
        self._say(
            f"all answers: {total.rounds} rounds, {total.acceptance_length:.2f} drafts accepted a "
            f"round, {total.reused_tokens} of {total.prompt_tokens + total.reused_tokens} tokens "
            "of prompts were cached"
        )

    def do_save(self, argument: str) -> None:
        """FILE: Write the conversation as a line of JSON."""
        path = _path("save", argument)
        self.conversation.save(path)
        self._say(f"wrote {path}")

    def do_load(self, argument: str) -> None:
        """FILE: Go on with the conversation of a file, in place of this one."""
        path = _path("load", argument)
        self.conversation.load(path)
        self._say(f"{len(self.conversation.messages)} messages, from {path}")

    def do_model(self, argument: str) -> None:
        """[MODEL [DRAFTER]]: Go on with another model, or show this one."""
        try:
            names = shlex.split(argument)
        except ValueError as error:
            raise DriftError(f"{PREFIX}model: {error}") from None
        if len(names) > 2:
            raise DriftError(f"{PREFIX}model takes a model and a drafter, not {len(names)} names")
        if names:
            self.conversation.speak_with(self._load(names[0], (*names[1:], None)[0]))
        speaker = self.conversation.speaker
        self._say(f"model: {speaker.name}; drafts: {type(speaker.drafter).__name__}")

    def _say(self, line: str) -> None:
        self.console.print(as_is(line, style="dim"))


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise DriftError(f"{PREFIX}{command} needs a file: {PREFIX}{command} FILE")
    return Path(argument)
