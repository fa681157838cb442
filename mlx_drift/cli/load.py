"""Loads models for the command line: mlx-lm's own loader, its errors in one line."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console

from mlx_drift.cli import options
from mlx_drift.cli.prompts import LaidOut, encode
from mlx_drift.convert.target import target_folder
from mlx_drift.decode.fingerprint import fingerprint
from mlx_drift.demo import DEMO, DRAFTERS, TARGET
from mlx_drift.drafters.copying import CopyingDrafter
from mlx_drift.drafters.draft_model import DraftModelDrafter
from mlx_drift.drafters.dspark import DSparkDrafter
from mlx_drift.drafters.head import LayersDrafter
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.drafters.shared_tokens import difference, shared_ids
from mlx_drift.errors import DriftError, DriftWarning
from mlx_drift.files.hub import find_hub_folder, never_downloaded, resolve
from mlx_drift.files.lfs import refuse_pointers
from mlx_drift.files.paths import existing
from mlx_drift.files.text import check_text
from mlx_drift.loading import load_drafter
from mlx_drift.pairs import HEADLESS, known_drafter
from mlx_drift.ranks.world import world
from mlx_drift.target.load import load, load_shard, load_stage

PROMPT_LOOKUP = "prompt-lookup"
"""What `--drafter` says for a drafter that is no model at all."""


def load_target(
    model: str | None,
    adapter_path: str | None,
    trust_remote_code: bool = False,
    pipeline: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Loads a target and its tokenizer; of several ranks each loads its own part.

    Args:
        model: A folder or Hub repository; None for the embedded one.
        adapter_path: LoRA adapters.
        trust_remote_code: Run the code that it brings, if it needs its own.
        pipeline: Spread its layers over the ranks, instead of cutting each.

    Raises:
        DriftError: As `load_model`; or if it cannot be cut so.
    """
    ranks = world()
    if ranks.size == 1:
        if pipeline:
            raise DriftError(
                "--pipeline spreads layers over ranks, and there is one; start with mlx.launch -n 2"
            )
        return load_model(model, adapter_path, trust_remote_code)
    if adapter_path is not None:
        raise DriftError("--adapter-path does not go with several ranks; fuse it: mlx_lm fuse")
    folder = resolve(model or str(TARGET), "model", None, ["*.json", "*.jinja", "*.txt"])
    own_part = load_stage if pipeline else load_shard
    return load_model(model, None, trust_remote_code, partial(own_part, folder=folder, ranks=ranks))


def load_model(
    model: str | None,
    adapter_path: str | None,
    trust_remote_code: bool = False,
    how: Callable[..., tuple[Any, ...]] | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Loads a whole model and its tokenizer; the embedded target for None.

    Args:
        model: A folder or Hub repository.
        adapter_path: LoRA adapters.
        trust_remote_code: Run the code that it brings, if it needs its own.
        how: What loads it, instead of `load`.

    Raises:
        DriftError: If there is no such model, mlx-lm cannot load it, or it needs code of its own
            that is not trusted.
    """
    model = model or str(TARGET)
    resolve(model, "model", None, ["config.json"])
    how = how or partial(load, adapter_path=adapter_path)
    path = existing(model)
    for place in (model, adapter_path or ""):
        check_text(place, f"{place}: the path")  # mlx takes no other
    try:
        with redirect_stdout(sys.stderr):  # whatever mlx-lm, or code that is trusted, prints
            model_and_tokenizer = how(
                model if path is None else str(path), trust_remote_code=trust_remote_code
            )
    except DriftError:
        raise
    except Exception as error:  # whatever a damaged folder makes mlx-lm or transformers raise
        folder = resolve(model, "model", None, ["config.json"])
        refuse_pointers(folder)
        if path is None and not any(folder.glob("*.safetensors")):
            raise never_downloaded(model, "its weights were") from None
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise DriftError(f"{model}: mlx-lm cannot load it ({reason})") from error
    network, tokenizer = model_and_tokenizer
    return network, tokenizer


def load_pair(
    model: str | None,
    drafter: str | None,
    adapter_path: str | None,
    console: Console,
    drafter_bits: int | None = None,
    draft_model: str | None = None,
    trust_remote_code: bool = False,
    pipeline: bool = False,
) -> tuple[nn.Module, TokenizerWrapper, Drafter]:
    """Loads a target, its tokenizer and a drafter; the embedded pair for None.

    Raises:
        DriftError: If one of them is missing, damaged, does not fit, or is not the same on all
            ranks.
    """
    target, tokenizer, loaded = _load_pair(
        model,
        drafter,
        partial(load_target, model, adapter_path, trust_remote_code, pipeline),
        console,
        drafter_bits,
        draft_model,
        trust_remote_code,
    )
    _check_same(loaded)
    return target, tokenizer, loaded


def _load_pair(
    model: str | None,
    drafter: str | None,
    load_its_target: Callable[[], tuple[nn.Module, TokenizerWrapper]],
    console: Console,
    drafter_bits: int | None,
    draft_model: str | None,
    trust_remote_code: bool,
) -> tuple[nn.Module, TokenizerWrapper, Drafter]:
    if draft_model is not None or drafter == PROMPT_LOOKUP:
        if draft_model is not None and drafter is not None:
            raise DriftError("--drafter and --draft-model are both given; give one of them")
        if drafter_bits is not None:
            raise DriftError("--drafter-bits is for trained heads; leave it out")
        target, tokenizer = load_its_target()
        if draft_model is None:
            return target, tokenizer, PromptLookupDrafter(target)
        small, its_tokenizer = load_model(draft_model, None, trust_remote_code)
        same = shared_ids(tokenizer, its_tokenizer, draft_model)
        if same is not None:
            told = difference(tokenizer, its_tokenizer, same, draft_model)
            warnings.warn(told, DriftWarning, stacklevel=2)
        return target, tokenizer, DraftModelDrafter(small, target, same)
    if model is not None and drafter is None:
        raise DriftError(
            "no drafter given for this model: add --drafter FOLDER, or --drafter auto to pick a "
            f"known one. {HEADLESS}"
        )
    chosen = choose_drafter(drafter, model, console)
    if existing(chosen) is None:
        find_hub_folder(chosen, None, "drafter")  # a wrong name is told before all the loading
    target, tokenizer = load_its_target()
    loaded = load_drafter(chosen, target, drafter_bits=drafter_bits, on_convert=_say_where)
    return target, tokenizer, loaded


def load_drafters(
    model: str | None,
    drafters: Sequence[str],
    adapter_path: str | None,
    console: Console,
    drafter_bits: int | None = None,
    trust_remote_code: bool = False,
    pipeline: bool = False,
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Drafter]]:
    """Loads a target, its tokenizer and several drafters, by what they are called.

    Args:
        model: The target; None for the embedded one.
        drafters: What `--drafter` said; nothing for its default.
        adapter_path: LoRA adapters of the target.
        console: Told which drafter `auto` is.
        drafter_bits: Bits to quantize the drafters to.
        trust_remote_code: Run the code that the target brings, if it needs its own.
        pipeline: Spread the target's layers over the ranks, instead of cutting each.

    Raises:
        DriftError: If one of them is missing, damaged, does not fit, is given twice, or is not the
            same on all ranks.
    """
    if again := [name for name, count in Counter(drafters).items() if count > 1]:
        raise DriftError(f"--drafter {again[0]} is given more than once")
    chosen = {
        name: name if name == PROMPT_LOOKUP else choose_drafter(name, model, console)
        for name in drafters[1:]
    }
    first = drafters[0] if drafters else None
    target, tokenizer, drafter = load_pair(
        model,
        first,
        adapter_path,
        console,
        drafter_bits,
        trust_remote_code=trust_remote_code,
        pipeline=pipeline,
    )
    loaded = {first or DRAFTERS[0]: drafter}
    for name, source in chosen.items():
        if name == PROMPT_LOOKUP:
            loaded[name] = PromptLookupDrafter(target)
        else:
            loaded[name] = load_drafter(
                source, target, drafter_bits=drafter_bits, on_convert=_say_where
            )
            _check_same(loaded[name])
    return target, tokenizer, loaded


def _check_same(drafter: Drafter) -> None:
    """Checks that all ranks have the same drafter."""
    if world().size > 1:
        weights = {"a digest of its weights": fingerprint(drafter.network)[:12]}
        world().check_same("the drafter", weights, "Copy the folder of one to all")


def windowed(
    drafter: Drafter,
    window: int | None,
    sinks: str | None,
    tokenizer: TokenizerWrapper,
    around: LaidOut,
) -> Drafter:
    """Gives a drafter the window that was asked for, or leaves it as it is.

    Args:
        drafter: The drafter.
        window: Tokens back that it sees; 0 for as many as its config says, None for its default.
        sinks: How many of the first tokens it sees beyond that, or `system` for all up to the
            question.
        tokenizer: The target's.
        around: What the prompt puts around the question.

    Raises:
        DriftError: If `sinks` is neither a number nor `system`, or the drafter has no window.
    """
    if window is None and sinks is None:
        return drafter
    if not isinstance(drafter, LayersDrafter):
        raise DriftError("--drafter-window and --drafter-sinks are for trained heads with layers")
    wanted = drafter.window if window is None else window or None
    if sinks is None:
        return drafter.windowed(wanted, drafter.sinks)
    if sinks == "system":
        return drafter.windowed(wanted, len(encode(tokenizer, around.before_place())))
    count = options.read_whole(sinks)
    if count is None or count < 0:
        raise DriftError(f"--drafter-sinks is {sinks}; expected a number of tokens, or system")
    return drafter.windowed(wanted, count)


def confident(drafter: Drafter, least: float | None) -> Drafter:
    """Lets a drafter stop before doubtful drafts, if that was asked for.

    Raises:
        DriftError: If it has no account of how likely its drafts are.
    """
    if least is None:
        return drafter
    if not isinstance(drafter, DSparkDrafter):
        raise DriftError("--drafter-confidence is for DSpark heads, which tell how sure they are")
    return drafter.confident(least)


def copying(drafter: Drafter, lookup: bool | None, default: bool) -> Drafter:
    """Lets a drafter copy beside its own drafts, if that is wanted.

    Raises:
        DriftError: If it does nothing but copy.
    """
    if isinstance(drafter, PromptLookupDrafter):
        if lookup is not None:
            raise DriftError(
                f"--drafter {PROMPT_LOOKUP} does nothing but copy; leave --lookup and --no-lookup "
                "out"
            )
        return drafter
    return CopyingDrafter(drafter) if (default if lookup is None else lookup) else drafter


def usual_drafter(model: str) -> str:
    """Returns what drafts for a model if nobody says: `auto` where that knows one."""
    try:
        known_drafter(model, target_folder(model))
    except DriftError:
        return PROMPT_LOOKUP
    return "auto"


def choose_drafter(drafter: str | None, model: str | None, console: Console) -> str:
    """Returns the drafter's folder or repository: the embedded one, a known one, or the user's."""
    if model is None:
        chosen = DRAFTERS[0] if drafter in (None, "auto") else drafter
        if chosen not in DRAFTERS:
            raise DriftError(
                f"--drafter {drafter} needs its --model; the embedded target has the drafters "
                f"{', '.join(DRAFTERS)}"
            )
        return str(DEMO / chosen)
    if drafter != "auto":
        return str(drafter)
    found, told = known_drafter(model, target_folder(model))
    console.print(told, highlight=False, markup=False)
    return found


def _say_where(folder: Path) -> None:
    typer.echo(f"converting the drafter on first use, into {folder}", err=True)
