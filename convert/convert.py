"""`convert_drafter`: a checkpoint in, a canonical folder out."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_drift.convert.card import model_card
from mlx_drift.convert.conventions import TapConvention, Undecided
from mlx_drift.convert.given import Overrides, Slots
from mlx_drift.convert.mtp.source import read_mtp_checkpoint
from mlx_drift.convert.read.source import Checkpoint, read_checkpoint
from mlx_drift.convert.read.stored import StoredTensor, from_mlx
from mlx_drift.convert.resolved import Resolved, warnings_of
from mlx_drift.convert.target import read_target_shape, shared_with_target
from mlx_drift.convert.understand import drafts_blocks, understand
from mlx_drift.convert.vocabulary import note_padding, read_d2t
from mlx_drift.convert.write import Output, Progress, free_path, write_weights, written_whole
from mlx_drift.drafters.chain_config import MTPConfig
from mlx_drift.drafters.config import check_target
from mlx_drift.drafters.load import (
    WEIGHTS,
    build_network,
    check_tensors,
    load_network,
    needs_float32,
    quantize_linears,
    quantized_layers,
    target_ids,
)
from mlx_drift.drafters.schema import DrafterConfig, Quantization
from mlx_drift.errors import DriftError, printable
from mlx_drift.files.hub import HubFolder, check_upload_repo, upload_folder
from mlx_drift.target.model import TargetShape

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}

Feedback = Literal["pre", "post"]


@dataclass(frozen=True)
class Candidate:
    """The drafter as it would be under one reading of its conventions.

    Attributes:
        config: Its config.
        network: Its weights, shared between the candidates.
        d2t: Target token id of each draft token id, `[D]` int32; None if they are the same.
    """

    config: DrafterConfig
    network: Any
    d2t: mx.array | None


@dataclass(frozen=True)
class Verdict:
    """What a probe says of the conventions: None where it cannot tell.

    Attributes:
        taps: What the checkpoint's tap layers mean.
        feedback: Which state the next chain step gets.
        notes: What the user should know of it, a line each.
        slots: Which position a slot of a block predicts.
    """

    taps: TapConvention | None
    feedback: Feedback | None
    notes: list[str]
    slots: Slots | None = None


Reading = tuple[TapConvention, Feedback | Slots]
"""What a checkpoint may mean: its taps; and the feedback of a chain, or the slots of a block."""

Probe = Callable[[Mapping[Reading, Candidate]], Verdict]
"""Chooses between readings of a checkpoint (`mlx_drift.measure.conventions.ConventionProbe`)."""

OPEN: dict[str, tuple[Any, ...]] = {
    "taps": ("input", "output"),
    "feedback": ("pre", "post"),
    "slots": ("unshifted", "shifted"),
}
"""What a probe may be asked, and the answers."""


@dataclass(frozen=True)
class Conversion:
    """What a checkpoint was converted to.

    Attributes:
        dialect: The name of its dialect.
        config: The config that was written.
        unknown_keys: Config keys that were not recognised.
        notes: What the user should know, a line each.
        url: Where it was uploaded to, if it was.
    """

    dialect: str
    config: DrafterConfig
    unknown_keys: list[str]
    notes: list[str]
    url: str | None = None

    @property
    def warnings(self) -> list[str]:
        """The notes, and the keys that were not recognised."""
        return warnings_of(self.unknown_keys, self.notes)


def convert_drafter(
    source: str | HubFolder,
    mlx_path: str | Path,
    *,
    target: str | TargetShape | None = None,
    mtp: bool = False,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    revision: str | None = None,
    taps: TapConvention | None = None,
    feedback: Feedback | None = None,
    rope_theta: float | None = None,
    window: int | None = None,
    slots: Slots | None = None,
    strict: bool = False,
    probe: Probe | None = None,
    upload_repo: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Converts a drafter checkpoint to a folder that `load_drafter` reads.

    The weights stream through; only a probe loads them whole.

    Args:
        source: A folder, a weights file with `config.json` beside it, a Hub repository as
            `owner/name` or `owner/name/subfolder`, or one that was found already.
        mlx_path: The folder to write; it must not exist.
        target: The target's folder or Hub repository, or its sizes: gives the number of layers
            where the taps depend on it, and is checked against. Of a repository only json is
            fetched; an embedding or head that equals the one of a target on this machine is left
            out.
        mtp: Take the multi-token-prediction head out of a model's checkpoint, or of a sidecar: of
            a repository only the shards that hold some of it are fetched.
        quantize: Quantize the linear layers.
        q_bits: Bits a weight; None for the mode's default.
        q_group_size: Weights that share a scale; None for the mode's default.
        q_mode: mlx's quantization mode: affine, mxfp4, nvfp4 or mxfp8.
        dtype: Cast the floats: float16, bfloat16 or float32; None keeps the source's.
        revision: Branch, tag or commit on the Hub.
        taps: What the checkpoint's tap layers mean, where the rules do not tell or are wrong. Of an
            MTP head, what its first step gets: the `input` of the target's head, after the final
            norm, or the last layer's `output`, before it.
        feedback: Which state the next chain step gets, where the checkpoint's flag is wrong.
        rope_theta: The base of RoPE, where the checkpoint's is wrong.
        window: The sliding window; 0 for none.
        slots: Which position a slot of a block predicts, its own (`unshifted`) or the one after
            (`shifted`), where the checkpoint does not say or is wrong.
        strict: Refuse config keys that are not recognised.
        probe: Settles taps, and feedback or slots, where you do not, by trying them on the target.
        upload_repo: A Hub repository to upload the result to.
        progress: Called with the bytes of weights converted so far, and all of them.

    Returns:
        What the checkpoint was understood as.

    Raises:
        DriftError: If anything is missing, damaged, left over or contradictory. Nothing is
            written then.
    """
    path = free_path(mlx_path)
    if dtype is not None and dtype not in DTYPES:
        raise DriftError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    check_upload_repo(upload_repo)
    if (q_bits, q_group_size, q_mode) != (None, None, "affine") and not quantize:
        raise DriftError("q_bits, q_group_size and q_mode say how to quantize; add --quantize")
    if window is not None and window < 0:
        raise DriftError(f"window is {window}; expected at least 1, or 0 for none")
    shape = read_target_shape(target) if isinstance(target, str) else target
    overrides = Overrides(taps, feedback, rope_theta, window, slots)
    checkpoint = (read_mtp_checkpoint if mtp else read_checkpoint)(source, revision)
    try:  # what is refused is refused before it is fetched
        understand(checkpoint, shape, overrides)
    except Undecided:
        if probe is None:
            raise
    checkpoint = checkpoint.fetched()
    notes: list[str] = []
    if probe is not None:
        overrides, notes = _probe(checkpoint, shape, overrides, probe)
    resolved = understand(checkpoint, shape, overrides)
    if strict and resolved.unknown_keys:
        raise DriftError(
            f"{checkpoint.config_file} has keys that nothing reads: "
            f"{', '.join(resolved.unknown_keys)} (without --strict that is a warning)"
        )
    config, tensors, d2t = _checked(checkpoint, resolved, shape)
    if isinstance(target, str):
        config, tensors = _leave_out_shared(config, tensors, target)
    if quantize:
        config = replace(
            config, quantization=_quantization(config, checkpoint, q_group_size, q_bits, q_mode)
        )
    outputs = _outputs(config, tensors, d2t, None if dtype is None else DTYPES[dtype], quantize)

    with ThreadPoolExecutor(1) as pool, written_whole(path) as folder:
        source_of = pool.submit(checkpoint.source)  # hashes while the weights are written
        bad = write_weights(folder / WEIGHTS, outputs, progress or (lambda done, total: None))
        origin = resolved.origin if "sha256" in resolved.origin else {}
        config = replace(config, source=origin or source_of.result() | resolved.origin)
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        card = model_card(upload_repo or printable(path.name), config)
        (folder / "README.md").write_text(card, encoding="utf-8")
    notes += resolved.notes + [
        f"{name} holds {count} values that are NaN or infinite" for name, count in bad.items()
    ]
    url = None
    if upload_repo is not None:
        try:
            url = upload_folder(path, upload_repo)
        except DriftError as error:
            raise DriftError(f"{error}; the converted drafter is in {path}") from None
    return Conversion(resolved.dialect, config, resolved.unknown_keys, notes, url)


def _checked(
    checkpoint: Checkpoint, resolved: Resolved, shape: TargetShape | None
) -> tuple[DrafterConfig, dict[str, StoredTensor], mx.array | None]:
    """Checks everything that can be wrong; returns the config, the tensors and the offsets."""
    config = resolved.config({})
    if shape is not None:
        check_target(config, shape, checkpoint.weights)
        note_padding(resolved, shape)
    weights = Path(checkpoint.weights)
    d2t = read_d2t(resolved, checkpoint.weights)
    target_ids(config, d2t, weights)
    tensors = {n: t for n, t in resolved.tensors.items() if n not in ("d2t", "t2d")}
    check_tensors(build_network(config, weights), tensors, weights)
    return config, tensors, d2t


def _probe(
    checkpoint: Checkpoint, shape: TargetShape | None, overrides: Overrides, probe: Probe
) -> tuple[Overrides, list[str]]:
    """Lets the probe choose between the readings that the user leaves open."""
    candidates: dict[Reading, Candidate] = {}
    weights: dict[str, mx.array] = {}
    asked = "taps", "slots" if drafts_blocks(checkpoint) else "feedback"
    given = [getattr(overrides, name) for name in asked]
    probed = frozenset(name for name, one in zip(asked, given, strict=True) if one is None)
    readings = ([one] if one else OPEN[name] for name, one in zip(asked, given, strict=True))
    for reading in product(*readings):
        said = dict(zip(asked, reading, strict=True))
        tried = replace(overrides, **said, probed=probed)
        try:
            resolved = understand(checkpoint, shape, tried)
            config, tensors, d2t = _checked(checkpoint, resolved, shape)
        except DriftError:
            # Ids that end at the last layer cannot mean outputs; inputs came first.
            if candidates and said["taps"] == "output":
                continue
            raise
        weights = weights or {name: tensor.whole() for name, tensor in tensors.items()}
        path = Path(checkpoint.weights)
        network = load_network(config, weights, path)
        candidates[reading] = Candidate(config, network, target_ids(config, d2t, path))
    verdict = probe(candidates)
    chosen = {name: getattr(verdict, name) for name in probed if getattr(verdict, name) is not None}
    return replace(overrides, probed=frozenset(chosen), **chosen), verdict.notes


def _leave_out_shared(
    config: DrafterConfig, tensors: dict[str, StoredTensor], target: str
) -> tuple[DrafterConfig, dict[str, StoredTensor]]:
    """Leaves out the embedding and the head where the target has the same ones."""
    candidates = {"embed_tokens.weight": "own_embedding"}
    same_vocabulary = getattr(config, "draft_vocab_size", None) == config.target.vocab_size
    if isinstance(config, MTPConfig) or same_vocabulary:
        candidates["lm_head.weight"] = "own_head"
    if not candidates.keys() & tensors.keys() or config.hidden_size != config.target.hidden_size:
        return config, tensors
    shared = shared_with_target(
        {name: tensors[name] for name in candidates if name in tensors}, target
    )
    changes: dict[str, Any] = {candidates[name]: False for name in shared}
    origin = dict.fromkeys(changes, "rule: equal to the target's")
    config = replace(config, **changes, provenance=config.provenance | origin)
    return config, {name: tensor for name, tensor in tensors.items() if name not in shared}


def _quantization(
    config: DrafterConfig,
    checkpoint: Checkpoint,
    group_size: int | None,
    bits: int | None,
    mode: str,
) -> Quantization:
    """Settles the parameters, and checks that every linear layer can be quantized so."""
    if config.quantization is not None:
        raise DriftError(
            f"{checkpoint.weights} is quantized already; convert the unquantized head instead"
        )
    network = build_network(config, Path(checkpoint.weights))
    try:
        quantize_linears(network, group_size, bits, mode)
    except ValueError as error:
        raise DriftError(f"the drafter cannot be quantized so: {error}") from None
    layer: Any = next(m for m in network.modules() if "scales" in m)
    return Quantization(group_size=layer.group_size, bits=layer.bits, mode=layer.mode)


def _outputs(
    config: DrafterConfig,
    tensors: dict[str, StoredTensor],
    d2t: mx.array | None,
    dtype: mx.Dtype | None,
    quantize: bool,
) -> dict[str, Output]:
    """Says how each tensor is written."""
    network = build_network(config, Path())
    packed = {f"{name}.weight" for name in quantized_layers(network)} if quantize else set()
    outputs = {
        name: Output(
            tensor,
            None if needs_float32(name) else dtype,
            config.quantization if name in packed else None,
        )
        for name, tensor in tensors.items()
    }
    if d2t is not None:
        rows = from_mlx(d2t)
        stored = StoredTensor(d2t.shape, "I64", lambda start, stop: rows[start:stop])
        outputs["d2t"] = Output(stored)
    return outputs
