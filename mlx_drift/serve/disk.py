"""Caches on disk: what does not fit in memory, and what survives a restart.

An entry is two files: the arrays, as `save_prompt_cache` writes them, and beside them what it is,
with a checksum. The second is written last and renamed into place, so that an entry is whole or
not there, whenever the process is killed. What is damaged is removed and read anew.

Prompts can be read off these files: the folder must belong to the user alone.
"""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from mlx_drift.decode.fingerprint import fingerprint
from mlx_drift.decode.prompt_cache import PromptCache
from mlx_drift.decode.prompt_cache_file import load_prompt_cache, save_prompt_cache
from mlx_drift.errors import DriftError
from mlx_drift.serve.model import LoadedModel
from mlx_drift.serve.store import Tokens, as_tokens, common

log = logging.getLogger(__name__)

ARRAYS, ABOUT = ".safetensors", ".json"
NAME_LENGTH = 32
BLOCK = 1 << 20


@dataclass(eq=False)
class File:
    """An entry.

    Attributes:
        name: Of its files, without their suffixes.
        owner: Tells for which model, drafter and settings it is.
        tokens: The conversation's.
        nbytes: Of its arrays' file.
        sha256: Of the same.
    """

    name: str
    owner: str
    tokens: Tokens
    nbytes: int
    sha256: str


class DiskStore:
    """Keeps caches in a folder.

    Args:
        folder: The folder; made if it is not there.
        bound: Bytes that its files may take.

    Raises:
        DriftError: If the folder cannot be used, others can read it, or another server has it.
    """

    def __init__(self, folder: Path, bound: int):
        self.folder = folder
        self.bound = bound
        self._owners: WeakKeyDictionary[LoadedModel, str] = WeakKeyDictionary()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = folder.stat()
            self._lock = (folder / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DriftError(f"{folder}: another server keeps its caches there") from None
        except OSError as error:
            raise DriftError(f"{folder}: cannot be used for caches ({error.strerror})") from None
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise DriftError(
                f"{folder}: others may look into it, and prompts can be read off caches; "
                "chmod 700, or give another --cache-dir"
            )
        self._files = self._scan()

    def best(self, model: LoadedModel, tokens: Tokens) -> tuple[int, object] | None:
        """Returns how many tokens of a prompt the best file would save, and which it is."""
        owner, saved, best = self._owner(model), 0, None
        for file in self._files:
            shared = common(file.tokens, tokens) if file.owner == owner else 0
            is_whole = shared == file.tokens.size
            if shared > saved and (is_whole or not model.footprint.copies):
                saved, best = shared, file
        return None if best is None else (saved, best)

    def load(self, model: LoadedModel, found: object) -> PromptCache | None:
        """Reads a file; None if it is damaged, and then it is removed."""
        assert isinstance(found, File)
        path = self._path(found, ARRAYS)
        try:
            if _sha256(path) != found.sha256:
                raise DriftError(f"{path} is damaged")
            cache = load_prompt_cache(
                path, model.model, model.drafter, max_snapshots=model.settings.max_snapshots
            )
            os.utime(path)
        except (DriftError, OSError) as error:
            log.warning("%s; it is read anew", error)
            self._remove(found)
            return None
        self._files.remove(found)
        self._files.append(found)  # the last one is the last to go
        return cache

    def save(self, model: LoadedModel, cache: PromptCache) -> None:
        """Writes a file, and removes those that were used least recently past the bound."""
        tokens, owner = as_tokens(cache.tokens), self._owner(model)
        held = [
            f for f in self._files if f.owner == owner and common(f.tokens, tokens) == f.tokens.size
        ]
        if any(file.tokens.size == tokens.size for file in held):
            return
        name = secrets.token_hex(NAME_LENGTH // 2)
        path = self.folder / f"{name}{ARRAYS}"
        try:
            save_prompt_cache(path, cache)
            path.chmod(0o600)
            file = File(name, owner, tokens, path.stat().st_size, _sha256(path))
            about = asdict(file) | {"tokens": tokens.tolist()}
            partial = self.folder / f"{name}{ABOUT}.partial"
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT, 0o600), "w") as stream:
                json.dump(about, stream)
            partial.replace(self._path(file, ABOUT))
        except (DriftError, OSError) as error:
            log.warning("a cache was not written: %s", error)
            self._unlink(name)
            return
        self._files.append(file)
        for shorter in held if not model.footprint.copies else ():
            self._remove(shorter)  # the new one brings it back
        while sum(f.nbytes for f in self._files) > self.bound and self._files:
            self._remove(self._files[0])

    def _scan(self) -> list[File]:
        """Reads what is there, and clears away what a killed process left half written."""
        files = []
        for path in self.folder.glob(f"*{ABOUT}"):
            try:
                about: Any = json.loads(path.read_text())
                file = File(**about | {"tokens": as_tokens(about["tokens"])})
                if (
                    file.name == path.stem
                    and self._path(file, ARRAYS).stat().st_size == file.nbytes
                ):
                    files.append(file)
            except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
                continue
        whole = {file.name for file in files}
        for path in self.folder.iterdir():
            name = path.name.removeprefix(".").partition(".")[0]
            if _is_ours(name) and name not in whole:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        return sorted(files, key=lambda file: self._path(file, ARRAYS).stat().st_mtime)

    def _owner(self, model: LoadedModel) -> str:
        if model not in self._owners:
            s = model.settings
            seen = [
                fingerprint(model.model),
                fingerprint(model.drafter.network),
                list(model.drafter.taps),
                model.drafter_kind,
                [s.kv_bits, s.kv_group_size, s.quantized_kv_start] if s.kv_bits else None,
            ]
            self._owners[model] = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
        return self._owners[model]

    def _path(self, file: File, suffix: str) -> Path:
        return self.folder / f"{file.name}{suffix}"

    def _remove(self, file: File) -> None:
        self._files.remove(file)
        self._unlink(file.name)

    def _unlink(self, name: str) -> None:
        for suffix in (ABOUT, f"{ABOUT}.partial", ARRAYS):  # what says that it is whole goes first
            (self.folder / f"{name}{suffix}").unlink(missing_ok=True)


def _is_ours(name: str) -> bool:
    return len(name) == NAME_LENGTH and all(c in "0123456789abcdef" for c in name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
