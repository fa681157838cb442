"""`mlx-drift convert`: a PyTorch checkpoint in, a canonical directory out."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mlx_drift.cli import options
from mlx_drift.cli.load import load_model
from mlx_drift.cli.options import (
    Feedback,
    Mtp,
    Revision,
    RopeTheta,
    Slots,
    Source,
    Taps,
    Target,
    Window,
)
from mlx_drift.cli.show import conventions, conversion_bar, warning
from mlx_drift.convert import Conversion, convert_drafter
from mlx_drift.convert.target import read_target_shape
from mlx_drift.errors import DriftError
from mlx_drift.files.text import read_text
from mlx_drift.measure.conventions import PROMPTS, ConventionProbe

Dtype = Literal["float16", "bfloat16", "float32"]
QuantizationMode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]


def convert(
    source: Source,
    mlx_path: Annotated[Path, typer.Option(help="The folder to write.")],
    target: Target = None,
    mtp: Mtp = False,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Quantize the linear layers.")
    ] = False,
    q_bits: Annotated[int | None, typer.Option(help="Bits a weight; default: the mode's.")] = None,
    q_group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; default: the mode's.")
    ] = None,
    q_mode: Annotated[QuantizationMode, typer.Option(help="mlx's quantization mode.")] = "affine",
    dtype: Annotated[Dtype | None, typer.Option(help="Cast the floats.")] = None,
    revision: Revision = None,
    taps: Taps = None,
    feedback: Feedback = None,
    rope_theta: RopeTheta = None,
    window: Window = None,
    slots: Slots = None,
    probe_conventions: Annotated[
        bool,
        typer.Option(
            "--probe-conventions",
            help="Settle taps, and feedback or slots, by trying them on the target (loads it).",
        ),
    ] = False,
    probe_on: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts to probe on, one a line.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse config keys that nothing reads.")
    ] = False,
    upload_repo: Annotated[
        str | None, typer.Option(help="A Hub repository to upload the result to.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout: the resolved config.")
    ] = False,
) -> None:
    """Convert a PyTorch drafter checkpoint, or a model's MTP head, to MLX."""
    console = Console(stderr=True)
    probe = _probe(target, probe_conventions, probe_on, trust_remote_code)
    with conversion_bar(console, f"converting {source}") as progress:
        done = convert_drafter(
            source,
            mlx_path,
            target=target,
            mtp=mtp,
            quantize=quantize,
            q_bits=q_bits,
            q_group_size=q_group_size,
            q_mode=q_mode,
            dtype=dtype,
            revision=revision,
            taps=taps,
            feedback=feedback,
            rope_theta=rope_theta,
            window=window,
            slots=slots,
            strict=strict,
            probe=probe,
            upload_repo=upload_repo,
            progress=progress,
        )
    for line in done.warnings:
        warning(console, line)
    if as_json:
        typer.echo(json.dumps(_report(done, mlx_path, probe)))
    table = conventions(done.config.to_dict(), done.config.provenance)
    typer.echo(f"{done.dialect} → {mlx_path}", err=True)
    console.print(table)
    if done.url is not None:
        typer.echo(f"uploaded to {done.url}", err=True)


def _probe(
    target: str | None, probe_conventions: bool, probe_on: Path | None, trust_remote_code: bool
) -> ConventionProbe | None:
    """Loads the target for the probe, if one is wanted."""
    if not probe_conventions:
        if probe_on is not None:
            raise typer.BadParameter("--probe-on needs --probe-conventions")
        return None
    if target is None:
        raise DriftError("--probe-conventions tries the readings on a target: give it --target")
    prompts: tuple[str, ...] = PROMPTS
    if probe_on is not None:
        prompts = tuple(filter(None, map(str.strip, read_text(probe_on).splitlines())))
        if not prompts:
            raise DriftError(f"{probe_on}: holds no prompts; expected one a line")
    read_target_shape(target)  # a wrong name is told before anything is loaded
    return ConventionProbe(*load_model(target, None, trust_remote_code), prompts)


def _report(done: Conversion, path: Path, probe: ConventionProbe | None) -> dict[str, Any]:
    report = done.config.to_dict() | {
        "dialect": done.dialect,
        "mlx_path": str(path),
        "unknown_keys": done.unknown_keys,
        "notes": done.notes,
        "url": done.url,
    }
    if probe is not None:
        report["probe"] = {
            f"taps={taps} feedback={feedback}": steps
            for (taps, feedback), steps in probe.agreement.items()
        }
    return report
