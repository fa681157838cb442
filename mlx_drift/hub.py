"""Turns a folder or a Hub repository into a local folder."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlx_drift.errors import DriftError

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(
    path_or_hf_repo: str, what: str, revision: str | None, allow_patterns: list[str]
) -> Path:
    """Returns the local folder of a model, downloading what is allowed if it is on the Hub.

    Args:
        path_or_hf_repo: A folder, or `organisation/name` on the Hub.
        what: What it is, for the message: "drafter", "model".
        revision: Branch, tag or commit on the Hub.
        allow_patterns: Which files to download; never code.

    Raises:
        DriftError: If it is neither a folder nor a repository that can be had.
    """
    path = Path(path_or_hf_repo).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise DriftError(f"{path} is a file; expected the folder of a {what}")
    if not _REPO.fullmatch(path_or_hf_repo) or path_or_hf_repo.startswith("."):
        raise DriftError(
            f"{path_or_hf_repo}: no such folder. Expected the folder of a {what}, or a Hub "
            "repository as organisation/name"
        )
    try:
        return Path(
            snapshot_download(path_or_hf_repo, revision=revision, allow_patterns=allow_patterns)
        )
    except LocalEntryNotFoundError:
        raise DriftError(
            f"{path_or_hf_repo}: no such folder here, and as a Hub repository it is not in the "
            "local cache and the Hub cannot be reached. Check the path, or go online"
        ) from None
    except RevisionNotFoundError:
        raise DriftError(f"{path_or_hf_repo}: the Hub has no revision {revision!r} of it") from None
    except RepositoryNotFoundError:
        raise DriftError(
            f"{path_or_hf_repo}: no such folder here and no such repository on the Hub, or a "
            "private one: check the name, or log in with `hf auth login`"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DriftError(f"{path_or_hf_repo}: cannot be had from the Hub ({first_line})") from None
