"""Turns a folder or a Hub repository into local files, and a local folder into a repository.

Everything goes through huggingface_hub, so that its cache, `HF_ENDPOINT`, `HF_HUB_OFFLINE`,
`HF_TOKEN` and `HF_HOME` are honoured. Code is never downloaded.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it exports lazily
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    httpx,
    validate_repo_id,
)

from mlx_drift.errors import DriftError
from mlx_drift.files.hub_errors import one_line
from mlx_drift.files.paths import existing

ReadAt = Callable[[int, int], bytes]
"""Reads so many bytes from an offset of a file; fewer only at its end."""

_PART = re.compile(r"\w[\w.+-]*", re.ASCII)  # of a path on the Hub: no `..`, nothing hidden
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


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
    if (path := existing(path_or_hf_repo)) is not None:
        if path.is_dir():
            return path
        raise DriftError(f"{path} is a file; expected the folder of a {what}")
    if not is_repository(path_or_hf_repo):
        raise DriftError(
            f"{path_or_hf_repo}: no such folder. Expected the folder of a {what}, or a Hub "
            "repository as organisation/name"
        )
    with one_line(path_or_hf_repo, path_or_hf_repo, revision):
        return Path(
            snapshot_download(path_or_hf_repo, revision=revision, allow_patterns=allow_patterns)
        )


def is_repository(text: str) -> bool:
    """Tells whether a text can name a repository, `owner/name`."""
    return split_repository(text) == (text, "")


def check_upload_repo(repo: str | None) -> None:
    """Checks the name of a repository to upload to, before there is anything to upload.

    Raises:
        DriftError: If it is none.
    """
    if repo is not None and not is_repository(repo):
        raise DriftError(f"{repo}: expected a Hub repository as owner/name to upload to")


def split_repository(text: str) -> tuple[str, str] | None:
    """Splits `owner/name` or `owner/name/sub/folder` into repository and subfolder ("" if none).

    Returns None if the text cannot name either: empty, hidden or parent parts, odd characters.
    """
    parts = text.split("/")
    if len(parts) < 2 or not _is_path(text):
        return None
    repo, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return None
    return repo, subfolder


def _is_path(text: str) -> bool:
    """Tells whether a text may be a path on the Hub."""
    return all(_PART.fullmatch(part) for part in text.split("/"))


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository on the Hub, at one commit.

    Attributes:
        repo: The repository, `owner/name`.
        subfolder: The folder in it; "" is its root.
        commit: The commit, 40 hexadecimal digits; everything is read at this one.
        files: The names of the files directly in the folder, code aside.
        revision: The branch, tag or commit that was asked for.
        is_partial: The Hub could not be asked: those are the files that the local cache has, and
            there may be more.
    """

    repo: str
    subfolder: str
    commit: str
    files: frozenset[str]
    revision: str
    is_partial: bool = False

    def path(self, name: str) -> Path:
        """Returns a file of the folder in the local cache, downloading it if it is not there.

        Raises:
            DriftError: If there is no such file or it cannot be had.
        """
        with self._one_line(name):
            path = hf_hub_download(self.repo, self._in_repo(name), revision=self.commit)
            _remember(self.repo, self.revision, self.commit)
            return Path(path)

    def inner(self, name: str) -> "HubFolder":
        """Returns a folder in this one, at the same commit; it may have no files.

        Raises:
            DriftError: If the Hub does not tell.
        """
        subfolder = f"{self.subfolder}/{name}".lstrip("/")
        if not _is_path(name):  # a checkpoint's config may name anything
            return replace(self, subfolder=subfolder, files=frozenset())
        if self.is_partial:
            _, files = _cached_listing(self.repo, subfolder, self.commit) or ("", frozenset())
            return replace(self, subfolder=subfolder, files=files)
        with one_line(f"{self.repo}/{subfolder}", self.repo, self.commit):
            _, files, is_partial = _listing(self.repo, subfolder, self.commit)
        return replace(self, subfolder=subfolder, files=files, is_partial=is_partial)

    def size(self, name: str) -> int:
        """Returns how many bytes a file of the folder has, without downloading it.

        Raises:
            DriftError: If there is no such file or the Hub cannot tell.
        """
        with self._one_line(name):
            if (path := self._cached(name)) is not None:
                return path.stat().st_size
            size = get_hf_file_metadata(self._url(name)).size
            if size is None:
                raise ValueError("it does not tell the file's size")
            return size

    def read_at(self, name: str) -> ReadAt:
        """Returns a function that reads bytes of a file at an offset.

        It reads from the local cache if the file is there, and otherwise asks the Hub for just
        those bytes and stores nothing. It raises DriftError if they cannot be had.

        Raises:
            DriftError: If there is no such file.
        """
        path = self._cached(name)
        source = partial(_read_range, self._url(name)) if path is None else partial(_read, path)

        def read(offset: int, count: int) -> bytes:
            with self._one_line(name):
                return source(offset, count)

        return read

    def _in_repo(self, name: str) -> str:
        """Returns the path in the repository; only names of the listing are ever asked for."""
        path = f"{self.subfolder}/{name}".lstrip("/")
        if name not in self.files:
            raise DriftError(f"{self.repo}/{path}: no such file at commit {self.commit}")
        return path

    def _url(self, name: str) -> str:
        return hf_hub_url(self.repo, self._in_repo(name), revision=self.commit)

    def _cached(self, name: str) -> Path | None:
        found = try_to_load_from_cache(self.repo, self._in_repo(name), revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    @contextmanager
    def _one_line(self, name: str) -> Iterator[None]:
        with one_line(f"{self.repo}/{self._in_repo(name)}", self.repo, self.commit):
            yield


def find_hub_folder(text: str, revision: str | None, what: str) -> HubFolder:
    """Finds a folder of a repository on the Hub and pins the commit it is at.

    That takes one request. Offline, or if the Hub cannot be reached, the folder is as much of it
    as the local cache holds of that revision.

    Args:
        text: `owner/name`, or `owner/name/sub/folder`.
        revision: Branch, tag or commit; by default the main branch.
        what: What it is, for the message: "drafter".

    Raises:
        DriftError: If it is no repository, folder or revision that can be had.
    """
    parts = split_repository(text)
    if parts is None:
        raise DriftError(
            f"{text}: no such folder. Expected the folder of a {what}, or one on the Hub as "
            "organisation/name or organisation/name/subfolder"
        )
    repo, subfolder = parts
    revision = revision or constants.DEFAULT_REVISION
    with one_line(text, repo, revision):
        commit, files, is_partial = _listing(repo, subfolder, revision)
    if subfolder and not files:
        raise DriftError(f"{text}: {repo} has no files in a folder {subfolder} at commit {commit}")
    return HubFolder(repo, subfolder, commit, files, revision, is_partial)


def dataset_file(repo: str, path: str, revision: str | None, most_bytes: int) -> Path:
    """Returns a file of a data set on the Hub in the local cache, downloading it if need be.

    Args:
        repo: The data set, `owner/name`.
        path: The file in it.
        revision: Branch, tag or commit; by default the main branch.
        most_bytes: A larger file is not downloaded.

    Raises:
        DriftError: If there is no such file, it is too large, or it cannot be had.
    """
    subject = f"{repo}:{path}"
    if not is_repository(repo) or not _is_path(path):
        raise DriftError(f"{subject}: expected a file of a data set, owner/name:path")
    with one_line(subject, repo, revision):
        try:
            url = hf_hub_url(repo, path, repo_type="dataset", revision=revision)
            size = get_hf_file_metadata(url).size
        except (httpx.TransportError, OfflineModeIsEnabled):
            size = None  # what the cache has of it is used, or the download says why not
        if size is not None and size > most_bytes:
            raise DriftError(f"{subject}: {size} bytes; at most {most_bytes} are downloaded")
        return Path(hf_hub_download(repo, path, repo_type="dataset", revision=revision))


def upload_folder(folder: Path, repo: str) -> str:
    """Uploads the files of a folder to a repository on the Hub, which is created if need be.

    Args:
        folder: The local folder.
        repo: `owner/name`.

    Returns:
        The address of the repository.

    Raises:
        DriftError: If the name is none or the Hub does not take it.
    """
    check_upload_repo(repo)
    api = HfApi()
    with one_line(repo, repo, access="write"):
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with mlx-drift")
    return f"{api.endpoint}/{repo}"


def never_downloaded(name: str, what: str) -> DriftError:
    """Says that a file of a repository is not in the cache, and cannot be had now."""
    return DriftError(
        f"{name}: {what} never downloaded, and the Hub cannot be asked for it now (it is not "
        "reached, or HF_HUB_OFFLINE is set): run this once online, or `hf download` it there"
    )


def _listing(repo: str, subfolder: str, revision: str) -> tuple[str, frozenset[str], bool]:
    """Returns the commit of a revision and the names of a folder's files, if need be as cached.

    The last value tells whether it is as cached.
    """
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (httpx.TransportError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        cached = None if answered else _cached_listing(repo, subfolder, revision)
        if cached is None:
            raise
        return *cached, True
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ValueError("it does not name the commit")
    return str(info.sha), _names((f.rfilename for f in info.siblings or ()), subfolder), False


def _cached_listing(repo: str, subfolder: str, revision: str) -> tuple[str, frozenset[str]] | None:
    """Returns the same as far as the cache has it, or None if it has nothing of the folder."""
    cache = _cache(repo)
    with suppress(OSError):
        commit = revision
        if not _COMMIT.fullmatch(revision):
            commit = (cache / "refs" / revision).read_text().strip()
        if _COMMIT.fullmatch(commit):
            snapshot = cache / "snapshots" / commit
            paths = (path for path in snapshot.rglob("*") if path.is_file())
            files = _names((path.relative_to(snapshot).as_posix() for path in paths), subfolder)
            return (commit, files) if files else None
    return None


def _remember(repo: str, revision: str, commit: str) -> None:
    """Notes in the cache what a branch or tag stands for, so that it is found offline.

    huggingface_hub does it only for downloads by that name, and these are by commit.
    """
    ref = _cache(repo) / "refs" / revision
    if revision == commit:
        return
    with suppress(OSError):  # a cache that cannot be written to may still be read
        ref.parent.mkdir(parents=True, exist_ok=True)
        unfinished = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        unfinished.write_text(commit)
        unfinished.replace(ref)  # another process sees all of it or nothing


def _cache(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _names(paths: Iterable[str], subfolder: str) -> frozenset[str]:
    """Picks the files directly in a subfolder; what is odd, or code, is left out.

    The paths are whatever the server sent.
    """
    prefix = f"{subfolder}/" if subfolder else ""
    names = (path.removeprefix(prefix) for path in paths if path.startswith(prefix))
    return frozenset(
        name
        for name in names
        if name.isprintable()
        and not re.search(r"[/\\]", name)
        and name not in ("", ".", "..")
        and not name.lower().endswith(".py")
    )


def _read(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def _read_range(url: str, offset: int, count: int) -> bytes:
    """Asks for bytes of a file by HTTP and takes exactly those, whatever the server sends."""
    if count < 1:
        return b""
    headers = build_hf_headers() | {
        "Range": f"bytes={offset}-{offset + count - 1}",
        "Accept-Encoding": "identity",  # or the range is one of the compressed file
    }
    data = bytearray()
    # Redirects to another host are followed without the token: httpx takes it off.
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
    ) as response:
        if response.status_code == 416:
            return b""  # it starts at the end or after it
        hf_raise_for_status(response)
        sent = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or not sent:
            raise ValueError("it does not send parts of files")
        first, total = map(int, sent.groups())
        expected = min(count, total - offset)
        for piece in response.iter_raw():
            data += piece
            if len(data) > expected:
                break
    if first != offset or len(data) != expected:
        raise ValueError("it did not send the bytes that were asked for")
    return bytes(data)
