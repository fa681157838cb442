"""`mlx-drift generate`: the answer on stdout as it is accepted, the statistics on stderr."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.progress import Progress

from mlx_drift.cli.load import load_model
from mlx_drift.cli.report import report, table
from mlx_drift.convert.target import target_folder
from mlx_drift.demo import DEMO, DRAFTERS, QUESTION, TARGET
from mlx_drift.drafters.config import read_json
from mlx_drift.errors import DriftError
from mlx_drift.generate import DriftResponse, check_num_draft_tokens, stream_generate
from mlx_drift.hub import find_hub_folder
from mlx_drift.loading import load_drafter
from mlx_drift.pairs import find_pair
from mlx_drift.paths import existing

INTERRUPTED = 130  # the shell's code for Ctrl-C


def generate(
    text: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The prompt; - reads stdin.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt; - reads stdin.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file that holds the prompt.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The target: a folder or Hub repository. Default: the embedded pair."),
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option(
            help="A converted drafter's folder, or a Hub repository, converted on first use; auto "
            "picks a known one (`mlx-drift pairs`). With the embedded target: eagle3.1 or eagle3."
        ),
    ] = None,
    adapter_path: Annotated[str | None, typer.Option(help="LoRA adapters of the target.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    prefill_response: Annotated[
        str | None, typer.Option(help="How the response is to begin.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Tokens to generate at most; -1: no limit.")
    ] = 256,
    num_draft_tokens: Annotated[int, typer.Option(metavar="K", help="Drafts a round.")] = 3,
    no_draft: Annotated[
        bool, typer.Option("--no-draft", help="Generate with mlx-lm alone.")
    ] = False,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Feed the raw prompt.")
    ] = False,
    chat_template_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="Keywords of the chat template.")
    ] = None,
    extra_eos_token: Annotated[
        list[str] | None, typer.Option(help="A further token that ends the text; repeatable.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead of the text.")
    ] = False,
) -> None:
    """Generate text, greedily and losslessly, through a drafter."""
    question = _read_prompt(text, prompt, prompt_file, model)
    template_keywords = _parse_object(chat_template_config, "--chat-template-config")
    if not no_draft:
        check_num_draft_tokens(num_draft_tokens)
        if model is not None and drafter is None:
            raise DriftError(
                "no drafter given for this model: add --drafter FOLDER, or --drafter auto to "
                "pick a known one, or --no-draft to generate without"
            )
    console, stdout = Console(stderr=True), sys.stdout
    if not no_draft:
        drafter = _choose_drafter(drafter, model, console)
        if existing(drafter) is None:
            find_hub_folder(drafter, None, "drafter")  # a wrong name is told before all the loading
    target, tokenizer = load_model(model or str(TARGET), adapter_path)
    for token in extra_eos_token or []:
        _add_eos_token(tokenizer, token)
    loaded = None if no_draft else load_drafter(str(drafter), target, on_convert=_say_where)
    prompt_tokens = _encode(
        tokenizer,
        question,
        system_prompt,
        prefill_response,
        ignore_chat_template,
        template_keywords,
    )

    said: list[str] = []
    last: DriftResponse | None = None
    interrupted = False
    try:
        # mlx-lm prints its warnings to stdout, which is the answer's alone.
        with redirect_stdout(sys.stderr), _prompt_progress(console) as progress:
            for last in stream_generate(
                target,
                tokenizer,
                prompt_tokens,
                max_tokens,
                drafter=loaded,
                num_draft_tokens=num_draft_tokens,
                prompt_progress_callback=progress,
                compare_plain=loaded is not None,
            ):
                said.append(last.text)
                if not as_json:
                    print(last.text, end="", flush=True, file=stdout)
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        typer.echo(json.dumps(report("".join(said), last, interrupted), ensure_ascii=False))
    else:
        typer.echo()
    if last is not None:
        console.print(table(last, num_draft_tokens, interrupted))
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _choose_drafter(drafter: str | None, model: str | None, console: Console) -> str:
    """Returns the drafter's folder or repository: the embedded one, a known one, or the user's."""
    if model is None:
        chosen = DRAFTERS[0] if drafter in (None, "auto") else drafter
        if chosen not in DRAFTERS:
            raise DriftError(
                f"--drafter {drafter} needs its --model; the embedded target has the drafters "
                f"{' and '.join(DRAFTERS)}"
            )
        return str(DEMO / chosen)
    if drafter != "auto":
        return str(drafter)
    pair, why = find_pair(model, read_json(target_folder(model) / "config.json"))
    needs = f" It needs {pair.needs}." if pair.needs else ""
    console.print(f"drafter: {pair.drafter}, by {why}.{needs}", highlight=False, markup=False)
    return pair.drafter


def _say_where(folder: Path) -> None:
    typer.echo(f"converting the drafter on first use, into {folder}", err=True)


def _read_prompt(
    text: str | None, prompt: str | None, prompt_file: Path | None, model: str | None
) -> str:
    given = [value for value in (text, prompt, prompt_file) if value is not None]
    if len(given) > 1:
        raise typer.BadParameter("give one of PROMPT, --prompt and --prompt-file")
    if not given and model is None:
        return QUESTION
    if not given:
        raise DriftError("no prompt; give it as an argument, with --prompt-file, or - for stdin")
    if prompt_file is not None:
        try:
            content = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DriftError(f"{prompt_file}: cannot be read as text ({error})") from None
    else:
        content = sys.stdin.read() if given == ["-"] else str(given[0])
    if not content.strip():
        raise DriftError("the prompt is empty; give some text")
    return content


def _parse_object(text: str | None, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise DriftError(f"{flag} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DriftError(f"{flag} holds a JSON {type(value).__name__}, expected an object")
    return value


def _encode(
    tokenizer: TokenizerWrapper,
    question: str,
    system_prompt: str | None,
    prefill_response: str | None,
    ignore_chat_template: bool,
    template_keywords: dict[str, Any],
) -> list[int]:
    """Applies the chat template as `mlx_lm.generate` does, and encodes."""
    if ignore_chat_template or not tokenizer.has_chat_template:
        return tokenizer.encode(question)
    messages = [{"role": "user", "content": question}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    if prefill_response is not None:
        messages.append({"role": "assistant", "content": prefill_response})
    keywords = {
        "continue_final_message": prefill_response is not None,
        "add_generation_prompt": prefill_response is None,
    }
    try:
        text = tokenizer.apply_chat_template(
            messages, **keywords | template_keywords | {"tokenize": False}
        )
    except Exception as error:  # a template is a program and raises what it likes
        raise DriftError(f"the tokenizer's chat template refuses the prompt ({error})") from error
    return tokenizer.encode(text, add_special_tokens=False)


def _add_eos_token(tokenizer: TokenizerWrapper, token: str) -> None:
    if token not in tokenizer.get_vocab() and not token.isdecimal():
        raise DriftError(
            f"--extra-eos-token {token}: the tokenizer has no such token; give one of its tokens, "
            "or a token id"
        )
    tokenizer.add_eos_token(token)


@contextmanager
def _prompt_progress(console: Console) -> Iterator[Any]:
    """Yields a callback that shows a bar while the prompt is processed, on a terminal only."""
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("prompt", total=None)

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done == total:  # the first token is there: its text follows
            bar.stop()

    with bar:
        yield update
