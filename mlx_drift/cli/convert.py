"""`mlx-drift convert`: a PyTorch checkpoint in, a canonical directory out."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from mlx_drift.convert import convert_drafter

Dtype = Literal["float16", "bfloat16", "float32"]
QuantizationMode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
Taps = Literal["input", "output"]
Feedback = Literal["pre", "post"]


def convert(
    source: Annotated[
        str, typer.Argument(help="A folder, a .safetensors or .bin file, or a Hub repository.")
    ],
    mlx_path: Annotated[Path, typer.Option(help="The folder to write.")],
    target: Annotated[
        str | None, typer.Option(help="The target's folder or Hub repository, to check against.")
    ] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Quantize the linear layers.")
    ] = False,
    q_bits: Annotated[int | None, typer.Option(help="Bits a weight; default: the mode's.")] = None,
    q_group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; default: the mode's.")
    ] = None,
    q_mode: Annotated[QuantizationMode, typer.Option(help="mlx's quantization mode.")] = "affine",
    dtype: Annotated[Dtype | None, typer.Option(help="Cast the floats.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    taps: Annotated[
        Taps | None, typer.Option(help="What the checkpoint's tap layers mean.")
    ] = None,
    feedback: Annotated[
        Feedback | None, typer.Option(help="The state that is fed back: before or after the norm.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout: the resolved config.")
    ] = False,
) -> None:
    """Convert a PyTorch EAGLE-3 checkpoint to MLX."""
    console = Console(stderr=True)
    with console.status(f"converting {source}"):
        resolved = convert_drafter(
            source,
            mlx_path,
            target=target,
            quantize=quantize,
            q_bits=q_bits,
            q_group_size=q_group_size,
            q_mode=q_mode,
            dtype=dtype,
            revision=revision,
            taps=taps,
            feedback=feedback,
        )
    values = resolved.config.to_dict()
    if resolved.unknown_keys:
        console.print(
            f"warning: config keys that nothing reads: {', '.join(resolved.unknown_keys)}",
            style="yellow",
            highlight=False,
        )
    if as_json:
        typer.echo(json.dumps(values))
    table = Table("convention", "value", "from", title=f"{resolved.dialect} → {mlx_path}")
    for key, origin in resolved.config.provenance.items():
        table.add_row(key, str(values[key]), origin)
    console.print(table)
