"""Puts every question to the code of a real run, and notes what it refuses.

MLX is lazy: what mlx-lm builds from a config has shapes and takes no memory. So caches are made,
rows verified and rolled back, drafts chained, and nothing of it is ever computed. What that code
refuses is what a run would refuse.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.convert.given import Overrides
from mlx_drift.convert.read.source import read_checkpoint
from mlx_drift.convert.resolved import warnings_of
from mlx_drift.convert.target import target_folder
from mlx_drift.convert.understand import understand
from mlx_drift.convert.vocabulary import note_padding, read_d2t
from mlx_drift.doctor.build import (
    build_model,
    check_config,
    find_model,
    named_dtype,
    nbytes_of,
    random_state_kept,
    weights_of,
)
from mlx_drift.doctor.caches import cache_kinds, two_tokens, verified
from mlx_drift.doctor.diagnosis import (
    CacheKind,
    Diagnosis,
    DrafterFacts,
    Family,
    Source,
    Taps,
)
from mlx_drift.doctor.memory import rank_memory, run_memory
from mlx_drift.doctor.ranks import parts
from mlx_drift.drafters.config import check_target, read_config
from mlx_drift.drafters.fold import fold
from mlx_drift.drafters.load import (
    build_drafter,
    build_network,
    cast,
    check_tensors,
    quantize_like_the_head,
    target_ids,
)
from mlx_drift.errors import DriftError, brief
from mlx_drift.files.hub import find_hub_folder
from mlx_drift.files.json_file import read_json
from mlx_drift.files.paths import existing
from mlx_drift.pairs import known_drafter
from mlx_drift.target.caches import KVQuantization, TargetCache
from mlx_drift.target.model import Target

Answer = TypeVar("Answer")

MAX_CHUNKS = 1 << 14
"""Of a prompt. A thousand take a tenth of a second, since caches are fed alone."""

UNASKED = KVQuantization(bits=8)
"""What is tried to tell whether `kv_bits` would be refused, where it is not given."""


def doctor(
    model: str,
    drafter: str | None = None,
    *,
    context: int = 8192,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = KVQuantization.group_size,
    quantized_kv_start: int = KVQuantization.start,
    prefill_step_size: int = 2048,
    trust_remote_code: bool = False,
    ranks: int = 1,
    pipeline: bool = False,
) -> Diagnosis:
    """Tells what a run would be: caches and how they go back, taps, memory, and what is refused.

    No weights are loaded or downloaded (of a drafter the map of its vocabulary is; a drafter in a
    `.bin` file has no header, so from the Hub it is fetched whole).

    Args:
        model: The target's folder or Hub repository, as for `mlx_lm.load`. A folder with nothing
            but a `config.json` will do.
        drafter: As for `load_drafter`, or `auto` for the known one of this target.
        context: Tokens of a conversation to tell the caches' bytes for.
        max_kv_size: As in `stream_generate`, like the three that follow.
        kv_bits: See `max_kv_size`.
        kv_group_size: See `max_kv_size`.
        quantized_kv_start: See `max_kv_size`.
        prefill_step_size: Prompt tokens that are processed at a time.
        trust_remote_code: Build the network by the code that the folder brings, if it needs it.
        ranks: Over how many machines it would run.
        pipeline: Its layers would be spread over them, instead of cut.

    Raises:
        DriftError: If the model is missing or damaged, mlx-lm has none of this config, or a number
            makes no sense. What a run with the drafter or the options would refuse is told in the
            result.

    Warns:
        DriftWarning: If `max_kv_size` changes nothing.
    """
    if context < 1 or prefill_step_size < 1 or context > MAX_CHUNKS * prefill_step_size:
        raise DriftError(
            f"context is {context} and prefill_step_size {prefill_step_size}; expected at least 1, "
            f"and a context of at most {MAX_CHUNKS} steps"
        )
    if ranks < 1 + pipeline:
        raise DriftError(
            f"ranks is {ranks}; expected at least 1, and at least 2 for --pipeline, which spreads "
            "layers over them"
        )
    quantization = None
    if kv_bits is not None:
        quantization = KVQuantization(kv_bits, kv_group_size, quantized_kv_start)
    place = find_model(model)
    config = read_json(place.folder / "config.json")
    check_config(config, place.folder / "config.json")
    with random_state_kept():
        network, loaded = build_model(place, config, trust_remote_code)
        examination = Examination(network, context, prefill_step_size)
        examination.examine_target(max_kv_size, quantization)
        examination.examine_taps()
        if drafter is not None:
            examination.examine_drafter(drafter, model)
        if not place.here and named_dtype(config) is None:
            examination.notes.append("the config names no dtype; bfloat16 is assumed")
        diagnosis = examination.diagnosis(model, config, *weights_of(place, network, loaded))
        if ranks == 1:
            return diagnosis

        def examine(part: nn.Module) -> Examination:
            of_part = Examination(part, context, prefill_step_size)
            of_part.examine_target(max_kv_size, quantization)
            return of_part

        def build() -> nn.Module:
            return build_model(place, config, trust_remote_code)[0]

        try:
            told = [
                rank_memory(rank, weights, examine(part).known_caches(), diagnosis.memory)
                for rank, (part, weights) in enumerate(parts(build, ranks, pipeline))
            ]
        except DriftError as error:
            return replace(diagnosis, refused=[*diagnosis.refused, str(error)])
        return replace(diagnosis, ranks=told)


class Examination:
    """Asks the code of a real run, and notes what it refuses.

    Args:
        network: The model, which nothing was computed of.
        context: Tokens of the conversation.
        step_size: Prompt tokens that are processed at a time.
    """

    def __init__(self, network: nn.Module, context: int, step_size: int):
        self.network = network
        self.context = context
        self.step_size = step_size
        self.target: Target | None = None
        self.empty: TargetCache | None = None  # None as long as no cache that can be fed is known
        self.caches: list[CacheKind] = []
        self.taps: Taps | None = None
        self.drafter: DrafterFacts | None = None
        self.refused: list[str] = []
        self.would_refuse: list[str] = []
        self.notes: list[str] = []

    def examine_target(self, max_kv_size: int | None, quantization: KVQuantization | None) -> None:
        """Makes caches and feeds them; without the options if these are refused."""
        target = self.target = self._ask(lambda: Target(self.network, lazy=True))
        if target is None:
            return
        asked_for = self._feed(
            target, lambda: target.make_cache(max_kv_size=max_kv_size, quantization=quantization)
        )
        given = (max_kv_size, quantization) != (None, None)
        if given and not asked_for and self._feed(target, target.make_cache):
            self.notes.append("caches and memory are told as without the cache's options")
        if quantization is None and self.empty is not None:
            tried = self._try(lambda: target.make_cache(quantization=UNASKED))
            self.would_refuse += [str(tried)] * isinstance(tried, DriftError)

    def _feed(self, target: Target, make_cache: Callable[[], TargetCache]) -> bool:
        """Verifies two rows and takes one back; tells whether that works."""
        empty = self._ask(make_cache)
        fed = None if empty is None else self._ask(lambda: verified(target, empty))
        if empty is None or fed is None:
            return False
        kinds = self._ask(lambda: cache_kinds(fed, empty, self.context, self.step_size))
        if kinds is None:
            return False
        self.empty, self.caches = empty, kinds
        return True

    def examine_taps(self) -> None:
        """Captures all taps at once; single ones where that is refused."""
        if self.target is None or self.empty is None:
            return
        last = self.target.shape.num_layers or 0
        every = [*range(last + 2)]
        if self._refusal(every) is None:
            self.taps = Taps(every, {})
            return
        reasons = {tap: self._refusal([tap]) for tap in sorted({0, 1, last // 2, last, last + 1})}
        refused = {tap: reason for tap, reason in reasons.items() if reason is not None}
        self.taps = Taps([tap for tap in reasons if tap not in refused], refused)
        layers = [refused[tap] for tap in refused if 0 < tap <= last]
        self.would_refuse += layers[:1] + [refused[tap] for tap in refused if tap > last]

    def examine_drafter(self, name: str, model: str) -> None:
        """Binds a drafter to the target, lets it ingest two rows and chain two drafts."""
        if name == "auto":
            found = self._ask(lambda: known_drafter(model, target_folder(model)))
            if found is None:
                return
            name, told = found
            self.notes.append(told)
        self._ask(lambda: check_converted(name))
        target = self.target
        if target is not None:
            self.drafter = self._ask(lambda: self._bind(name, target))

    def diagnosis(
        self, model: str, config: dict[str, Any], weights: int | None, weights_from: Source | None
    ) -> Diagnosis:
        """Assembles the diagnosis; `weights` are the bytes of the target's weights."""
        return Diagnosis(
            model=model,
            context=self.context,
            family=self._family(config),
            caches=self.caches,
            taps=self.taps,
            drafter=self.drafter,
            memory=run_memory(
                weights, weights_from, self.known_caches(), self.drafter, self._tap_nbytes()
            ),
            refused=self.refused,
            would_refuse=[line for line in self.would_refuse if line not in self.refused],
            notes=self.notes,
            ranks=[],
        )

    def known_caches(self) -> list[CacheKind] | None:
        """The target's caches; None if none can be fed."""
        return None if self.empty is None else self.caches

    def _tap_nbytes(self) -> int:
        """Bytes of one tap's states while a prompt is processed."""
        if self.target is None:
            return 0
        rows = min(self.step_size, self.context)
        return rows * self.target.shape.hidden_size * self.target.dtype.size

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        """Puts a question to the code of a real run; None if it refuses, which is noted."""
        answer = self._try(question)
        if not isinstance(answer, DriftError):
            return answer
        self._note(str(answer))
        return None

    def _try(self, question: Callable[[], Answer]) -> Answer | DriftError:
        """Puts a question; returns the answer, or the refusal."""
        try:
            return question()
        except DriftError as error:
            return error
        except Exception as error:  # a model file raises what it likes
            return DriftError(
                f"mlx-lm cannot run the target ({self.network.model_type}): {brief(str(error))}"
            )

    def _note(self, refusal: str) -> None:
        if refusal not in self.refused:
            self.refused.append(refusal)

    def _refusal(self, taps: list[int]) -> str | None:
        """Tells why some taps cannot be captured; None if they can."""
        empty = self.empty
        assert empty is not None
        fed = self._try(lambda: verified(Target(self.network, taps, lazy=True), empty))
        return str(fed) if isinstance(fed, DriftError) else None

    def _bind(self, name: str, target: Target) -> DrafterFacts:
        """Reads a drafter's config and headers, as `load_drafter` and the conversion do.

        Raises:
            DriftError: If it is refused.
        """
        here = existing(name)
        checkpoint = read_checkpoint(name if here else find_hub_folder(name, None, "drafter"))
        weights = Path(checkpoint.weights)
        resolved = understand(checkpoint, target.shape, Overrides())
        config = resolved.config({})
        check_target(config, target.shape, str(here or checkpoint.weights))
        note_padding(resolved, target.shape)
        d2t = target_ids(config, read_d2t(resolved, checkpoint.weights), weights)
        told = warnings_of(resolved.unknown_keys, resolved.notes)
        self.notes += [f"drafter: {line}" for line in told]
        network = build_network(config, weights)
        tensors = {n: t for n, t in resolved.tensors.items() if n not in ("d2t", "t2d")}
        check_tensors(network, tensors, weights)
        cast(network, target.dtype)
        fold(network)
        if config.quantization is None:
            quantize_like_the_head(network, target)

        if self.empty is not None:
            verified(Target(self.network, config.taps, lazy=True), self.empty)
        drafter = build_drafter(config, network, target, d2t)
        fed, empty = drafter.make_cache(), drafter.make_cache()
        taps = mx.zeros((2, len(config.taps), target.shape.hidden_size), target.dtype)
        drafter.ingest(two_tokens(), taps, fed)
        drafter.propose(2, fed)
        return DrafterFacts(
            name=name,
            drafter_type=config.drafter_type,
            taps=[*config.taps],
            feedback=getattr(config, "feedback", None),
            window=getattr(drafter, "window", None),
            sinks=getattr(drafter, "sinks", 0),
            sliding_window=getattr(config, "sliding_window", None),
            draft_vocab_size=getattr(config, "draft_vocab_size", config.target.vocab_size),
            nbytes=nbytes_of(network) + (0 if d2t is None else d2t.nbytes),
            caches=cache_kinds(fed, TargetCache(empty), self.context, self.step_size),
            seed_nbytes=fed.seed_nbytes,
        )

    def _family(self, config: dict[str, Any]) -> Family:
        quantization = config.get("quantization") or config.get("quantization_config")
        if isinstance(quantization, dict):  # without the modules that are quantized otherwise
            quantization = {k: v for k, v in quantization.items() if not isinstance(v, dict | bool)}
        else:
            quantization = None
        family = Family(
            model_type=config["model_type"],
            model_file=type(self.network).__module__.rpartition(".")[2],
            num_layers=None,
            hidden_size=None,
            vocab_size=None,
            dtype=None,
            quantization=quantization,
        )
        if self.target is None:
            return family
        dtype = str(self.target.dtype).rpartition(".")[2]
        return replace(family, **vars(self.target.shape), dtype=dtype)


def check_converted(name: str) -> None:
    """Checks that `load_drafter` takes a drafter on this machine without conversion.

    Raises:
        DriftError: If it is to be converted first.
    """
    if (path := existing(name)) is None:
        return
    if not path.is_dir():
        raise DriftError(
            f"{path} is a file; expected a converted drafter's folder. Convert it first: "
            f"mlx-drift convert {path} --mlx-path OUT"
        )
    read_config(path)
