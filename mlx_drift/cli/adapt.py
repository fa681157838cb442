"""`mlx-drift adapt`: a head and one's own target in, the head adapted to it out."""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from rich.console import Console

from mlx_drift.cli import options
from mlx_drift.cli.acceptance_tables import figures
from mlx_drift.cli.generate import INTERRUPTED
from mlx_drift.cli.load import choose_drafter, load_model
from mlx_drift.cli.prompts import parse_object
from mlx_drift.cli.show import warning
from mlx_drift.convert.write import free_path
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS
from mlx_drift.errors import DriftError
from mlx_drift.files.hub import check_upload_repo
from mlx_drift.measure.acceptance.plot import check_plot
from mlx_drift.measure.acceptance.wording import Wording, read_chat_template
from mlx_drift.train.adapt import Adaptation, Stopped
from mlx_drift.train.answers import Asking
from mlx_drift.train.learner import Recipe
from mlx_drift.train.plan import Plan
from mlx_drift.train.plot import plot_adapted
from mlx_drift.train.run import run_folder

OWN = "own"
"""What `--chat-template` and `--system-prompt` say for what is there without them."""


def adapt(
    mlx_path: Annotated[Path, typer.Option(help="The folder to write.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|FILE|HUB",
            help="What it learns from: a folder with {train, valid, test}.jsonl as for "
            "mlx_lm.lora, a file of conversations or questions, or a Hub data set.",
        ),
    ] = None,
    questions: Annotated[
        Literal["self"] | None,
        typer.Option(help="self, in place of --data: the target asks itself, --limit of them."),
    ] = None,
    model: options.Model = None,
    drafter: Annotated[str | None, typer.Option(help="The head to adapt, as for generate.")] = None,
    from_scratch: Annotated[
        Literal["eagle3.1", "eagle3"] | None,
        typer.Option(help="In place of --drafter: a head from nothing. It takes much data."),
    ] = None,
    draft_vocab_size: Annotated[
        int | None,
        typer.Option(
            metavar="D", help="Of --from-scratch. Default: 32000, or the target's.", min=1
        ),
    ] = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    answers: Annotated[
        Literal["self", "given"],
        typer.Option(
            help="self: the target answers the questions in the data itself; given: the answers "
            "in the data are learned from."
        ),
    ] = "self",
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="The first N conversations of each file.", min=1),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Tokens of an answer, at most.", min=2)
    ] = Asking.max_tokens,
    max_seq_length: Annotated[
        int, typer.Option(help="Tokens of a conversation, at most.", min=8)
    ] = Asking.max_seq_length,
    sampled: Annotated[
        float, typer.Option(help="The share of answers that are drawn, not greedy.", min=0, max=1)
    ] = Asking.sampled,
    temp: Annotated[
        float, typer.Option(help="The temperature they are drawn at.", min=0)
    ] = Asking.temp,
    answer_draft_tokens: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="Drafts a round while it answers; 0: plain.",
            min=0,
            max=MAX_DRAFT_TOKENS,
        ),
    ] = Asking.num_draft_tokens,
    system_prompt: Annotated[
        list[str] | None,
        typer.Option(help=f"System prompt; repeatable, `{OWN}` for the data's own."),
    ] = None,
    chat_template: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help=f"Jinja, in place of the tokenizer's; repeatable, `{OWN}` for that one. Each "
            "conversation draws one.",
        ),
    ] = None,
    chat_template_config: options.ChatTemplateConfig = None,
    control: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Unrelated questions: what is forgotten of them?"),
    ] = None,
    iters: Annotated[int, typer.Option(help="Steps, at most.")] = Recipe.iters,
    batch_size: Annotated[
        int, typer.Option(help="Texts a step; one after another, so memory is that of one.")
    ] = Recipe.batch_size,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = Recipe.learning_rate,
    warmup: Annotated[
        float, typer.Option(help="The share of steps over which it rises; then a cosine.")
    ] = Recipe.warmup,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = Recipe.weight_decay,
    max_grad_norm: Annotated[
        float, typer.Option(help="What gradients are clipped to.")
    ] = Recipe.max_grad_norm,
    steps: Annotated[
        int, typer.Option(help="Of the train-time test: how deep a chain is trained.")
    ] = Recipe.steps,
    loss: Annotated[
        Literal["soft-ce", "tv", "nla", "lk"],
        typer.Option(help="Soft cross-entropy, total variation, −log acceptance, or LK's hybrid."),
    ] = "soft-ce",
    decay: Annotated[
        float, typer.Option(help="What each step of a chain weighs beside the one before.")
    ] = Recipe.decay,
    rank: Annotated[
        int, typer.Option(help="Train low-rank factors, merged at the end; 0: the whole head.")
    ] = Recipe.rank,
    grad_checkpoint: Annotated[
        bool, typer.Option("--grad-checkpoint", help="Less memory, more time.")
    ] = False,
    save_every: Annotated[
        int, typer.Option(help="Steps that are lost at most when it is killed.")
    ] = Recipe.save_every,
    steps_per_report: Annotated[
        int, typer.Option(help="Steps between reports of the loss.")
    ] = Recipe.steps_per_report,
    steps_per_eval: Annotated[
        int, typer.Option(help="Steps between measurements of acceptance.")
    ] = Recipe.steps_per_eval,
    patience: Annotated[
        int, typer.Option(help="Measurements without a rise until it stops; 0: never.")
    ] = Recipe.patience,
    num_draft_tokens: Annotated[
        int, typer.Option(metavar="K", help="Drafts a round, of what is measured.")
    ] = Recipe.num_draft_tokens,
    seed: Annotated[int, typer.Option(help="Of answers, order and factors.", min=0)] = 0,
    report_to: Annotated[
        str | None, typer.Option(help="wandb, swanlab or both, as in mlx_lm.lora.")
    ] = None,
    project_name: Annotated[str | None, typer.Option(help="The project's name there.")] = None,
    upload_repo: Annotated[
        str | None, typer.Option(help="A Hub repository to upload the result to.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="A picture (needs the plot extra).")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Tell memory, tokens and time, and write nothing."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a head for your own target, on this machine, on what the target itself says.

    Beside the result, in its folder's name with .run behind it, stand answers, checkpoint and the
    best head so far. The same command goes on from there after Ctrl-C, or whatever stopped it.
    """
    console = Console(stderr=True)
    recipe = Recipe(
        iters=iters,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        steps=steps,
        loss=loss,
        decay=decay,
        rank=rank,
        grad_checkpoint=grad_checkpoint,
        save_every=save_every,
        steps_per_report=steps_per_report,
        steps_per_eval=steps_per_eval,
        patience=patience,
        num_draft_tokens=num_draft_tokens,
        seed=seed,
    )
    asking = Asking(max_tokens, sampled, temp, answer_draft_tokens, max_seq_length, seed)
    keywords = parse_object(chat_template_config, "--chat-template-config")
    wordings = _wordings(chat_template or [OWN], system_prompt or [OWN], keywords)
    if (data is None) == (questions is None):
        raise DriftError("--data, or --questions self: give one of them")
    if from_scratch is not None and drafter is not None:
        raise DriftError("--drafter and --from-scratch are both given; give one of them")
    if model is not None and drafter is None and from_scratch is None:
        raise DriftError(
            "no drafter given for this model: add --drafter, the head to adapt, or --from-scratch"
        )
    if draft_vocab_size is not None and from_scratch is None:
        raise DriftError("--draft-vocab-size is for --from-scratch; a head has its own")
    if plot is not None:
        check_plot(plot)
    if not dry_run:  # before anything is loaded
        mlx_path = free_path(mlx_path)
        check_upload_repo(upload_repo)
    head = None if from_scratch else choose_drafter(drafter, model, console)
    target, tokenizer = load_model(model, adapter_path, trust_remote_code)
    adaptation = Adaptation(
        target,
        tokenizer,
        head,
        data,
        answers=answers,
        recipe=recipe,
        asking=asking,
        wordings=wordings,
        limit=limit,
        control=control,
        from_scratch=from_scratch,
        draft_vocab_size=draft_vocab_size,
        revision=revision,
    )
    if dry_run:
        _show_plan(adaptation.plan(), as_json)
        return
    watch = _reporting(report_to, project_name, run_folder(mlx_path), vars(recipe))
    try:
        with stopping() as stop, redirect_stdout(sys.stderr):
            done = adaptation.run(
                mlx_path,
                name=model,
                upload_repo=upload_repo,
                stop=stop,
                tell=_teller(watch, iters),
            )
    except Stopped as stopped:
        typer.echo(f"{stopped}: give the same command again", err=True)
        raise typer.Exit(INTERRUPTED) from None
    for note in done.notes:
        warning(console, note)
    if plot is not None:
        plot_adapted(done, plot)
    if as_json:
        typer.echo(json.dumps(done.to_dict()))
    else:
        out = Console()
        if not out.is_terminal:
            out = Console(width=500)  # a pipe has no width
        for condition in done.measured:
            out.print(f"{condition.name}, K = {num_draft_tokens}", style="bold")
            out.print(figures(condition))
            out.print()
        told = ", ".join(f"{name} {share:.0%}" for name, share in done.distinct.items())
        out.print(f"distinct 4-grams of what was held out: {told}", markup=False, highlight=False)
    typer.echo(
        f"{head or from_scratch} → {mlx_path}: step {done.progress.best_step} of "
        f"{done.progress.step}, {done.seconds / 60:.1f} min of training; {mlx_path}.run may be "
        "removed",
        err=True,
    )


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yields what tells whether the user pressed Ctrl-C, which ends nothing by itself until then.

    Pressed again, it does. To be ended by the system is to be asked, too.
    """
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        typer.echo("stopping after this step; Ctrl-C again to stop at once", err=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_plan(plan: Plan, as_json: bool) -> None:
    """Tells what a training would be."""
    if as_json:
        typer.echo(json.dumps(plan.to_dict()))
        return
    for name, size in {**plan.memory.terms, "in all": plan.memory.total}.items():
        typer.echo(f"{name:10} {size / 1e9:8.2f} GB")
    typer.echo(f"{'device':10} {plan.memory.device / 1e9:8.2f} GB\n")
    counts = ", ".join(f"{count} {part}" for part, count in plan.conversations.items() if count)
    typer.echo(f"conversations: {counts}")
    typer.echo(f"tokens in all steps: about {plan.tokens:,}")
    typer.echo(
        f"answers {plan.answer_seconds / 60:.1f} min, a step {plan.step_seconds:.2f} s, measuring "
        f"{plan.measure_seconds:.1f} s each time: about {plan.seconds / 60:.0f} min in all"
    )


def _wordings(
    templates: Sequence[str], system_prompts: Sequence[str], keywords: dict[str, Any]
) -> list[Wording]:
    """Returns every template with every system prompt."""
    found = []
    for template in templates:
        text = None if template == OWN else read_chat_template(Path(template))
        for number, system in enumerate(system_prompts, 1):
            name = "own template" if text is None else Path(template).name
            name += f", system prompt {number}" if len(system_prompts) > 1 else ""
            prompt = None if system == OWN else system
            found.append(Wording(name, text, system_prompt=prompt, keywords=keywords))
    return found


def _reporting(
    services: str | None, project: str | None, folder: Path, config: dict[str, Any]
) -> Any:
    """Returns mlx-lm's callback that reports to services; None for none."""
    if services is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)  # services write into it
        return get_reporting_callbacks(services, project, str(folder), config)
    except OSError as error:
        raise DriftError(f"{folder}: cannot be written ({error.strerror})") from None
    except (ImportError, ValueError) as error:
        raise DriftError(f"--report-to {services}: {error}") from None


def _teller(watch: Any, iters: int) -> Callable[[str, dict[str, Any]], None]:
    """Returns what tells on stderr how it goes, a line each."""

    def tell(kind: str, told: dict[str, Any]) -> None:
        if kind == "answers":
            done, of = told["done"], told["of"]
            if done == of or done % max(1, of // 10) == 0:
                typer.echo(f"{told['what']}: {done} of {of}", err=True)
        elif kind == "train":
            typer.echo(
                f"step {told['iteration']} of {iters}: loss {told['train_loss']:.4f}, learning "
                f"rate {told['learning_rate']:.2e}, {told['tokens_per_second']:.0f} tokens/s, "
                f"peak memory {told['peak_memory']:.2f} GB",
                err=True,
            )
            if watch is not None:
                watch.on_train_loss_report(told)
        else:
            best = told["best_iteration"] == told["iteration"]
            typer.echo(
                f"step {told['iteration']}: acceptance_length {told['acceptance_length']:.3f}"
                f"{', the best' if best else ''}; loss on what is held out {told['val_loss']:.4f}",
                err=True,
            )
            if watch is not None:
                watch.on_val_loss_report(told)

    return tell
