"""`mlx-drift measure`: how many drafts are accepted; of whose questions, in what words, how far."""

import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from mlx_drift.cli import options
from mlx_drift.cli.acceptance_tables import comparison, figures, kept
from mlx_drift.cli.generate import INTERRUPTED
from mlx_drift.cli.load import load_drafters
from mlx_drift.cli.prompts import parse_object
from mlx_drift.cli.show import count_bar
from mlx_drift.convert.target import target_folder
from mlx_drift.demo import TARGET
from mlx_drift.errors import DriftError, DriftWarning
from mlx_drift.files.json_file import read_json
from mlx_drift.measure.acceptance.answers import AnswerFile, Task, collect, describe
from mlx_drift.measure.acceptance.asking import Answers, Settings
from mlx_drift.measure.acceptance.context import (
    WINDOW,
    Contexts,
    check_lengths,
    parse_lengths,
    read_document,
)
from mlx_drift.measure.acceptance.count import ELSEWHERE, Condition, conditions
from mlx_drift.measure.acceptance.perturb import ask_all, perturbations, same_prompts
from mlx_drift.measure.acceptance.plot import (
    check_plot,
    plot_conditions,
    plot_contexts,
    plot_positions,
)
from mlx_drift.measure.acceptance.questions import Question, read_question_files
from mlx_drift.measure.acceptance.wording import Wording, read_chat_template
from mlx_drift.ranks.world import world


def measure(
    questions: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="Questions, .jsonl, .json, .csv or .txt: a file, or a Hub data set's as "
            "owner/name:path; repeatable. FastChat, GSM8K, HumanEval, Alpaca, MATH-500, GPQA, "
            "LiveCodeBench and chat messages are known.",
        ),
    ],
    model: options.Model = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="A drafter, as for generate; repeatable: the first is the base."),
    ] = None,
    drafter_bits: options.DrafterBits = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    pipeline: options.Pipeline = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="The first N questions of each file.", min=1)
    ] = None,
    num_draft_tokens: Annotated[
        str | None, typer.Option(metavar="K", help="Drafts a round. Default: 4.")
    ] = None,
    tree: Annotated[
        str | None,
        typer.Option(metavar="ROWS", help="Trees of drafts: rows a round, the drafts + 1."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Tokens to generate a turn, at most.", min=2)
    ] = Settings.max_tokens,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    top_k: options.TopK = 0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = Settings.seed,
    system_prompt: Annotated[
        list[str] | None, typer.Option(help="System prompt; with --perturb repeatable.")
    ] = None,
    chat_template: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Jinja, in place of the tokenizer's chat template; with --perturb repeatable.",
        ),
    ] = None,
    chat_template_config: options.ChatTemplateConfig = None,
    ignore_chat_template: options.IgnoreChatTemplate = False,
    perturb: Annotated[
        bool,
        typer.Option(
            "--perturb",
            help="Compare wordings: with and without the chat template and BoS, and with each "
            "--chat-template and --system-prompt.",
        ),
    ] = False,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="N,N…",
            help="Compare lengths, 1k,2k say, prompt and answer together: each question at the "
            "end of a long conversation, the drafter seeing all of it or a window.",
        ),
    ] = None,
    window: Annotated[
        int, typer.Option(metavar="W", help="Of --context: the window, in tokens.", min=1)
    ] = WINDOW,
    document: Annotated[
        Path | None,
        typer.Option(help="Of --context: a text to ask the questions at the end of."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keeps the answers; a run that was cut short goes on from there."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="A picture (needs the plot extra).")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how many drafts are accepted over question sets, with intervals."""
    _check_together(
        perturb, context, document, system_prompt or (), chat_template or (), ignore_chat_template
    )
    given = options.read_tree(tree, num_draft_tokens=num_draft_tokens)
    rows = None if given is None else _fixed(given, "--tree")
    drafts = options.read_draft_tokens(num_draft_tokens or str(Settings.num_draft_tokens))
    k = _fixed(drafts, "--num-draft-tokens") if rows is None else rows - 1
    settings = Settings(k, max_tokens, temp, top_p, min_p, top_k, seed, tree=rows)
    keywords = parse_object(chat_template_config, "--chat-template-config")
    templates = _read_templates(chat_template or ())
    if save is not None and world().size > 1:
        raise DriftError("--save: each of several ranks would go on from a file of its own")
    if plot is not None:
        check_plot(plot)
    lengths = parse_lengths(context) if context is not None else []
    if lengths:
        config = read_json(target_folder(model or str(TARGET)) / "config.json")
        check_lengths(lengths, max_tokens, config)
    text = None if document is None else read_document(document)
    asked = read_question_files(questions, limit)

    console = Console(stderr=True)
    target, tokenizer, drafters = load_drafters(
        model, drafter or [], adapter_path, console, drafter_bits, trust_remote_code, pipeline
    )
    same: dict[str, str] = {}
    depends: dict[str, object] = {}
    if perturb:
        wordings = perturbations(templates, system_prompt or (), keywords)
        same = same_prompts(tokenizer, wordings, asked)
    else:
        wordings = [
            Wording(
                chat_template=next(iter(templates.values()), None),
                ignore_chat_template=ignore_chat_template,
                system_prompt=next(iter(system_prompt or ()), None),
                keywords=keywords,
            )
        ]
    if lengths:
        contexts = Contexts(
            target,
            tokenizer,
            drafters,
            asked,
            wordings[0],
            settings,
            window=window,
            document=text,
        )
        tasks = contexts.tasks(lengths)
        depends = {"window": window, "context": _digest(asked if text is None else text)}
    else:
        tasks = ask_all(
            target,
            tokenizer,
            drafters,
            asked,
            [wording for wording in wordings if wording.name not in same],
            settings,
        )
    depends["wordings"] = [asdict(wording) for wording in wordings]
    described = describe(target, drafters, settings, **depends)
    found = _collect(tasks, save, described, console)
    measured = conditions(found, same)

    world().finish()  # a result is told when all ranks are through
    if plot is not None and world().rank == 0:
        if lengths:
            plot_contexts(measured, plot)
        elif perturb:
            plot_conditions(measured, plot)
        else:
            plot_positions(measured[0], plot)
    if as_json:
        told = {
            "settings": described,
            "ranks": world().size,
            "conditions": [one.to_dict() for one in measured],
        }
        typer.echo(json.dumps(told))
        return
    out = Console()
    if not out.is_terminal:
        out = Console(width=500)  # a pipe has no width
    if not lengths and not perturb:
        out.print(figures(measured[0]))
        typer.echo(ELSEWHERE)
        return
    what = "context, drafter's attention" if lengths else "wording"
    out.print(comparison(measured, what))
    out.print()
    out.print(kept(measured, what))
    typer.echo(_about(measured[0], k))
    if lengths:
        head = wordings[0].head(tokenizer, asked[0].system_prompt)
        typer.echo(f"The window: {window} tokens. Before the user's first words come {head}.")


def _collect(
    tasks: Sequence[Task], save: Path | None, settings: dict[str, object], console: Console
) -> list[tuple[Question, Answers]]:
    """Asks everything, and tells how far it is."""
    at = 0
    counting = count_bar(console, "questions")
    with AnswerFile(save, settings) as file, counting as tell, redirect_stdout(sys.stderr):

        def progress(done: int, total: int) -> None:
            nonlocal at
            at = done
            tell(done, total)

        with warnings.catch_warnings():
            # That a drafter is hardly ever right is what the figures say.
            warnings.filterwarnings("ignore", "only .* of the first drafts", DriftWarning)
            try:
                return collect(tasks, file, progress)
            except KeyboardInterrupt:
                kept = f"; with --save {save} again it goes on" if save is not None else ""
                typer.echo(f"interrupted after {at} of {len(tasks)}{kept}", err=True)
                raise typer.Exit(INTERRUPTED) from None


def _fixed(drafts: int | Literal["auto"], flag: str) -> int:
    """Returns how much to draft, if that is a number.

    Raises:
        DriftError: If it is not.
    """
    if drafts == "auto":
        raise DriftError(
            f"{flag} is auto; expected a number: what auto drafts depends on how fast this machine "
            f"is, and so would the figures. How fast it is: mlx-drift bench {flag} auto"
        )
    return drafts


def _read_templates(paths: Sequence[Path]) -> dict[str, str]:
    """Reads chat templates, by the names of their files; by paths where those are the same."""
    stems = [path.stem for path in paths]
    return {
        path.stem if stems.count(path.stem) == 1 else str(path): read_chat_template(path)
        for path in paths
    }


def _check_together(
    perturb: bool,
    context: str | None,
    document: Path | None,
    system_prompts: Sequence[str],
    chat_templates: Sequence[Path],
    ignore_chat_template: bool,
) -> None:
    """Checks that the options make sense together.

    Raises:
        DriftError: If they do not.
    """
    if perturb and context is not None:
        raise DriftError("--perturb and --context are both given; measure one after the other")
    if document is not None and context is None:
        raise DriftError("--document is for --context")
    if ignore_chat_template and (perturb or chat_templates):
        other = "--perturb" if perturb else "--chat-template"
        raise DriftError(f"--ignore-chat-template and {other} are both given; give one of them")
    if not perturb and (len(system_prompts) > 1 or len(chat_templates) > 1):
        raise DriftError(
            "more than one --system-prompt or --chat-template is given; only --perturb compares "
            "them"
        )


def _about(condition: Condition, num_draft_tokens: int) -> str:
    return f"""
First: acceptance_length, drafts accepted a round, of {num_draft_tokens} at most. Then: what share
of the first row's a drafter keeps. Rounds are the first drafter's. In brackets: what holds 95 % of
the figures of resampled questions ({condition.questions} of them)."""


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
