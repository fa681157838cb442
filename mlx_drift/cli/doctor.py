"""`mlx-drift doctor`: what a run would be, told before any weights are loaded."""

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mlx_drift.cli import options
from mlx_drift.cli.load import PROMPT_LOOKUP, choose_drafter
from mlx_drift.cli.show import as_is
from mlx_drift.demo import TARGET
from mlx_drift.doctor import CacheKind, Diagnosis, DrafterFacts, Family, Memory, RankMemory, Taps
from mlx_drift.doctor import doctor as examine
from mlx_drift.errors import DriftError
from mlx_drift.target.caches import KVQuantization

WEIGHTS_FROM = {
    "tensors": "the tensors on this machine",
    "sizes": "the files on the Hub",
    "config": "by the config; there are no files",
    None: "no files, and the config does not tell",
}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="The target: a folder, be it a config.json alone, or a Hub repository. Default: "
            "the embedded pair."
        ),
    ] = None,
    drafter: options.Drafter = None,
    context: Annotated[int, typer.Option(help="Tokens to tell the memory for.", min=1)] = 8192,
    max_kv_size: options.MaxKvSize = None,
    kv_bits: options.KvBits = None,
    kv_group_size: options.KvGroupSize = KVQuantization.group_size,
    quantized_kv_start: options.QuantizedKvStart = KVQuantization.start,
    prefill_step_size: options.PrefillStepSize = 2048,
    trust_remote_code: options.TrustRemoteCode = False,
    ranks: Annotated[
        int, typer.Option(help="Tell the memory of each of so many machines, too.", min=1)
    ] = 1,
    pipeline: options.Pipeline = False,
    as_json: options.AsJson = False,
) -> None:
    """Tell caches, taps, memory and what is refused, before any weights are loaded."""
    if drafter == PROMPT_LOOKUP:
        drafter = None  # it has no weights and reads no taps
    elif model is None:
        drafter = choose_drafter(drafter, model, Console(stderr=True))
    with redirect_stdout(sys.stderr):  # mlx-lm prints its warnings
        found = examine(
            model or str(TARGET),
            drafter,
            context=context,
            max_kv_size=max_kv_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            prefill_step_size=prefill_step_size,
            trust_remote_code=trust_remote_code,
            ranks=ranks,
            pipeline=pipeline,
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print(Console(), found)
    if found.refused:
        more = f" (and {len(found.refused) - 1} more)" if len(found.refused) > 1 else ""
        raise DriftError(f"{found.model}: {found.refused[0]}{more}")


def _print(console: Console, found: Diagnosis) -> None:
    rows = Table(show_header=False, box=None, pad_edge=False)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    sections = {
        "target": _family(found.family),
        "caches": _caches(found.caches, found.context),
        "taps": _taps(found.taps),
        "drafter": _drafter(found.drafter, found.context),
        "memory": _memory(found.memory, found.context),
        "ranks": _ranks(found.ranks),
        "notes": found.notes,
        "refused": _refused(found),
    }
    for name, lines in sections.items():
        for i, line in enumerate(lines):
            style = "red" if line in found.refused else ""
            rows.add_row("" if i else name, as_is(line, style))
    console.print(rows)


def _family(family: Family) -> Iterator[str]:
    name = family.model_type
    yield name if name == family.model_file else f"{name}, run by mlx-lm's {family.model_file}"
    if family.num_layers is not None:
        yield (
            f"{family.num_layers} layers, hidden size {family.hidden_size}, "
            f"vocabulary {family.vocab_size}, activations in {family.dtype}"
        )
    if family.quantization:
        quantization = ", ".join(f"{key} {value}" for key, value in family.quantization.items())
        yield f"quantized: {quantization}"


def _caches(kinds: list[CacheKind], context: int) -> Iterator[str]:
    for kind in kinds:
        size = f"{_size(kind.nbytes)}, however long"
        if kind.bytes_per_token is not None:
            size = f"{_size(kind.bytes_per_token)} a token, {_size(kind.nbytes)} at {context}"
        yield f"{kind.count} × {kind.kind}: {size}"
        yield f"  drafts: {kind.rolled_back}"
        yield f"  a conversation goes back {kind.goes_back}"


def _taps(taps: Taps | None) -> Iterator[str]:
    if taps is None:
        return
    if not taps.refused:
        yield f"0 … {taps.captured[-1]}: all can be captured"
        return
    yield f"can be captured: {', '.join(map(str, taps.captured)) or 'none'}"
    yield f"cannot: {', '.join(map(str, taps.refused))}"


def _drafter(drafter: DrafterFacts | None, context: int) -> Iterator[str]:
    if drafter is None:
        return
    yield f"{drafter.name}: fits the target"
    feedback = f", feedback {drafter.feedback}" if drafter.feedback else ""
    taps = ", ".join(map(str, drafter.taps))
    yield f"{drafter.drafter_type}, taps {taps}{feedback}, drafts {drafter.draft_vocab_size} tokens"
    if drafter.window is None:
        yield "looks back at no tokens: it reads the target's last state alone"
        return
    window = f"sees {drafter.window} tokens back (its training length)"
    if drafter.sliding_window is not None:
        window = f"sees {drafter.sliding_window} tokens back (its own window)"
    yield window + (f" and the first {drafter.sinks}" if drafter.sinks else "")
    yield from _caches(drafter.caches, context)


def _memory(memory: Memory, context: int) -> Iterator[str]:
    lines = {
        "weights": (memory.weights, WEIGHTS_FROM[memory.weights_from]),
        "caches": (memory.caches, f"at {context} tokens"),
        "drafter": (memory.drafter, "its weights"),
        "drafter's caches": (memory.drafter_caches, f"at {context} tokens"),
        "taps": (memory.taps, "of one chunk of the prompt"),
    }
    for name, (size, remark) in lines.items():
        if size != 0:
            yield f"{_size(size):>9}  {name}: {remark}"
    if memory.total is not None:
        fits = "fits" if memory.fits else "DOES NOT FIT"
        machine = _size(memory.machine)
        yield f"{_size(memory.total):>9}  and activations; the machine has {machine}: {fits}"


def _ranks(ranks: list[RankMemory]) -> Iterator[str]:
    for one in ranks:
        fits = {None: "unknown", True: "fits", False: "DOES NOT FIT"}[one.fits]
        yield (
            f"rank {one.rank}: {_size(one.weights)} of weights, {_size(one.caches)} of caches, "
            f"{_size(one.total)} in all; on a machine like this one: {fits}"
        )


def _refused(found: Diagnosis) -> Iterator[str]:
    yield from found.refused or ["nothing that was asked for"]
    for line in found.would_refuse:
        yield f"if asked for: {line}"


def _size(size: int | None) -> str:
    """Shows bytes as `inspect` does, in powers of ten."""
    if size is None:
        return "unknown"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
