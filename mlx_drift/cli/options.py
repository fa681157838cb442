"""The options that several commands have."""

from typing import Annotated, Literal

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="A folder, a .safetensors or .bin file, or a Hub repository: owner/name[/subfolder]."
    ),
]
Target = Annotated[
    str | None, typer.Option(help="The target's folder or Hub repository, to check against.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Taps = Annotated[
    Literal["input", "output"] | None,
    typer.Option(help="What the checkpoint's tap layers mean: inputs or outputs of layers."),
]
Feedback = Annotated[
    Literal["pre", "post"] | None,
    typer.Option(help="The state that is fed back: before or after the norm."),
]
RopeTheta = Annotated[
    float | None, typer.Option(help="The base of RoPE, where the checkpoint's is wrong.")
]
Window = Annotated[
    int | None, typer.Option(metavar="W", help="The sliding window; 0 for none.", min=0)
]
