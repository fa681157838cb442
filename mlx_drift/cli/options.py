"""The options that several commands have.

Those of generating are described once, in `stream_generate`'s docstring, and read from there.
"""

import inspect
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from mlx_drift.decode.trees import Rows, check_tree
from mlx_drift.errors import DriftError
from mlx_drift.generate import check_num_draft_tokens, stream_generate


def described(keyword: str) -> str:
    """Returns what `stream_generate` says of a keyword in one sentence, flags for keywords."""
    arguments = inspect.getdoc(stream_generate) or ""
    said = re.search(rf"^    {keyword}: (.*?\.)(?=\s)", arguments, re.M | re.S)
    words = " ".join(said[1].split()) if said else ""  # python -OO has no docstrings
    return re.sub(r"`(\w+)`", lambda name: "--" + name[1].replace("_", "-"), words)


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

Text = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads stdin.")]
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
        "With the embedded target: eagle3.1, eagle3, mtp, dflash or medusa."
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
        "before. Default: with --num-draft-tokens auto or --tree auto.",
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
Pipeline = Annotated[
    bool,
    typer.Option(
        "--pipeline",
        help="Under mlx.launch: spread the target's layers over the ranks, instead of cutting each "
        "of them.",
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
DrafterConfidence = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="Stop drafting before a draft that a DSpark head holds for less likely than P to be "
        "accepted (0 to 1). Costs a synchronisation a round.",
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
Tree = Annotated[str | None, typer.Option(metavar="ROWS|auto", help=described("tree"))]
DrafterSinks = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="First tokens that it sees beyond its window, or `system` for the system prompt's.",
    ),
]
ShowDrafts = Annotated[
    bool,
    typer.Option(
        "--show-drafts",
        help="Mark every drafted token with its place in its round (c: copied), in colours on a "
        "terminal.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", help=described("max_tokens"))]
Temperature = Annotated[float, typer.Option(help=described("temp"))]
TopP = Annotated[float, typer.Option(help=described("top_p"))]
MinP = Annotated[float, typer.Option(help=described("min_p"))]
MinTokensToKeep = Annotated[int, typer.Option(help=described("min_tokens_to_keep"))]
TopK = Annotated[int, typer.Option(help=described("top_k"))]
XtcProbability = Annotated[float, typer.Option(help=described("xtc_probability"))]
XtcThreshold = Annotated[float, typer.Option(help=described("xtc_threshold"))]
Seed = Annotated[int | None, typer.Option(help=described("seed"))]
JsonSchema = Annotated[
    Path | None,
    typer.Option(help="A file that holds a JSON schema: the answer is JSON that it describes."),
]
Regex = Annotated[
    str | None,
    typer.Option(help="A regular expression that the answer matches from end to end."),
]
GrammarFile = Annotated[
    Path | None,
    typer.Option("--grammar", help="A file that holds a grammar (Lark's, as llguidance has it)."),
]
MaxKvSize = Annotated[int | None, typer.Option(help=described("max_kv_size"))]
KvBits = Annotated[int | None, typer.Option(help=described("kv_bits"))]
KvGroupSize = Annotated[int, typer.Option(help=described("kv_group_size"))]
QuantizedKvStart = Annotated[int, typer.Option(help=described("quantized_kv_start"))]
PrefillStepSize = Annotated[int, typer.Option(help=described("prefill_step_size"), min=1)]


def read_whole(text: str) -> int | None:
    """Reads a whole number; None if a text is none, or longer than any that makes sense."""
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else None


def read_draft_tokens(text: str) -> int | Literal["auto"]:
    """Reads `--num-draft-tokens`.

    Raises:
        DriftError: If it is neither a number that makes sense nor `auto`.
    """
    k: int | Literal["auto"] | None = "auto" if text == "auto" else read_whole(text)
    if k is None:
        raise DriftError(f"--num-draft-tokens is {text}; expected a number, or auto")
    check_num_draft_tokens(k)
    return k


def read_tree(text: str | None, **others: object) -> Rows | None:
    """Reads `--tree`, beside which nothing else may say how much to draft.

    Args:
        text: Its value; None if it is not given.
        others: Values of other flags under the names of their variables; None if not given.

    Raises:
        DriftError: If it makes no sense, or another one is given.
    """
    if text is None:
        return None
    rows: Rows | None = "auto" if text == "auto" else read_whole(text)
    if rows is None:
        raise DriftError(f"--tree is {text}; expected a number of rows, or auto")
    check_tree(rows)
    if given := [name for name, value in others.items() if value is not None]:
        flag = "--" + given[0].replace("_", "-")
        raise DriftError(f"{flag} and --tree are both given; give one of them")
    return rows
