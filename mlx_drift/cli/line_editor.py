"""What someone types in a chat: several lines, with a history. It is prompt_toolkit that reads."""

import os
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mlx_drift.loading import cache_home

PROMPT, GOES_ON = "> ", "… "


class LineEditor:
    """Reads messages.

    Enter sends; Alt-Enter, or a backslash at the end of the line, breaks it. What is pasted stays
    as it is.
    """

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation=GOES_ON,
            enable_history_search=False,
        )

    def read(self) -> str | None:
        """Returns what was typed; None at its end (Ctrl-D). Ctrl-C clears the line."""
        while True:
            try:
                return self._session.prompt(PROMPT)
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return keys


def _history() -> History:
    """Returns that of earlier chats, which only the user may read; none where it cannot be kept."""
    path: Path = cache_home() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
