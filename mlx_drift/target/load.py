"""`load`: mlx-lm's own, which never runs a folder's code unless it is told to.

Of a target that is cut over several ranks each reads its own part alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils

from mlx_drift.errors import DriftError
from mlx_drift.ranks.cut import check_spread, fingerprints, note_stage, shard
from mlx_drift.ranks.world import Ranks


def load(
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, ...]:
    """Loads a target and its tokenizer: `mlx_lm.load`, with one switch for all code.

    A repository may bring code of its own, a tokenizer's (`auto_map`) or a model's (`model_file`).
    Where nothing is said, transformers asks on stdin whether to run a tokenizer's. Here
    `trust_remote_code` says it for both, as mlx-lm's flag `--trust-remote-code` does.

    Args:
        path_or_hf_repo: As in `mlx_lm.load`, like the six that follow.
        tokenizer_config: May say `trust_remote_code` for the tokenizer alone.
        model_config: See `path_or_hf_repo`.
        adapter_path: See `path_or_hf_repo`.
        lazy: See `path_or_hf_repo`.
        return_config: See `path_or_hf_repo`.
        revision: See `path_or_hf_repo`.
        trust_remote_code: Run the code that the repository brings, if it does.

    Returns:
        The model, its tokenizer and, if asked for, the config.

    Raises:
        DriftError: If there is code that is needed and not trusted; told before weights are read.
    """
    with code_on_trust(path_or_hf_repo):
        loaded = mlx_lm.load(
            path_or_hf_repo,
            {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})},
            model_config,
            adapter_path,
            lazy=True,
            return_config=return_config,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    if not lazy:
        mx.eval(loaded[0].parameters())
    return loaded


def load_shard(
    path_or_hf_repo: str, folder: Path, ranks: Ranks, trust_remote_code: bool = False
) -> tuple[Any, ...]:
    """Loads this rank's part of every layer, and the tokenizer. All ranks must call.

    Args:
        path_or_hf_repo: As in `load`.
        folder: Where its small files are.
        ranks: The ranks.
        trust_remote_code: As in `load`.

    Raises:
        DriftError: As `load`; if the ranks have different files; or if the model cannot be cut over
            so many of them. Told before weights are read.
    """
    model, tokenizer = load(path_or_hf_repo, lazy=True, trust_remote_code=trust_remote_code)
    _check_files(folder, ranks)
    shard(model, ranks)
    mx.eval(model.parameters())
    return model, tokenizer


def load_stage(
    path_or_hf_repo: str, folder: Path, ranks: Ranks, trust_remote_code: bool = False
) -> tuple[Any, ...]:
    """Loads this rank's layers of a pipeline, and the tokenizer: `mlx_lm.utils.sharded_load`.

    From the Hub only the files that hold them are fetched. Arguments and errors are those of
    `load_shard`.
    """
    _check_files(folder, ranks)
    with code_on_trust(path_or_hf_repo):
        model, _ = mlx_lm.utils.load_model(
            folder, lazy=True, strict=False, trust_remote_code=trust_remote_code
        )
        layers = check_spread(model, ranks)
        if not (folder / "model.safetensors.index.json").is_file():
            raise DriftError(
                f"{path_or_hf_repo}: --pipeline needs model.safetensors.index.json, which "
                "mlx_lm.convert writes"
            )
        model, tokenizer = mlx_lm.utils.sharded_load(
            path_or_hf_repo,
            pipeline_group=ranks.group,
            tokenizer_config={"trust_remote_code": trust_remote_code},
            trust_remote_code=trust_remote_code,
        )
    note_stage(model, ranks, layers)
    return model, tokenizer


def _check_files(folder: Path, ranks: Ranks) -> None:
    ranks.check_same("the target", fingerprints(folder), "Copy the folder of one to all")


@contextmanager
def code_on_trust(name: str) -> Iterator[None]:
    """Tells in one line that mlx-lm or transformers refused to run a repository's code.

    Raises:
        DriftError: If they did. Both name the switch that is missing, and nothing else of theirs
            tells.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise DriftError(
            f"{name}: it needs code of its own, which would run with all your rights. Read it, and "
            "if you trust it add --trust-remote-code (in Python trust_remote_code=True)"
        ) from None
