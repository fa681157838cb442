"""`mlx-drift chat`: a conversation in a terminal, or line by line through a pipe."""

import io
import json
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from mlx_drift.cli import options
from mlx_drift.cli.chat_commands import PREFIX, Commands
from mlx_drift.cli.conversation import REASONING, TEXT, Conversation, Settings, Speaker
from mlx_drift.cli.drafts import DraftsShown, Said
from mlx_drift.cli.generate import INTERRUPTED
from mlx_drift.cli.load import copying, load_pair, usual_drafter
from mlx_drift.cli.prompts import parse_object
from mlx_drift.cli.report import report
from mlx_drift.cli.show import prompt_bar
from mlx_drift.demo import NAME
from mlx_drift.errors import DriftError
from mlx_drift.files.text import decode

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def chat(
    model: options.Model = None,
    drafter: Annotated[
        str | None,
        typer.Option(
            help="As of `generate`. Default: a known one of the model's, else prompt-lookup."
        ),
    ] = None,
    draft_model: options.DraftModel = None,
    lookup: options.Lookup = None,
    adapter_path: options.AdapterPath = None,
    drafter_bits: options.DrafterBits = None,
    trust_remote_code: options.TrustRemoteCode = False,
    system_prompt: options.SystemPrompt = None,
    max_tokens: options.MaxTokens = 2048,
    num_draft_tokens: options.NumDraftTokens = None,
    tree: options.Tree = None,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    top_k: options.TopK = 0,
    xtc_probability: options.XtcProbability = 0.0,
    xtc_threshold: options.XtcThreshold = 0.1,
    seed: options.Seed = None,
    max_kv_size: options.MaxKvSize = None,
    kv_bits: options.KvBits = None,
    kv_group_size: options.KvGroupSize = 64,
    quantized_kv_start: options.QuantizedKvStart = 5000,
    prefill_step_size: options.PrefillStepSize = 2048,
    chat_template_config: options.ChatTemplateConfig = None,
    show_drafts: options.ShowDrafts = False,
    hide_reasoning: Annotated[
        bool, typer.Option("--hide-reasoning", help="Show answers alone; else it is dimmed.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a turn on stdout.")
    ] = False,
) -> None:
    """Chat with a model: the conversation stays in the caches from turn to turn.

    /help lists what else can be typed. Without a terminal every line of stdin is a message, and
    answers alone go to stdout.
    """
    console = Console(stderr=True)
    rows = options.read_tree(tree, num_draft_tokens=num_draft_tokens)
    chosen = num_draft_tokens or ("3" if model is None else "auto")
    k = options.read_draft_tokens(chosen)

    def load(name: str | None, head: str | None, small: str | None = None) -> Speaker:
        if name is not None and head is None and small is None:
            head = usual_drafter(name)
        adapter = adapter_path if name == model else None
        target, tokenizer, drafter = load_pair(
            name, head, adapter, console, drafter_bits, small, trust_remote_code
        )
        drafter = copying(drafter, lookup, (rows or k) == "auto")
        return Speaker(name or NAME, target, tokenizer, drafter)

    settings = Settings(
        max_tokens,
        k,
        seed,
        {
            "temp": temp,
            "top_p": top_p,
            "min_p": min_p,
            "top_k": top_k,
            "xtc_probability": xtc_probability,
            "xtc_threshold": xtc_threshold,
            "prefill_step_size": prefill_step_size,
        },
        {
            "max_kv_size": max_kv_size,
            "kv_bits": kv_bits,
            "kv_group_size": kv_group_size,
            "quantized_kv_start": quantized_kv_start,
        },
        parse_object(chat_template_config, "--chat-template-config"),
        rows,
    )
    # Nothing here keeps who speaks, so that /model makes room.
    conversation = Conversation(load(model, drafter, draft_model), settings, system_prompt)
    is_terminal = _is_terminal() and not as_json
    commands = Commands(conversation, load, console)
    view = View(console, is_terminal, show_drafts, hide_reasoning, as_json)
    failed = False
    texts = _typed(console, conversation) if is_terminal else _lines()
    for text in texts:
        try:
            if text.startswith(PREFIX) and not text.startswith(2 * PREFIX):
                if not commands.run(text):
                    break
                continue
            with redirect_stdout(sys.stderr):  # mlx-lm prints its warnings to stdout
                view.answer(conversation, text.removeprefix(PREFIX))
        except KeyboardInterrupt:
            if not is_terminal:
                raise typer.Exit(INTERRUPTED) from None
        except DriftError as error:
            failed = True
            typer.echo(f"error: {error}", err=True)
            if as_json:
                print(json.dumps({"error": str(error)}), flush=True)
    if failed and not is_terminal:
        raise typer.Exit(1)


class View:
    """Shows answers.

    Args:
        console: For what is not the answer.
        is_terminal: Whether someone watches.
        show_drafts: Mark drafted tokens.
        hide_reasoning: Leave out reasoning, which is dimmed on a terminal and left out elsewhere.
        as_json: One object a turn, when it is whole.
    """

    def __init__(
        self,
        console: Console,
        is_terminal: bool,
        show_drafts: bool,
        hide_reasoning: bool,
        as_json: bool,
    ):
        self.console = console
        self.stdout = sys.stdout
        self.is_terminal = is_terminal
        self.show_drafts = show_drafts
        self.shows_reasoning = is_terminal and not hide_reasoning
        self.as_json = as_json
        self._marks = DraftsShown(self.stdout)
        self._dim, self._plain = (DIM, PLAIN) if self._marks.colours else ("", "")

    def answer(self, conversation: Conversation, text: str) -> None:
        """Has a message answered."""
        texts = {TEXT: "", REASONING: ""}
        kind_before: str | None = None
        try:
            with (
                interruptions(self.is_terminal) as interrupted,
                prompt_bar(self.console) as progress,
            ):
                for kind, said in conversation.ask(text, interrupted, progress):
                    texts[kind] += said.text
                    if self.as_json or (kind == REASONING and not self.shows_reasoning):
                        continue
                    if kind != kind_before and REASONING in (kind, kind_before):
                        self._turn_to(kind)
                    kind_before = kind
                    self._write(kind, said)
        finally:
            if kind_before == REASONING:
                self.stdout.write(self._plain)
        if self.as_json:
            self._report(conversation, texts, interrupted())
            return
        print(file=self.stdout, flush=True)
        self._remark(conversation, interrupted())

    def _turn_to(self, kind: str) -> None:
        """Begins reasoning, or the answer behind it."""
        to_answer = f"{self._plain}\n[answer] "
        self.stdout.write(f"{self._dim}[reasoning] " if kind == REASONING else to_answer)

    def _write(self, kind: str, said: Said) -> None:
        if self.show_drafts and kind != REASONING:
            self._marks.write(said)
        else:
            print(said.text, end="", flush=True, file=self.stdout)

    def _report(self, conversation: Conversation, texts: dict[str, str], stopped: bool) -> None:
        told = report(texts[TEXT], conversation.last, stopped)
        if texts[REASONING]:
            told["reasoning"] = texts[REASONING]
        if self.show_drafts:
            told["tokens"] = [one.to_dict() for one in conversation.said]
        print(json.dumps(told), flush=True, file=self.stdout)

    def _remark(self, conversation: Conversation, stopped: bool) -> None:
        """Says what came of the answer."""
        if conversation.is_full:
            typer.echo(
                "the context is full: /undo takes back this turn, /reset begins anew, /save FILE "
                "keeps it",
                err=True,
            )
        if not self.is_terminal:
            return
        last = conversation.last
        if last is None:
            self.console.print("stopped before it began", style="dim")
            return
        parts = [f"{last.generation_tokens} tokens, {last.generation_tps:.0f} tokens/s"]
        if last.statistics.rounds:
            parts.append(f"{last.statistics.acceptance_length:.2f} drafts accepted a round")
        if last.statistics.reused_tokens:
            parts.append(f"{last.statistics.reused_tokens} of {last.prompt_tokens} tokens cached")
        if stopped:
            parts.append("stopped")
        elif last.finish_reason == "length" and not conversation.is_full:
            parts.append("cut off at --max-tokens")
        self.console.print("; ".join(parts), style="dim", highlight=False)
        if self.show_drafts:
            self.console.print(self._marks.legend(conversation.said))


@contextmanager
def interruptions(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Yields what tells whether Ctrl-C was pressed; a second one raises as always.

    So the answer ends between two tokens, where the caches are whole. If that is not wanted, the
    first one raises.
    """
    pressed = False
    if not wanted:
        yield lambda: False
        return

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before: Any = signal.signal(signal.SIGINT, press)
    try:
        with _deaf():
            yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _deaf() -> Iterator[None]:
    """Drops what is typed meanwhile: pasted lines would each be a message of their own."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, ValueError, io.UnsupportedOperation):  # it is no terminal
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)


def _typed(console: Console, conversation: Conversation) -> Iterator[str]:
    """Yields what someone types."""
    try:
        from mlx_drift.cli.line_editor import LineEditor
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prompt_toolkit":
            raise
        raise DriftError(
            "chat in a terminal needs prompt_toolkit, which is not installed: "
            "pip install 'mlx-drift[chat]'"
        ) from None
    console.print(
        f"{conversation.speaker.name}. Enter sends, Alt-Enter or \\ at the end of a line breaks "
        "it, Ctrl-C stops an answer, Ctrl-D leaves; /help",
        style="dim",
        highlight=False,
        markup=False,
    )
    editor = LineEditor()
    while (text := editor.read()) is not None:
        if text.strip():
            yield text


def _lines() -> Iterator[str]:
    """Yields the lines of stdin, as they come."""
    if sys.stdin is None:
        raise DriftError("stdin is closed; give messages there, a line each")
    for number, line in enumerate(sys.stdin.buffer, 1):
        text = decode(line, f"stdin, line {number}").rstrip("\r\n")
        if text.strip():
            yield text


def _is_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
