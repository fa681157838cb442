"""The `mlx-drift` command: each command a thin shell over a public function.

A command's module is imported when the command is called: `mlx-drift --help` needs none of them.
"""

import logging
import os
import re
import sys
import warnings
from contextlib import nullcontext
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from huggingface_hub.utils import logging as hub_log
from typer.core import TyperCommand, TyperGroup

from mlx_drift.cli.streams import discard_stdout, set_up_streams
from mlx_drift.errors import DriftError, DriftWarning, printable

COMMANDS = {
    "generate": "Generate text through a drafter, losing nothing by it.",
    "chat": "Chat with a model: the conversation stays in the caches from turn to turn.",
    "demo": "Ask a small real model, SmolLM2-135M-Instruct, through the head that comes with it.",
    "serve": "Serve OpenAI's and Anthropic's APIs: conversations take turns, caches are kept.",
    "cache-prompt": "Process how prompts begin, once: generate --prompt-cache-file goes on from "
    "there.",
    "convert": "Convert a PyTorch drafter checkpoint, or a model's MTP head, to MLX.",
    "adapt": "Train a head for your own target, on this machine, on what the target itself says.",
    "export": "Give a converted drafter back to PyTorch: vLLM, SGLang, SpecForge, speculators.",
    "inspect": "Tell what a drafter checkpoint is, without downloading its weights.",
    "doctor": "Tell caches, taps, memory and what is refused, before any weights are loaded.",
    "pairs": "List known pairs of target and drafter, from which `generate --drafter auto` picks.",
    "bench": "Measure plain decoding and ways of drafting, in turns, in one run.",
    "tune": "Measure what rounds cost on this machine, for `--num-draft-tokens auto` to start "
    "from.",
    "drift": "Measure attention drift: what drafters recycle and look at from step to step.",
    "measure": "Measure how many drafts are accepted over question sets, with intervals.",
}
"""The commands, and what each says of itself. Each is the function of its name in the module of its
name, with `_command` behind it where something else has that name."""

KEYWORD = re.compile(r"^\w+(?= (?:is|=) )|(?<= and )\w+(?= )|\b[a-z]+(?:_[a-z]+)+\b")
"""What may be a keyword in a message that begins with one."""

SETTINGS = {"help_option_names": ["-h", "--help"]}


class Command(TyperCommand):
    """Names flags, where what it calls names its own keywords."""

    def invoke(self, ctx: Any) -> Any:
        """Runs it."""
        try:
            return super().invoke(ctx)
        except DriftError as error:
            raise DriftError(self._in_flags(str(error), ctx)) from error

    def _in_flags(self, message: str, ctx: Any) -> str:
        """Turns `max_tokens is 0; …` into `--max-tokens is 0; …`, if that was given.

        What was not given stands in some file: `num_layers is 0` of a config is no flag's.
        """
        flags = {one.name: one.opts[0] for one in self.params if one.opts[0].startswith("--")}
        if message.partition(" ")[0] not in flags or not any(
            ctx.get_parameter_source(name).name == "COMMANDLINE" and _tells(message, name, value)
            for name, value in ctx.params.items()
        ):
            return message
        return KEYWORD.sub(lambda name: flags.get(name[0], name[0]), message)


def _tells(message: str, name: str, value: Any) -> bool:
    """Says whether a message tells a keyword's value, or one of several."""
    values = value if isinstance(value, list) else str(value).split(",")
    return any(
        re.search(rf"\b{name} (?:(?:is|=) )?{re.escape(str(one))}(?![\w.])", message)
        for one in values
    )


class Commands(TyperGroup):
    """Lists commands by what they say of themselves, and imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Returns the name of the command that is called, itself, and its arguments."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed and _imported(str(name)), rest


app = typer.Typer(
    name="mlx-drift",
    cls=Commands,
    help="Lossless speculative decoding on MLX: EAGLE-3, EAGLE-3.1, DFlash and MTP heads.",
    no_args_is_help=True,
    add_completion=False,
    context_settings=SETTINGS,
)


def _tell_version(asked: bool) -> None:
    if asked:
        python = ".".join(map(str, sys.version_info[:3]))
        own, mlx, mlx_lm = (version(name) for name in ("mlx-drift", "mlx", "mlx-lm"))
        typer.echo(f"mlx-drift {own} (mlx {mlx}, mlx-lm {mlx_lm}, Python {python})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_tell_version,
            is_eager=True,
            help="Tell the versions of mlx-drift and of what it stands on, and exit.",
        ),
    ] = False,
) -> None:
    pass


for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def _imported(name: str) -> Any:
    """Imports a command and builds what parses its arguments."""
    module = name.replace("-", "_")
    members = vars(import_module(f"mlx_drift.cli.{module}"))
    alone = typer.Typer(add_completion=False, context_settings=SETTINGS)
    alone.command(name, cls=Command)(members.get(f"{module}_command") or members[module])
    return typer.main.get_command(alone)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line: exit code 0 done, 1 a clear one-line error, 2 usage."""
    set_up_streams()
    around: Any = nullcontext
    if "MLX_RANK" in os.environ:  # mlx.launch started it, with others
        around = import_module("mlx_drift.cli.ranked").among_ranks
    with_place = warnings.showwarning

    def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, DriftWarning):
            typer.echo(f"warning: {printable(str(message))}", err=True)
        else:
            with_place(message, category, *args, **kwargs)

    if hub_log.get_verbosity() == logging.WARNING:  # unless HF_HUB_VERBOSITY says otherwise
        hub_log.set_verbosity_error()  # its retries: what they come to is told in one line
    # It does not know families that mlx-lm alone has, and need not: networks are mlx-lm's.
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), around(arguments):
            warnings.showwarning = show
            app(args=arguments)
    except DriftError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:  # stdout took no more: a full disk, say
        discard_stdout()
        what = f"{error.filename or 'cannot go on'}: {error.strerror or error}"
        typer.echo(f"error: {printable(what)}", err=True)
        sys.exit(1)
