"""The options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="A folder, a .safetensors or .bin file, or a Hub repository: owner/name or "
        "owner/name/subfolder."
    ),
]
Target = Annotated[
    str | None, typer.Option(help="The target's folder or Hub repository, to check against.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Taps = Annotated[
    Literal["input", "output"] | None,
    typer.Option(
        help="What the checkpoint's tap layers mean: inputs or outputs of layers. Of an MTP head: "
        "the input of the target's head, after the final norm, or the last layer's output."
    ),
]
Mtp = Annotated[
    bool,
    typer.Option(
        "--mtp",
        help="Take the multi-token-prediction head out of a model's repository or a sidecar: only "
        "what holds some of it is fetched.",
    ),
]
Feedback = Annotated[
    Literal["pre", "post"] | None,
    typer.Option(help="The state that is fed back: before or after the norm."),
]
RopeTheta = Annotated[
    float | None, typer.Option(help="The base of RoPE, where the checkpoint's is wrong.")
]
Slots = Annotated[
    Literal["shifted", "unshifted"] | None,
    typer.Option(
        help="Which position a slot of a DFlash or DSpark block predicts: its own (unshifted), or "
        "the one after it.",
    ),
]
Window = Annotated[
    int | None, typer.Option(metavar="W", help="The sliding window; 0 for none.", min=0)
]

Text = Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="The prompt; - reads stdin.")]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        help="The prompt; - reads stdin. Taken as it is: unlike mlx-lm, `\\n` stays two characters "
        "(a shell's $'…' makes line breaks).",
    ),
]
PromptFile = Annotated[Path | None, typer.Option(help="A file that holds the prompt.")]
Model = Annotated[
    str | None,
    typer.Option(help="The target: a folder or Hub repository. Default: the embedded pair."),
]
Drafter = Annotated[
    str | None,
    typer.Option(
        help="A converted drafter's folder, or a Hub repository, converted on first use; auto "
        "picks a known one (`mlx-drift pairs`); prompt-lookup only copies what followed before. "
        "With the embedded target: eagle3.1 or eagle3."
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(help="Draft with a small model that has the target's tokenizer, instead."),
]
Lookup = Annotated[
    bool | None,
    typer.Option(
        "--lookup/--no-lookup",
        help="Beside a head or draft model, copy what followed the last tokens where they stood "
        "before. Default: with --num-draft-tokens auto.",
        show_default=False,
    ),
]
AdapterPath = Annotated[str | None, typer.Option(help="LoRA adapters of the target.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code that the target (or a draft model) brings for its tokenizer or network.",
    ),
]
SystemPrompt = Annotated[str | None, typer.Option(help="System prompt.")]
IgnoreChatTemplate = Annotated[
    bool, typer.Option("--ignore-chat-template", help="Feed the raw prompt.")
]
ChatTemplateConfig = Annotated[
    str | None, typer.Option(metavar="JSON", help="Keywords of the chat template.")
]
DrafterWindow = Annotated[
    int | None,
    typer.Option(
        metavar="W",
        min=0,
        help="Tokens back that the drafter sees; 0 for all. Default: the length it was trained on.",
    ),
]
DrafterBits = Annotated[
    int | None, typer.Option(help="Quantize the drafter to so many bits: 4 or 8, say.")
]
NumDraftTokens = Annotated[
    str | None,
    typer.Option(
        metavar="K|auto",
        help="Drafts a round; auto: what pays here, plain decoding if nothing does. "
        "Default: auto, for the embedded pair 3. A --seed gives the same text again at a fixed K.",
    ),
]
DrafterSinks = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="First tokens that it sees beyond its window, or `system` for the system prompt's.",
    ),
]
MaxKvSize = Annotated[
    int | None, typer.Option(help="Rows of keys and values to keep: the first 4 and the last.")
]
KvBits = Annotated[int | None, typer.Option(help="Bits to quantize keys and values to.")]
KvGroupSize = Annotated[int, typer.Option(help="Values that share a scale in --kv-bits.")]
QuantizedKvStart = Annotated[int, typer.Option(help="From how many rows on --kv-bits quantizes.")]
PrefillStepSize = Annotated[int, typer.Option(help="Prompt tokens to process at a time.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Temperature = Annotated[float, typer.Option(help="Temperature; 0 for greedy decoding.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that make up this mass.")]
MinP = Annotated[float, typer.Option(help="Keep tokens this likely, in parts of the likeliest.")]
MinTokensToKeep = Annotated[int, typer.Option(help="Tokens that --min-p cannot remove.")]
TopK = Annotated[int, typer.Option(help="Keep so many of the likeliest tokens; 0 for all.")]
XtcProbability = Annotated[
    float, typer.Option(help="How often XTC removes the likeliest tokens but one.")
]
XtcThreshold = Annotated[float, typer.Option(help="What a token must reach for XTC to see it.")]
Seed = Annotated[int | None, typer.Option(help="Makes what is drawn reproducible.")]
