"""`mlx-drift drift`: what a drafter's chain becomes from step to step."""

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mlx_drift.cli import options
from mlx_drift.cli.generate import INTERRUPTED
from mlx_drift.cli.load import load_drafters
from mlx_drift.cli.prompts import apply_template, encode, parse_object
from mlx_drift.cli.show import as_is, count_bar
from mlx_drift.demo import CHAINS, DRAFTERS
from mlx_drift.errors import DriftError
from mlx_drift.measure.acceptance.questions import read_question_files
from mlx_drift.measure.bootstrap import Interval
from mlx_drift.measure.inside.drift import RECENT, STEPS, Arm, Drift, Settings, drift
from mlx_drift.measure.inside.drift_plot import plot_drift
from mlx_drift.measure.inside.figures import Attention, Figures
from mlx_drift.measure.inside.intervene import intervention
from mlx_drift.measure.inside.still import Still
from mlx_drift.measure.pictures import check_matplotlib
from mlx_drift.measure.speed.bench import PROMPTS
from mlx_drift.watch.sums import CLASSES

COLUMNS = 100
"""The width where the output has none of its own."""


def drift_command(
    model: options.Model = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            help="A converted drafter's folder, or a Hub repository; repeatable. With the embedded "
            "target: eagle3.1, eagle3, mtp, dflash or medusa; by default all."
        ),
    ] = None,
    drafter_bits: options.DrafterBits = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    questions: Annotated[
        list[str] | None,
        typer.Option(help="A file of questions, of which the first turns are asked; repeatable."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeatable.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="So many of the first questions of each file.", min=1)
    ] = None,
    steps: Annotated[int, typer.Option(metavar="K", help="Chain steps: drafts a round.")] = STEPS,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Tokens to generate for each prompt.")
    ] = 64,
    recent: Annotated[
        int, typer.Option(metavar="N", help="Last committed tokens that are a class of their own.")
    ] = RECENT,
    sinks: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="First rows of the drafter's cache that are the sink: 1 for Llama (row 0 has the "
            "taps of token 0), 2 for Qwen.",
        ),
    ] = 1,
    intervene: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="Measure the drafters under an intervention too: pin, normalize, noise-hidden:α "
            "or noise-embedding:α; repeatable.",
        ),
    ] = None,
    teacher_forced: Annotated[
        bool,
        typer.Option(
            "--teacher-forced/--no-teacher-forced", help="Measure the chain of training too."
        ),
    ] = True,
    heads: Annotated[bool, typer.Option("--heads", help="Show each head's attention.")] = False,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write pictures into it: growth, attention, map."),
    ] = None,
    ignore_chat_template: options.IgnoreChatTemplate = False,
    chat_template_config: options.ChatTemplateConfig = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure attention drift: what drafters recycle and look at from step to step."""
    settings = Settings(steps, max_tokens, recent, sinks, teacher_forced, seed)
    for text in intervene or ():
        intervention(text)
    if plot is not None:
        check_matplotlib()
    asked = _asked(questions, prompt, limit)
    keywords = parse_object(chat_template_config, "--chat-template-config")
    console = Console(stderr=True)
    of_demo = CHAINS if intervene else DRAFTERS  # the others have nothing to meddle with
    names = drafter or (of_demo if model is None else ())
    target, tokenizer, drafters = load_drafters(
        model, names, adapter_path, console, drafter_bits, trust_remote_code
    )
    tokens = [
        encode(
            tokenizer,
            apply_template(
                tokenizer,
                text,
                template_keywords=keywords,
                system_prompt=system_prompt,
                ignore=ignore_chat_template,
            ),
        )
        for text, system_prompt in asked
    ]
    counting = count_bar(console, "answers")
    try:
        with counting as progress, redirect_stdout(sys.stderr):  # mlx-lm warns on stdout
            found = drift(
                target,
                tokenizer,
                drafters,
                tokens,
                settings,
                intervene or (),
                progress,
            )
    except KeyboardInterrupt:
        typer.echo("interrupted before there was anything to report", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if plot is not None:
        for path in plot_drift(found, plot):
            typer.echo(f"wrote {path}", err=True)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print(found, heads)


def _asked(
    questions: Sequence[str] | None, prompts: Sequence[str] | None, limit: int | None
) -> list[tuple[str, str | None]]:
    """Returns what is asked, each with its system prompt if it has one."""
    if questions and prompts:
        raise DriftError("--questions and --prompt are both given; give one of them")
    if any(not text.strip() for text in prompts or ()):
        raise DriftError("the prompt is empty; give some text")
    if questions:
        read = read_question_files(questions, limit)
        return [(question.turns[0], question.system_prompt) for question in read]
    return [(text, None) for text in (prompts or PROMPTS)[:limit]]


def _print(found: Drift, heads: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=COLUMNS)
    if found.arms:
        console.print(_summary(found))
    for arm in found.arms:
        free, forced = arm.free_running, arm.teacher_forced
        rounds = f"free-running, {free.chains} rounds of {found.settings.steps} drafts"
        _print_column(console, arm, rounds, free)
        if forced is not None:
            _print_column(console, arm, f"teacher-forced, {forced.chains} positions", forced)
        if heads:
            console.print()
            console.print(as_is(f"{arm.name} · heads, {rounds}", style="bold"))
            console.print(_heads(free))
    for still in found.still:
        _print_still(console, still, heads)
    typer.echo(_about(found))


def _print_still(console: Console, still: Still, heads: bool) -> None:
    """Shows a drafter that recycles nothing: its acceptance, and where its rows look."""
    looks = still.attention
    console.print()
    console.print(as_is(f"{still.drafter} · recycles no state: nothing drifts", style="bold"))
    accepted = f"accepted {_bounded(still.acceptance_length)}"
    if looks is None:
        console.print(f"{accepted}; its drafts look at no other position", highlight=False)
        return
    console.print(f"{accepted}; of {looks.chains} rounds:", highlight=False)
    names = [*CLASSES[:-1], "block"]
    table = Table("draft", "entropy", *names, box=None, header_style="dim")
    for step, entropy in enumerate(looks.entropy):
        means = [of[step].value for of in looks.attention.values()]
        table.add_row(str(step + 1), _bounded(entropy), *(f"{mean:.2f}" for mean in means))
    console.print(table)
    if heads:
        console.print(_heads(looks))


def _print_column(console: Console, arm: Arm, title: str, figures: Figures) -> None:
    console.print()
    console.print(as_is(f"{arm.name} · {title}", style="bold"))
    console.print(_steps(figures))
    taps = ", ".join(f"{tap.value:.2f}" for tap in figures.taps)
    console.print(
        f"RMS of the taps {taps}; of the fused input {_bounded(figures.fused)}", highlight=False
    )


def _summary(found: Drift) -> Table:
    """Lays out what to compare drafters by, a row an arm."""
    last = found.settings.steps
    intervened = any(arm.intervention is not None for arm in found.arms)
    table = Table("drafter", "accepted", box=None, header_style="dim")
    for name in (
        *(["of baseline"] if intervened else []),
        f"RMS {last} ÷ 1",
        f"sink 1 → {last}",
        f"entropy 1 → {last}",
    ):
        table.add_column(name)
    for arm in found.arms:
        free = arm.free_running
        share = "" if arm.of_baseline is None else _bounded(arm.of_baseline, percent=True)
        table.add_row(
            as_is(arm.name),
            _bounded(arm.acceptance_length),
            *([share] if intervened else []),
            _bounded(free.growth),
            _first_and_last([step.value for step in free.attention["sink"]]),
            _first_and_last([step.value for step in free.entropy]),
        )
    return table


def _steps(figures: Figures) -> Table:
    table = Table(
        "step", "RMS", "cosine", "update", "entropy", *CLASSES, box=None, header_style="dim"
    )
    for step, rms in enumerate(figures.rms):
        means = [figures.cosine, figures.update, figures.entropy, *figures.attention.values()]
        table.add_row(str(step + 1), _bounded(rms), *(f"{of[step].value:.2f}" for of in means))
    return table


def _heads(figures: Attention) -> Table:
    last = len(figures.entropy)
    names = [f"{name} 1 → {last}" for name in ("entropy", *CLASSES)]
    table = Table("head", *names, box=None, header_style="dim")
    for head in figures.heads:
        means = [head.entropy, *head.attention.values()]
        table.add_row(f"{head.layer}.{head.head}", *(f"{of[0]:.2f} → {of[-1]:.2f}" for of in means))
    return table


def _first_and_last(means: Sequence[float]) -> str:
    return f"{means[0]:.2f} → {means[-1]:.2f}"


def _bounded(interval: Interval, percent: bool = False) -> str:
    value, low, high = (f"{bound:.0%}" if percent else f"{bound:.2f}" for bound in interval)
    return f"{value} ({low}–{high})" if interval.low < interval.high else value


def _about(found: Drift) -> str:
    recent, sinks = found.settings.recent, found.settings.sinks
    return f"""
Prompts: {found.prompts}, greedy, {found.dtype} activations. In brackets: 95 % of prompts redrawn.
accepted  drafts a round, without the target's own token
RMS       of the state that is recycled, ‖h‖₂/√d
cosine    of it to the one before; at step 1, to the fused input
update    the size of what a step changes, in parts of the state before
entropy   of attention, in nats; it and the masses are means over heads
sink      attention on the drafter's first rows: {sinks} (the first has the taps of token 0)
prompt    on the rest of the prompt
answer    on the committed answer
recent    of both, on the last {recent} committed tokens
drafts    on its own drafts, the query's own position included
block     on the rows that were filled in the same pass, the query's own included
"""
