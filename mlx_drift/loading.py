"""`load_drafter`: a converted folder as it is, a Hub repository converted on first use."""

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_drift.convert.convert import convert_drafter
from mlx_drift.drafters.head import HeadDrafter
from mlx_drift.drafters.load import WEIGHTS, load_converted
from mlx_drift.drafters.schema import FORMAT_VERSION
from mlx_drift.errors import DriftError, DriftWarning
from mlx_drift.files.hub import HubFolder, find_hub_folder
from mlx_drift.files.json_file import read_json
from mlx_drift.files.paths import existing
from mlx_drift.target.model import Target, TargetShape

CONVERTER_VERSION = 2
"""Raised when the converter's result changes for the same checkpoint, so that caches start anew."""


def load_drafter(
    path_or_hf_repo: str,
    model: nn.Module,
    *,
    revision: str | None = None,
    drafter_bits: int | None = None,
    on_convert: Callable[[Path], None] | None = None,
    **options: Any,
) -> HeadDrafter:
    """Loads a drafter and binds it to a target.

    A folder must be a converted one. A Hub repository may be of any dialect that `convert_drafter`
    reads: it is converted on first use into `drafter_cache()`, under its commit and the options,
    and reused from then on, also offline.

    Args:
        path_or_hf_repo: A folder that `convert_drafter` wrote, or `owner/name[/subfolder]` on the
            Hub.
        model: The target, as `mlx_lm.load` returns it.
        revision: Branch, tag or commit on the Hub.
        drafter_bits: Quantize the drafter's linear layers to so many bits; None leaves them as they
            are on disk.
        on_convert: Called before a repository is converted, with the folder it is kept in.
        options: Keywords of `convert_drafter` that say how to convert a repository: `mtp, quantize,
            q_bits, q_group_size, q_mode, dtype, taps, feedback, rope_theta, window`.

    Raises:
        DriftError: If the drafter is missing, damaged, not converted, or made for another target.

    Warns:
        DriftWarning: What you should know of a conversion, a line each.
    """
    folder = find_drafter(
        path_or_hf_repo, model, revision=revision, on_convert=on_convert, **options
    )
    return load_converted(folder, model, drafter_bits)


def find_drafter(
    path_or_hf_repo: str,
    model: nn.Module,
    *,
    revision: str | None = None,
    on_convert: Callable[[Path], None] | None = None,
    **options: Any,
) -> Path:
    """Finds the folder of a converted drafter; arguments and errors are those of `load_drafter`."""
    if (path := existing(path_or_hf_repo)) is not None:
        if not path.is_dir():
            raise DriftError(
                f"{path} is a file; expected a converted drafter's folder. Convert it first: "
                f"mlx-drift convert {path} --mlx-path OUT"
            )
        _refuse_options(path_or_hf_repo, "a folder", options)
        return path
    repository = find_hub_folder(path_or_hf_repo, revision, "drafter")
    if _is_converted(repository):
        _refuse_options(path_or_hf_repo, "converted already", options)
        repository.path(WEIGHTS)
        return repository.path("config.json").parent
    return convert_once(repository, Target(model).shape, options, on_convert)


def _refuse_options(name: str, what: str, options: dict[str, Any]) -> None:
    if options:
        raise DriftError(
            f"{name} is {what}, so {sorted(options)[0]} has nothing to say: options are for "
            "repositories that are converted on first use"
        )


def _is_converted(repository: HubFolder) -> bool:
    if not {"config.json", WEIGHTS} <= repository.files:
        return False
    return "drafter_type" in read_json(repository.path("config.json"))


def cache_home() -> Path:
    """Returns where mlx-drift keeps what it made.

    `MLX_DRIFT_CACHE` if it is set, else `mlx-drift` in `XDG_CACHE_HOME` or `~/.cache`.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("MLX_DRIFT_CACHE") or f"{home}/mlx-drift").expanduser()


def drafter_cache() -> Path:
    """Returns where drafters converted on first use are kept."""
    return cache_home() / "drafters"


def convert_once(
    repository: HubFolder,
    shape: TargetShape,
    options: dict[str, Any],
    on_convert: Callable[[Path], None] | None = None,
) -> Path:
    """Converts a repository at its commit, unless the cache has the result.

    Args:
        repository: The repository at its commit.
        shape: The target's sizes.
        options: Keywords of `convert_drafter`.
        on_convert: Called before the conversion, with the folder.

    Returns:
        The converted folder. Of several processes at once one converts, the others wait for it.
    """
    said = [CONVERTER_VERSION, FORMAT_VERSION, repository.subfolder, vars(shape), options]
    key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]
    home = drafter_cache() / repository.repo.replace("/", "--")
    folder = home / f"{repository.commit}-{key}"
    if folder.is_dir():  # it was renamed into its place, so it is whole
        return folder
    with _locked(home, folder.name):
        if not folder.is_dir():
            for left in home.glob(f".{folder.name}.*/"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            if on_convert is not None:
                on_convert(folder)
            conversion = convert_drafter(repository, folder, target=shape, **options)
            for warning in conversion.warnings:
                warnings.warn(warning, DriftWarning, stacklevel=3)
    return folder


@contextmanager
def _locked(home: Path, name: str) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    with ExitStack() as stack:
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((home / f".{name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise DriftError(
                f"{home}: cannot be written ({error.strerror}); MLX_DRIFT_CACHE may name another "
                "place"
            ) from None
        yield
