"""Where a checkpoint comes from: a folder, a weights file, or a folder of a Hub repository.

Only json and weights are ever looked at, the weights by their headers; nothing in a checkpoint is
executed, and no file outside its folder is opened.
"""

import hashlib
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_drift.convert.read.safetensors_file import read_safetensors_file
from mlx_drift.convert.read.stored import Bytes, ReadAt, StoredTensor, file_reader
from mlx_drift.convert.read.torch_pickle import read_torch_checkpoint
from mlx_drift.errors import DriftError, brief, printable
from mlx_drift.files.hub import HubFolder, find_hub_folder, never_downloaded
from mlx_drift.files.json_file import read_json
from mlx_drift.files.paths import existing, inside

CONFIG = "config.json"
WEIGHTS = {
    ".safetensors": ("model.safetensors", "model.safetensors.index.json"),
    ".bin": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ".pt": ("medusa_lm_head.pt", "hydra_lm_head.pt"),
}
"""Of each kind of file the names to look for; else the only file of the kind."""
MAX_SHARDS = 1000
MAX_TENSORS = 20_000  # Qwen3-30B-A3B, a target of many experts, has 18,867
MAX_INDEX_BYTES = 16 << 20
HASH_BLOCK = 1 << 20


class Folder(Protocol):
    """A folder of files, on this machine or on the Hub."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def origin(self) -> dict[str, str]:
        """`path`, or `repo` and `revision`."""

    @property
    def files(self) -> AbstractSet[str]:
        """The names of the files directly in it."""

    def path(self, name: str) -> Path:
        """Returns where a file is on this machine, fetching it first if need be."""

    def reader(self, name: str) -> tuple[ReadAt, int]:
        """Returns a reader of a file, which need not be here, and the file's size."""

    @property
    def is_partial(self) -> bool:
        """Whether there may be files that are not here and cannot be had now."""

    def subfolder(self, name: str) -> "Folder | None":
        """Returns a folder in it, if there is one of that name."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine."""

    folder: Path
    is_partial = False

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return str(self.folder)

    @property
    def origin(self) -> dict[str, str]:
        """Its last name; the rest of the path is nobody else's business."""
        return {"path": printable(self.folder.resolve().name)}

    @property
    def files(self) -> AbstractSet[str]:
        """The names of the regular files directly in it, links to such included."""
        try:
            return {path.name for path in self.folder.iterdir() if path.is_file()}
        except OSError as error:
            raise DriftError(f"{self.folder}: cannot be read ({error.strerror})") from None

    def path(self, name: str) -> Path:
        """Returns a file's path.

        Raises:
            DriftError: If it is a link that leads out of the folder.
        """
        return inside(self.folder, name)

    def reader(self, name: str) -> tuple[ReadAt, int]:
        """Returns a reader of a file, and its size."""
        path = self.path(name)
        return file_reader(path), path.stat().st_size

    def subfolder(self, name: str) -> "LocalFolder | None":
        """Returns a folder in it, if there is one of that name."""
        try:
            is_there = (self.folder / name).is_dir()
        except (OSError, ValueError):  # a name that no file can have
            is_there = False
        return LocalFolder(inside(self.folder, name)) if is_there else None


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a Hub repository at one commit."""

    hub: HubFolder

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return "/".join([self.hub.repo, *filter(None, [self.hub.subfolder])])

    @property
    def origin(self) -> dict[str, str]:
        """The repository, the subfolder if it is one, and the commit."""
        subfolder = {"subfolder": self.hub.subfolder} if self.hub.subfolder else {}
        return {"repo": self.hub.repo, "revision": self.hub.commit} | subfolder

    @property
    def files(self) -> AbstractSet[str]:
        """The names of the files directly in it."""
        return self.hub.files

    @property
    def is_partial(self) -> bool:
        """Whether the files are those that the local cache has, the Hub being out of reach."""
        return self.hub.is_partial

    def path(self, name: str) -> Path:
        """Downloads a file, unless the cache has it."""
        return self.hub.path(name)

    def reader(self, name: str) -> tuple[ReadAt, int]:
        """Returns a reader that asks the Hub for ranges, and the file's size."""
        read_at = self.hub.read_at(name)

        def read(offset: int, count: int) -> Bytes:
            return np.frombuffer(read_at(offset, count), np.uint8)

        return read, self.hub.size(name)

    def subfolder(self, name: str) -> "RemoteFolder | None":
        """Returns a folder in it, if there is one of that name."""
        folder = self.hub.inner(name)
        return RemoteFolder(folder) if folder.files else None


Wanted = Callable[[str], bool]
"""Tells by its name whether a tensor is of interest."""


@dataclass(frozen=True)
class Checkpoint:
    """A drafter checkpoint whose headers were read, not yet understood.

    Attributes:
        folder: Where its weights are.
        config_file: The config's name, for messages.
        config: The config.
        weights: The name of the weights, for messages.
        weight_files: The files of the weights.
        tensors: The tensors, still in those files.
        wanted: Which tensors of the files they are; None for all.
    """

    folder: Folder
    config_file: str
    config: dict[str, Any]
    weights: str
    weight_files: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    wanted: Wanted | None = None

    def fetched(self) -> "Checkpoint":
        """Returns the checkpoint with its weights on this machine, downloading them if need be."""
        if isinstance(self.folder, LocalFolder):
            return self
        for name in self.weight_files:
            self.folder.path(name)  # from now on the reader finds them in the cache
        _, tensors = read_weights(self.folder, Path(self.weights).name, self.wanted)
        return replace(self, tensors=tensors)

    def source(self) -> dict[str, str]:
        """Returns where it came from, with the SHA-256 of the weights (of all shards in turn)."""
        digest = hashlib.sha256()
        for name in self.weight_files:
            path = self.folder.path(name)
            try:
                with path.open("rb") as file:
                    while block := file.read(HASH_BLOCK):
                        digest.update(block)
            except OSError as error:
                raise DriftError(f"{path}: cannot be read ({error.strerror})") from None
        names = {"file": Path(self.weights).name, "sha256": digest.hexdigest()}
        return self.folder.origin | names


def find_folder(source: str | HubFolder, revision: str | None) -> tuple[Folder, str | None]:
    """Finds the folder of a source, and the weights file if the source names one.

    Args:
        source: A folder, a `.safetensors` or `.bin` file, or `owner/name[/subfolder]` on the Hub,
            or such a folder of a repository found already.
        revision: Branch, tag or commit on the Hub.

    Raises:
        DriftError: If there is no such thing.
    """
    if isinstance(source, HubFolder):
        return RemoteFolder(source), None
    if (path := existing(source)) is not None:
        if path.is_dir():
            return LocalFolder(path), None
        if path.is_file():
            return LocalFolder(path.parent), path.name
        raise DriftError(f"{path}: neither a folder nor a regular file")
    return RemoteFolder(find_hub_folder(source, revision, "drafter checkpoint")), None


def read_checkpoint(source: str | HubFolder, revision: str | None = None) -> Checkpoint:
    """Reads the config and the headers of a checkpoint's weights.

    Safetensors stay on the Hub and are read by ranges, until `Checkpoint.fetched`.

    Args:
        source: As in `find_folder`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        DriftError: If anything is missing or damaged.
    """
    folder, file = find_folder(source, revision)
    return read_folder(folder, file)


def read_folder(folder: Folder, file: str | None = None) -> Checkpoint:
    """Reads a checkpoint from its folder, or the weights file of that name in it."""
    config = read_config_of(folder)
    entry = file or choose_weights(folder)
    files, tensors = read_weights(folder, entry)
    return Checkpoint(
        folder=folder,
        config_file=f"{folder.name}/{CONFIG}",
        config=config,
        weights=f"{folder.name}/{entry}",
        weight_files=files,
        tensors=tensors,
    )


def read_config_of(folder: Folder) -> dict[str, Any]:
    """Reads the config of a checkpoint's folder."""
    files = folder.files
    if CONFIG not in files:
        if folder.is_partial:
            raise never_downloaded(folder.name, f"its {CONFIG} was")
        raise DriftError(f"{folder.name} has no {CONFIG}{_elsewhere(files)}")
    return read_json(folder.path(CONFIG))


def read_weights(
    folder: Folder, entry: str, wanted: Wanted | None = None
) -> tuple[tuple[str, ...], dict[str, StoredTensor]]:
    """Reads the headers of a weights file, or of the shards of an index.

    Args:
        folder: Where they are.
        entry: The file, or the index.
        wanted: Which tensors are of interest: a shard without any is not looked at. None for all.

    Returns:
        The files, and the tensors in them.

    Raises:
        DriftError: If anything is missing or damaged.
    """
    is_index = entry.endswith(".index.json")
    shards = _shards(folder, entry, wanted) if is_index else {entry: None}
    tensors: dict[str, StoredTensor] = {}
    for name, expected in shards.items():
        found = _read_tensors(folder, name)
        if strange := next((tensor for tensor in found if not tensor.isprintable()), None):
            raise DriftError(f"{folder.name}/{name} has a tensor of the name {brief(strange)}")
        for tensor in expected or ():
            if tensor not in found:
                raise DriftError(f"{folder.name}/{entry} names {tensor} in {name}, which lacks it")
        if wanted is not None:
            found = {tensor: stored for tensor, stored in found.items() if wanted(tensor)}
        if twice := sorted(found.keys() & tensors.keys()):
            raise DriftError(f"{folder.name}: two shards of {entry} hold {twice[0]}")
        tensors |= found
        if len(tensors) > MAX_TENSORS:
            raise DriftError(
                f"{folder.name}/{entry} holds {len(tensors)} tensors; that is no drafter"
            )
    return tuple(sorted(shards)), tensors


def choose_weights(folder: Folder) -> str:
    """Chooses the weights: `.bin` and `.pt` only where there is no safetensors, however called."""
    files = folder.files
    for suffix, names in WEIGHTS.items():
        if standard := [name for name in names if name in files]:
            return standard[0]
        found = sorted(name for name in files if name.endswith(suffix))
        if len(found) == 1:
            return found[0]
        if found:
            raise DriftError(
                f"{folder.name} holds several {suffix} files ({', '.join(found[:3])}, …) and no "
                f"index; expected one. Give the file itself"
            )
    if folder.is_partial:
        raise never_downloaded(folder.name, "its weights were")
    raise DriftError(
        f"{folder.name}: holds no weights{_elsewhere(files)}; expected model.safetensors or "
        "pytorch_model.bin"
    )


def _elsewhere(files: AbstractSet[str]) -> str:
    """Says what a folder without a checkpoint is, where that can be told."""
    if any(name.endswith(".gguf") for name in files):
        return " but is GGUF, llama.cpp's format; give the repository it was made from"
    return ""


def _shards(folder: Folder, index: str, wanted: Wanted | None) -> dict[str, list[str]]:
    """Reads a shard index: the names of the tensors of each shard that has any of interest."""
    weight_map = read_json(folder.path(index), MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DriftError(f"{folder.name}/{index} has no weight_map; expected one of all tensors")
    suffix = ".safetensors" if ".safetensors" in index else ".bin"
    files = folder.files
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if wanted is not None and not wanted(tensor):
            continue
        if not isinstance(shard, str) or shard not in files or not shard.endswith(suffix):
            if folder.is_partial and isinstance(shard, str) and shard.endswith(suffix):
                raise never_downloaded(folder.name, f"its shard {brief(shard)} was")
            raise DriftError(
                f"{folder.name}/{index} names the shard {brief(shard)}; expected a {suffix} file "
                "beside it"
            )
        shards.setdefault(shard, []).append(tensor)
    if len(shards) > MAX_SHARDS:
        raise DriftError(f"{folder.name}/{index} names {len(shards)} shards; that is no drafter")
    return shards


def _read_tensors(folder: Folder, name: str) -> dict[str, StoredTensor]:
    where = f"{folder.name}/{name}"
    if name.endswith(".safetensors"):
        return read_safetensors_file(*folder.reader(name), where)
    if name.endswith((".bin", ".pt")):
        return read_torch_checkpoint(folder.path(name))
    if name.endswith(".gguf"):
        raise DriftError(
            f"{where} is GGUF, llama.cpp's format; give the repository it was made from"
        )
    raise DriftError(f"{where}: expected a .safetensors, .bin or .pt file")
