"""`inspect_drafter`: what a checkpoint is and whether it fits a target, from headers alone.

Of tensor data only `d2t`, `t2d` and an MTP head's gains are read; a repository's safetensors stay
on the Hub.
"""

import filecmp
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_drift.convert.conventions import TapConvention
from mlx_drift.convert.given import Overrides, Slots
from mlx_drift.convert.mtp.source import read_mtp_checkpoint
from mlx_drift.convert.read.source import Checkpoint, read_checkpoint
from mlx_drift.convert.resolved import Resolved, warnings_of
from mlx_drift.convert.target import read_target_shape, target_folder
from mlx_drift.convert.understand import understand
from mlx_drift.convert.vocabulary import marked_ids, read_d2t
from mlx_drift.drafters.config import pads
from mlx_drift.drafters.load import build_network, check_tensors
from mlx_drift.errors import DriftError
from mlx_drift.files.json_file import read_json
from mlx_drift.target.model import TargetShape

TOKENIZER = "tokenizer.json"
MAX_TOKENIZER_BYTES = 20 << 20  # Llama 3's has 17


@dataclass(frozen=True)
class Check:
    """One fact that must hold: None where it cannot be told."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        dialect: The name of its dialect.
        weights: Where its weights are.
        parameters: Elements of all tensors but `d2t` and `t2d`.
        size: Bytes of all tensors in the file.
        tensors: Canonical name, shape and dtype of each tensor.
        values: The fields of its config; `taps` is missing while it is undecided.
        provenance: Where each value came from.
        unknown_keys: Config keys that were not recognised.
        notes: What the user should know, a line each.
        checks: What holds and what does not.
    """

    dialect: str
    weights: str
    parameters: int
    size: int
    tensors: list[tuple[str, tuple[int, ...], str]]
    values: dict[str, Any]
    provenance: dict[str, str]
    unknown_keys: list[str]
    notes: list[str]
    checks: list[Check]

    @property
    def warnings(self) -> list[str]:
        """The notes, and the keys that were not recognised."""
        return warnings_of(self.unknown_keys, self.notes)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Returns it for `--json`."""
        return vars(self) | {
            "passed": self.passed,
            "checks": [vars(check) for check in self.checks],
        }


def inspect_drafter(
    source: str,
    target: str | None = None,
    *,
    mtp: bool = False,
    revision: str | None = None,
    taps: TapConvention | None = None,
    feedback: Literal["pre", "post"] | None = None,
    rope_theta: float | None = None,
    window: int | None = None,
    slots: Slots | None = None,
) -> Inspection:
    """Tells what a drafter checkpoint is, and whether it fits a target.

    Args:
        source: As in `convert_drafter`; of a Hub repository only json, the headers and the maps
            of the draft vocabulary are fetched (a `.bin` file has no header and is fetched whole).
        target: The target's folder or Hub repository; only its json files are read.
        mtp: Look for the multi-token-prediction head of a model, as in `convert_drafter`.
        revision: Branch, tag or commit on the Hub.
        taps: These five override conventions as in `convert_drafter`.
        feedback: See `taps`.
        rope_theta: See `taps`.
        window: See `taps`.
        slots: See `taps`.

    Raises:
        DriftError: If it is no drafter that mlx-drift knows, or it cannot be read.
    """
    shape = read_target_shape(target) if target is not None else None
    checkpoint = (read_mtp_checkpoint if mtp else read_checkpoint)(source, revision)
    overrides = Overrides(taps, feedback, rope_theta, window, slots)
    resolved = understand(checkpoint, shape, overrides)
    unsaid = shape and replace(shape, num_layers=None)
    stated = understand(checkpoint, unsaid, overrides).fields["target"]
    tensors = resolved.tensors
    return Inspection(
        dialect=resolved.dialect,
        weights=checkpoint.weights,
        parameters=sum(t.size for name, t in tensors.items() if name not in ("d2t", "t2d")),
        size=sum(t.nbytes for t in tensors.values()),
        tensors=[(name, t.shape, t.stored) for name, t in sorted(tensors.items())],
        values={k: v for k, v in resolved.fields.items() if k not in ("source", "provenance")},
        provenance=resolved.provenance,
        unknown_keys=resolved.unknown_keys,
        notes=resolved.notes,
        checks=_checks(checkpoint, resolved, stated, shape, target),
    )


def _checks(
    checkpoint: Checkpoint,
    resolved: Resolved,
    made_for: dict[str, Any],
    shape: TargetShape | None,
    target: str | None,
) -> list[Check]:
    """Checks the checkpoint, and the target sizes that it states itself against the target's."""
    checks = [_check_conventions(checkpoint, resolved)]
    vocab = made_for["vocab_size"]
    if "d2t" in resolved.tensors or resolved.fields.get("draft_vocab_size", vocab) != vocab:
        checks.append(_check_vocabulary(checkpoint, resolved))
    if shape is None or target is None:
        return checks
    taps = resolved.fields.get("taps")
    for key, what in (
        ("hidden_size", "hidden size"),
        ("vocab_size", "vocabulary"),
        ("num_layers", "layers"),
    ):
        ours, theirs = made_for[key], getattr(shape, key)
        if ours is not None:
            detail, fits = f"made for {ours}, the target has {theirs}", ours == theirs
            if key == "vocab_size" and pads(ours, theirs):
                detail, fits = f"{detail}: the others are taken for padding", True
            checks.append(Check(what, fits, detail))
    if taps and shape.num_layers is not None:
        last = shape.num_layers + 1
        detail = f"taps {list(taps)}; the target's last is {last}, its final norm"
        checks.append(Check("taps", taps[-1] <= last, detail))
    return [*checks, _check_tokenizer(checkpoint, target)]


def _check_conventions(checkpoint: Checkpoint, resolved: Resolved) -> Check:
    """Checks that a config can be made, and that it asks for just the tensors that are there."""
    weights = Path(checkpoint.weights)
    try:
        config = resolved.config({})
        tensors = {n: t for n, t in resolved.tensors.items() if n not in ("d2t", "t2d")}
        check_tensors(build_network(config, weights), tensors, weights)
    except DriftError as error:
        return Check("conventions and tensors", False, str(error))
    return Check("conventions and tensors", True, "every tensor has its place")


def _check_vocabulary(checkpoint: Checkpoint, resolved: Resolved) -> Check:
    """Checks the map of the draft vocabulary."""
    vocab = resolved.fields["target"]["vocab_size"]
    rows = resolved.fields.get("draft_vocab_size", vocab)
    try:
        d2t = read_d2t(resolved, checkpoint.weights)
    except DriftError as error:
        return Check("d2t", False, str(error))
    if d2t is not None:
        is_marked = marked_ids(resolved.tensors, checkpoint.weights) is not None
        against = "agrees with t2d" if is_marked else "there is no t2d"
        return Check("d2t", True, f"{rows} distinct ids within {vocab}; {against}")
    if rows == vocab or pads(rows, vocab):
        return Check("d2t", True, f"none is needed: every id is the target's, {rows} of {vocab}")
    return Check("d2t", False, "the drafter's vocabulary is smaller, but there is no d2t")


def _check_tokenizer(checkpoint: Checkpoint, target: str) -> Check:
    """Compares the vocabularies where both sides have a tokenizer."""
    theirs = target_folder(target) / TOKENIZER
    if TOKENIZER not in checkpoint.folder.files or not theirs.is_file():
        return Check("tokenizer", None, f"not both sides have a {TOKENIZER}")
    ours = checkpoint.folder.path(TOKENIZER)
    try:
        same = filecmp.cmp(ours, theirs, shallow=False) or _vocabulary(ours) == _vocabulary(theirs)
    except DriftError as error:
        return Check("tokenizer", None, str(error))
    return Check("tokenizer", same, "the same tokens" if same else "the tokens differ")


def _vocabulary(path: Path) -> list[Any]:
    """The tokens of a `tokenizer.json`, with their ids."""
    tokenizer = read_json(path, MAX_TOKENIZER_BYTES)
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    tokens = [
        (token.get("id"), token.get("content"))
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict)
    ]
    return [model.get("vocab") if isinstance(model, dict) else None, tokens]
