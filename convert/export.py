"""`export_drafter`: a converted drafter in, a PyTorch checkpoint out.

The other way of `convert_drafter`, which reads back what is written here as the very same drafter:
bit for bit, a quantized one as its dequantized values.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_drift.convert.card import export_card
from mlx_drift.convert.formats import Format, check_said, find_format
from mlx_drift.convert.given import Overrides
from mlx_drift.convert.mtp.packed import packed_layers, unpack
from mlx_drift.convert.read.source import read_checkpoint
from mlx_drift.convert.read.stored import StoredTensor, from_mlx
from mlx_drift.convert.understand import understand
from mlx_drift.convert.vocabulary import read_d2t
from mlx_drift.convert.write import Output, Progress, free_path, write_weights, written_whole
from mlx_drift.drafters.chain_config import Eagle3Config, MTPConfig
from mlx_drift.drafters.load import (
    WEIGHTS,
    build_network,
    check_tensors,
    linear_layers,
    target_ids,
)
from mlx_drift.errors import DriftError, brief, printable
from mlx_drift.files.hub import check_upload_repo, upload_folder

Said = Eagle3Config | MTPConfig
"""What formats have words for."""

UNNAMED = "TARGET"
"""What stands for a target whose name nobody knows."""


@dataclass(frozen=True)
class Export:
    """What a drafter was exported to.

    Attributes:
        format: The name of the format.
        config: The config that was written.
        notes: What the user should know, a line each.
        url: Where it was uploaded to, if it was.
    """

    format: str
    config: dict[str, Any]
    notes: list[str]
    url: str | None = None


def export_drafter(
    drafter: str | Path,
    path: str | Path,
    *,
    format: Format,
    target: str | None = None,
    revision: str | None = None,
    upload_repo: str | None = None,
    progress: Progress | None = None,
) -> Export:
    """Writes a converted drafter as a PyTorch checkpoint.

    Args:
        drafter: A folder that `convert_drafter` wrote, or a Hub repository with such a one.
        path: The folder to write; it must not exist.
        format: `specforge` (SpecForge, SGLang, vLLM) or `speculators` (speculators, vLLM; it
            has MTP heads, too).
        target: The name of the target, for the tools of speculators, which load it by what the
            drafter says; None for the one that the drafter names, if it names one.
        revision: Branch, tag or commit on the Hub.
        upload_repo: A Hub repository to upload the result to.
        progress: Called with the bytes of weights written so far, and all of them.

    Raises:
        DriftError: If the drafter is missing, damaged or not converted, or is one that the format
            cannot say. Nothing is written then.
    """
    out = free_path(path, "--path")
    kinds = find_format(format)
    check_upload_repo(upload_repo)
    _check_target(target, format)
    checkpoint = read_checkpoint(str(drafter), revision).fetched()
    if "drafter_type" not in checkpoint.config:
        raise DriftError(
            f"{drafter}: not a converted drafter but a checkpoint already; convert it first "
            "(mlx-drift convert) if it is to be said in another format"
        )
    resolved = understand(checkpoint, None, Overrides())
    config = resolved.config(resolved.origin)
    form = check_said(config, kinds, str(drafter))
    assert isinstance(config, Eagle3Config | MTPConfig)
    weights = Path(checkpoint.weights)
    d2t = read_d2t(resolved, checkpoint.weights)
    target_ids(config, d2t, weights)
    tensors = {name: t for name, t in resolved.tensors.items() if name != "d2t"}
    check_tensors(build_network(config, weights), tensors, weights)
    notes = []
    if config.quantization is not None:
        network = build_network(replace(config, quantization=None), weights)
        packed = packed_layers(tensors, linear_layers(network), checkpoint.weights)
        tensors = unpack(tensors, packed, None)
        notes.append(
            f"the head is quantized to {config.quantization.bits} bits: its dequantized values are "
            "written"
        )
    named = target or config.source.get("target") or UNNAMED
    said = form.config(config, named)
    notes += _notes(config, format, named)

    outputs = {form.name(name): Output(t) for name, t in tensors.items()}
    outputs |= {name: Output(t) for name, t in _vocabulary(config, d2t).items()}
    with written_whole(out) as folder:
        write_weights(
            folder / WEIGHTS, outputs, progress or (lambda done, total: None), file_format="pt"
        )
        text = json.dumps(said, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        card = export_card(upload_repo or printable(out.name), config, form.title, notes)
        (folder / "README.md").write_text(card, encoding="utf-8")
    url = None
    if upload_repo is not None:
        try:
            url = upload_folder(out, upload_repo)
        except DriftError as error:
            raise DriftError(f"{error}; the exported drafter is in {out}") from None
    return Export(format, said, notes, url)


def _check_target(target: str | None, format: str) -> None:
    """Refuses a name that is none, or that nothing would be told."""
    if target is None:
        return
    if format != "speculators":
        raise DriftError(f"--target is for --format speculators; {format} names none: leave it out")
    if not target.strip() or not target.isprintable():
        raise DriftError(f"--target is {brief(target)}; expected the target's name")


def _vocabulary(config: Said, d2t: mx.array | None) -> Mapping[str, StoredTensor]:
    """Makes `d2t`, offsets, and `t2d`, which marks the target's ids that the drafter has."""
    if d2t is None:
        return {}
    offsets = np.array(d2t).astype(np.int64)
    marks = np.zeros(config.target.vocab_size, np.bool_)
    marks[offsets + np.arange(offsets.size)] = True
    return {"d2t": _stored(mx.array(offsets), "I64"), "t2d": _stored(mx.array(marks), "BOOL")}


def _stored(row: mx.array, dtype: str) -> StoredTensor:
    values = from_mlx(row)
    return StoredTensor(row.shape, dtype, lambda start, stop: values[start:stop])


def _notes(config: Said, format: str, target: str) -> list[str]:
    """Says what the tools that read the format must be told, or take from the target."""
    notes = []
    if format == "specforge" and config.feedback == "post":
        notes.append("norm_output: SpecForge runs it from its pull request 879 on")
    if format == "specforge" and config.sliding_window is not None:
        notes.append(
            "SGLang takes the window from its command line: --speculative-draft-sliding-window "
            f"{config.sliding_window}"
        )
    if format == "speculators" and target == UNNAMED:
        notes.append(
            f"the target's name is not known: {UNNAMED} stands for it in config.json "
            "(speculators_config.verifier.name_or_path)"
        )
    shared = [
        what
        for what, own in (("embedding", config.own_embedding), ("head", config.own_head))
        if not own
    ]
    if shared:
        notes.append(
            f"the target lends its {' and '.join(shared)}: nothing in the file; vLLM and SGLang "
            "know that"
        )
    return notes
