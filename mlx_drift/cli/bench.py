"""`mlx-drift bench`: does drafting pay here, and with how many drafts?"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx_lm.utils import dequantize_model
from rich.console import Console
from rich.table import Table

from mlx_drift.cli import options
from mlx_drift.cli.bench_tables import (
    about,
    about_replay,
    about_shape,
    replay_table,
    shape_table,
    table,
)
from mlx_drift.cli.load import choose_drafter, load_model, load_pair
from mlx_drift.cli.prompts import apply_template, encode, parse_object
from mlx_drift.cli.show import count_bar
from mlx_drift.cli.transcripts import read_transcripts
from mlx_drift.drafters.head import HeadDrafter
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.errors import DriftError
from mlx_drift.loading import load_drafter
from mlx_drift.measure.speed.bench import LENGTHS, PROMPTS, Bench, bench
from mlx_drift.measure.speed.replay import Replay, measure_costs, replay
from mlx_drift.measure.speed.rounds import TURNS
from mlx_drift.measure.speed.shape_costs import (
    ACCEPTANCES,
    ShapeCosts,
    check_assumptions,
    shape_costs,
)
from mlx_drift.measure.speed.shapes import SHAPES, UNQUANTIZED, random_pair
from mlx_drift.ranks.world import world

Found = TypeVar("Found", Bench, ShapeCosts, Replay)

CONTEXT, TARGET_BITS = 128, 4
"""What `--shape` measures with, if nothing else is said."""

WIDTH = 100
"""Of a table that does not go to a terminal."""


def bench_command(
    model: options.Model = None,
    drafter: options.Drafter = None,
    draft_model: options.DraftModel = None,
    drafter_bits: Annotated[
        int | None,
        typer.Option(help="Measure the drafter quantized to so many bits beside it: 4 or 8, say."),
    ] = None,
    adapter_path: options.AdapterPath = None,
    pipeline: options.Pipeline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    baseline_draft_model: Annotated[
        str | None,
        typer.Option(
            help="Measure mlx-lm's own speculative loop beside it, with this small model."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeatable.")
    ] = None,
    num_draft_tokens: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K", help="A draft length to measure, or auto; repeatable. Default: 1 to 4."
        ),
    ] = None,
    tree: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROWS",
            help="Measure trees of so many rows too, drafts + 1, or auto; repeatable.",
        ),
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
    replay_file: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="FILE",
            help="Replay recorded answers instead, with and without lookup: JSON lines of "
            '{"messages": […]} or {"prompt": …, "text": …}.',
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Time rounds of random weights at a real model's shapes instead: "
            f"{', '.join(SHAPES)}.",
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="With --shape: so many layers only, to fit.")
    ] = None,
    target_bits: Annotated[
        int | None,
        typer.Option(help="With --shape: bits of the target; 16: unquantized. Default: 4."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="With --shape: tokens in the caches. Default: 128.")
    ] = None,
    acceptance: Annotated[
        str | None,
        typer.Option(
            metavar="A,…",
            help="With --shape: the acceptances of a draft to compute speed-ups for. "
            f"Default: {','.join(map(str, ACCEPTANCES))}.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure plain decoding and ways of drafting, in turns, in one run."""
    if repeats < 1:
        raise DriftError(f"repeats is {repeats}; expected at least 1")
    if any(not text.strip() for text in prompt or ()):
        raise DriftError("the prompt is empty; give some text")
    lengths = [options.read_draft_tokens(text) for text in num_draft_tokens or ()] or list(LENGTHS)
    trees = [rows for text in tree or () if (rows := options.read_tree(text)) is not None]
    of_a_pair = {
        "--model": model,
        "--drafter": drafter,
        "--draft-model": draft_model,
        "--adapter-path": adapter_path,
        "--pipeline": pipeline or None,
        "--baseline-draft-model": baseline_draft_model,
        "--prompt": prompt,
        "--replay": replay_file,
        "--tree": tree,
    }
    of_a_shape = {
        "--layers": layers,
        "--target-bits": target_bits,
        "--context": context,
        "--acceptance": acceptance,
    }
    for flag, value in (of_a_shape if shape is None else of_a_pair).items():
        if value is not None:
            needs = "goes with --shape" if shape is None else "does not go with --shape"
            raise DriftError(f"{flag} {needs}; leave it out")
    of_one_machine = {"--shape": shape, "--replay": replay_file, "--dequantize": dequantize}
    given = [flag for flag, value in of_one_machine.items() if value]
    if given and world().size > 1:
        raise DriftError(f"{given[0]} does not go with several ranks; leave it out")
    console = Console(stderr=True)
    measuring = count_bar(console, "measuring")
    if shape is not None:
        numbers = [k for k in lengths if isinstance(k, int)]
        if num_draft_tokens and len(numbers) < len(lengths):
            raise DriftError("--shape measures fixed draft lengths; leave auto out")
        context = CONTEXT if context is None else context
        acceptances = _acceptances(acceptance)
        check_assumptions(numbers, context, acceptances)
        bits = UNQUANTIZED if dequantize else TARGET_BITS if target_bits is None else target_bits
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        with measuring as progress:
            pair = random_pair(
                shape,
                layers=layers,
                bits=bits,
                drafter_bits=drafter_bits,
                # MLX's CPU backend computes low precision many times slower; nobody uses it so.
                dtype=mx.float32 if dequantize or on_cpu else mx.bfloat16,
                context=context,
            )
            costs = shape_costs(
                shape,
                pair,
                target_bits=bits,
                drafter_bits=drafter_bits,
                lengths=numbers,
                context=context,
                acceptances=acceptances,
                temp=temp,
                turns=TURNS,
                progress=progress,
            )
        _tell(costs, shape_table, about_shape, as_json)
        return
    keywords = parse_object(chat_template_config, "--chat-template-config")
    target, tokenizer, loaded = load_pair(
        model, drafter, adapter_path, console, None, draft_model, trust_remote_code, pipeline
    )
    baseline = None
    if baseline_draft_model is not None:
        baseline, its_tokenizer = load_model(baseline_draft_model, None, trust_remote_code)
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise DriftError(
                f"{baseline_draft_model} has another tokenizer than the target; give a draft model "
                "of the same family"
            )
    if dequantize:
        for network in target, loaded.network, baseline:
            if network is not None:
                _to_float32(network)
    quantized = None
    if isinstance(loaded, HeadDrafter):
        folder = choose_drafter(drafter, model, Console(quiet=True))
        if dequantize:  # a drafter borrows its target's embedding when it is loaded
            loaded = load_drafter(folder, target)
        if drafter_bits is not None:
            quantized = drafter_bits, load_drafter(folder, target, drafter_bits=drafter_bits)
    elif drafter_bits is not None:
        raise DriftError("--drafter-bits is for trained heads; leave it out")
    if replay_file is not None:
        if isinstance(loaded, PromptLookupDrafter):
            raise DriftError("--replay has lookup beside a head or draft model; give one of them")
        recorded = read_transcripts(replay_file, tokenizer, keywords)
        with measuring as progress:
            measured = measure_costs(target, loaded, recorded[0].prompt, trees=bool(trees))
            replayed = replay(
                target,
                loaded,
                recorded,
                measured,
                lengths=lengths,
                trees=trees,
                progress=progress,
            )
        _tell(replayed, replay_table, about_replay, as_json)
        return
    tokens = [
        encode(
            tokenizer,
            apply_template(
                tokenizer, text, template_keywords=keywords, ignore=ignore_chat_template
            ),
        )
        for text in prompt or PROMPTS
    ]
    with measuring as progress:
        found = bench(
            target,
            tokenizer,
            loaded,
            tokens,
            lengths=lengths,
            trees=trees,
            quantized=quantized,
            draft_model=baseline,
            max_tokens=max_tokens,
            repeats=repeats,
            temp=temp,
            turns=TURNS,
            progress=progress,
        )
    world().finish()  # a result is told when all ranks are through
    _tell(found, table, about, as_json)


def _acceptances(text: str | None) -> tuple[float, ...]:
    """Reads numbers with commas between them."""
    if text is None:
        return ACCEPTANCES
    try:
        return tuple(float(one) for one in text.split(","))
    except ValueError:
        raise DriftError(
            f"--acceptance is {text}; expected numbers from 0 to 1, with commas between them"
        ) from None


def _to_float32(network: nn.Module) -> None:
    dequantize_model(network)
    network.set_dtype(mx.float32)
    mx.eval(network)


def _tell(
    found: Found, table: Callable[[Found], Table], about: Callable[[Found], str], as_json: bool
) -> None:
    """Prints the results."""
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        console = Console()
        if not console.is_terminal:  # a file or a pipe has no width
            console.width = WIDTH
        console.print(table(found))
        typer.echo(about(found))
