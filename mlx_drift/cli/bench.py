"""`mlx-drift bench`: does drafting pay here, and with how many drafts?"""

import json
from typing import Annotated

import mlx.core as mx
import typer
from mlx_lm.utils import dequantize_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mlx_drift.cli import options
from mlx_drift.cli.load import load_pair
from mlx_drift.cli.prompts import apply_template, encode, parse_object
from mlx_drift.errors import DriftError
from mlx_drift.measure.bench import PROMPTS, Arm, Bench, bench


def bench_command(
    model: options.Model = None,
    drafter: options.Drafter = None,
    draft_model: options.DraftModel = None,
    drafter_bits: options.DrafterBits = None,
    adapter_path: options.AdapterPath = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeatable.")
    ] = None,
    num_draft_tokens: Annotated[
        list[int] | None,
        typer.Option(metavar="K", help="A draft length to measure; repeatable. Default: 1 to 4."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Tokens to generate for each prompt.", min=2)
    ] = 128,
    repeats: Annotated[int, typer.Option(help="How often each arm answers each prompt.")] = 3,
    temp: options.Temperature = 0.0,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Measure the float32 form of the target.")
    ] = False,
    ignore_chat_template: options.IgnoreChatTemplate = False,
    chat_template_config: options.ChatTemplateConfig = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure plain decoding and drafting at several lengths, in turns, in one run."""
    if repeats < 1:
        raise DriftError(f"repeats is {repeats}; expected at least 1")
    if any(not text.strip() for text in prompt or ()):
        raise DriftError("the prompt is empty; give some text")
    keywords = parse_object(chat_template_config, "--chat-template-config")
    console = Console(stderr=True)
    target, tokenizer, loaded = load_pair(
        model, drafter, adapter_path, console, drafter_bits, draft_model
    )
    if dequantize:
        dequantize_model(target)
        target.set_dtype(mx.float32)
        loaded.network.set_dtype(mx.float32)
        mx.eval(target, loaded.network)
    tokens = [
        encode(
            tokenizer,
            apply_template(
                tokenizer, text, template_keywords=keywords, ignore=ignore_chat_template
            ),
        )
        for text in prompt or PROMPTS
    ]
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("answers", total=None)
        found = bench(
            target,
            tokenizer,
            loaded,
            tokens,
            lengths=num_draft_tokens or (1, 2, 3, 4),
            max_tokens=max_tokens,
            repeats=repeats,
            temp=temp,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        Console().print(_table(found))
        typer.echo(_about(found))


def _table(found: Bench) -> Table:
    names = "K", "tokens/s", "× plain", "quartiles", "accepted", "ms", "Python", "alone", "pays at"
    table = Table(*names, box=None, header_style="dim")
    for arm in found.arms:
        table.add_row(*_row(arm))
    return table


def _row(arm: Arm) -> list[str]:
    if arm.round_seconds is None or arm.host_seconds is None:
        return ["–", f"{arm.tokens_per_second:.1f}"]
    low, middle, high = arm.speedup
    return [
        str(arm.num_draft_tokens),
        f"{arm.tokens_per_second:.1f}",
        f"{middle:.2f}",
        f"{low:.2f}–{high:.2f}",
        f"{arm.acceptance_length:.2f}",
        f"{1000 * arm.round_seconds:.1f}",
        f"{1000 * arm.host_seconds:.1f}",
        f"{arm.efficiency:.2f}",
        "never" if arm.break_even is None else f"{arm.break_even:.2f}",
    ]


def _about(found: Bench) -> str:
    return f"""
{found.device}, mlx {found.mlx_version}, {found.dtype} activations, temperature {found.temp:g};
{found.prompts} prompts × {found.repeats}, at most {found.max_tokens} tokens each.
K         drafts a round; – is mlx-lm's plain decoding
× plain   tokens a second over plain decoding's of the same prompt and turn: the median
accepted  drafts a round
ms        of a round, and what Python takes of it
alone     round efficiency: the passes of a round, timed alone, over the round
pays at   the acceptance of every draft from which rounds of this length pay"""
