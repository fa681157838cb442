"""`mlx-drift tune`: measures what rounds cost on this machine, and keeps it for `auto`."""

import json
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as RichTable

from mlx_drift.cli import options
from mlx_drift.cli.load import load_pair
from mlx_drift.cli.show import count_bar
from mlx_drift.decode.tuned import Table, device_name, tuned_file, write_table
from mlx_drift.demo import QUESTION
from mlx_drift.measure.speed.arithmetic import break_even
from mlx_drift.measure.speed.tune import CONTEXTS, LENGTHS, tune


def tune_command(
    model: options.Model = None,
    drafter: options.Drafter = None,
    draft_model: options.DraftModel = None,
    drafter_bits: options.DrafterBits = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    context: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help=f"A context length; repeatable. Default: {', '.join(map(str, CONTEXTS))}.",
            min=2,
        ),
    ] = None,
    num_draft_tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="K",
            help=f"A draft length; repeatable. Default: {', '.join(map(str, LENGTHS))}.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure what rounds cost on this machine, for `--num-draft-tokens auto` to start from."""
    console = Console(stderr=True)
    target, tokenizer, loaded = load_pair(
        model, drafter, adapter_path, console, drafter_bits, draft_model, trust_remote_code
    )
    with count_bar(console, "rounds") as progress:
        table = tune(
            target,
            loaded,
            tokenizer.encode(QUESTION),
            contexts=context or CONTEXTS,
            lengths=sorted(set(num_draft_tokens or LENGTHS)),
            progress=progress,
        )
    path = tuned_file(target, loaded)
    about = {
        "device": device_name(),
        "mlx_version": version("mlx"),
        "model": model,
        "drafter": drafter,
    }
    write_table(path, table, about)
    if as_json:
        typer.echo(json.dumps({**about, "file": str(path), "contexts": table}))
        return
    Console().print(_table(table))
    typer.echo(
        f"""
{about["device"]}, mlx {about["mlx_version"]}. A round in milliseconds and in plain steps, and the
acceptance of every draft from which rounds of this length pay.
Kept in {path}"""
    )


def _table(table: Table) -> RichTable:
    shown = RichTable(box=None, header_style="dim")
    shown.add_column("K", justify="right")
    for tokens in table:
        for name in (f"{tokens} tokens", "× plain", "pays at"):
            shown.add_column(name, justify="right")
    for k in next(iter(table.values())):
        row = [str(k) if k else "–"]
        for costs in table.values():
            cost = costs[k] / costs[0]
            pays_at = break_even(k, cost) if k else None
            row += [f"{1000 * costs[k]:.1f} ms", f"{cost:.2f}" if k else ""]
            row += ["" if not k else "never" if pays_at is None else f"{pays_at:.2f}"]
        shown.add_row(*row)
    return shown
