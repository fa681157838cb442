"""Attention drift, measured: what a drafter's chain becomes from step to step (paper §3, §4).

Notable:
- It is measured on *free-running* rounds, the real loop: greedy rounds of K drafts, the drafter
  fed its own tokens and states. The *teacher-forced* chain of training, over the same committed
  text, is the second column: what the drafter was trained on, and what training never sees.
- Only rounds that draft all K tokens count, so that every step is measured on the same rounds: the
  last ones before `max_tokens` draft less. Acceptance is that of all rounds.
- What the figures mean, and which keys are sink, prompt, answer, recent and drafts, is said in
  `mlx_drift.watch.sums`; interventions are in `mlx_drift.measure.inside.intervene`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.head import HeadDrafter
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS, Drafter
from mlx_drift.errors import DriftError, DriftWarning
from mlx_drift.generate import stream_generate
from mlx_drift.measure.bootstrap import Interval, ratio, ratio_of_ratios
from mlx_drift.measure.inside.figures import Attention, Figures, Head, figures_of
from mlx_drift.measure.inside.intervene import Intervention, intervention
from mlx_drift.measure.inside.still import Still, watch
from mlx_drift.target.model import Target
from mlx_drift.watch.observe import Chain, Observed
from mlx_drift.watch.sums import Split, Sums, add_up

STEPS = 8
"""The paper's chain depth (§3)."""

RECENT = 4
"""About as many tokens as a round commits."""

MAP_ROWS = 16
"""Committed rows in the map of a round."""


@dataclass(frozen=True)
class Map:
    """Attention of one round, query × key: the last committed rows, then those of the chain.

    Attributes:
        weights: Means over heads, `[queries, keys]`; 0 where a key is not seen.
        edges: Where each of `CLASSES` begins.
    """

    weights: npt.NDArray[np.float32]
    edges: list[int]


@dataclass(frozen=True)
class Arm:
    """One drafter, unchanged or under one intervention.

    Attributes:
        drafter: Its name.
        intervention: What was done to it; None for nothing.
        acceptance_length: Accepted drafts a round, without the target's own token.
        of_baseline: That over the drafter's own without intervention; None without one, or if that
            is 0.
        free_running: The figures of the rounds.
        teacher_forced: Those of the teacher-forced chain; None if it was left out, or no answer is
            long enough for it.
        map: One round's: the first of the first prompt that has a whole one.
    """

    drafter: str
    intervention: str | None
    acceptance_length: Interval
    of_baseline: Interval | None
    free_running: Figures
    teacher_forced: Figures | None
    map: Map

    @property
    def name(self) -> str:
        """The drafter's, with the intervention."""
        return self.drafter if self.intervention is None else f"{self.drafter}, {self.intervention}"


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        steps: Chain steps, K: drafts a round.
        max_tokens: Tokens to generate for each prompt, at most.
        recent: How many of the last committed rows are a class of their own.
        sinks: How many of the first rows are the sink: 1 where it is the first token, as Llama's;
            2 where it is the second, as Qwen's (paper §3).
        teacher_forced: Measure the teacher-forced chain too. Its attention is one matrix over a
            whole text, so a long one takes much memory. It knows the window of the drafter's
            config, not that of `ChainDrafter.windowed`.
        seed: Makes noise reproducible.

    Raises:
        DriftError: If a number makes no sense.
    """

    steps: int = STEPS
    max_tokens: int = 64
    recent: int = RECENT
    sinks: int = 1
    teacher_forced: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if not 2 <= self.steps <= MAX_DRAFT_TOKENS:
            raise DriftError(f"steps is {self.steps}; expected 2 to {MAX_DRAFT_TOKENS}")
        if self.max_tokens <= self.steps:
            raise DriftError(
                f"max_tokens is {self.max_tokens}: a round of {self.steps} drafts needs at least "
                f"{self.steps + 1}"
            )
        if self.recent < 0 or self.sinks < 0:
            raise DriftError(
                f"recent is {self.recent} and sinks is {self.sinks}; expected at least 0"
            )


@dataclass(frozen=True)
class Drift:
    """The results: each drafter unchanged, then under each intervention.

    Attributes:
        arms: Drafters and interventions.
        settings: What was measured.
        prompts: On how many prompts.
        dtype: The target's activations.
        still: Drafters that recycle no state, so that nothing of theirs drifts.
    """

    arms: tuple[Arm, ...]
    settings: Settings
    prompts: int
    dtype: str
    still: tuple[Still, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`, without the maps.

        Intervals are `[value, low, high]`; of a single prompt there are no bounds.
        """
        return {
            **vars(self.settings),
            "prompts": self.prompts,
            "dtype": self.dtype,
            "arms": [_plain(arm, self.prompts > 1) for arm in self.arms],
            "recycle_nothing": [_plain(one, self.prompts > 1) for one in self.still],
        }


@dataclass(frozen=True)
class _Answer:
    """What was seen while one prompt was answered."""

    free_running: Sums | None
    teacher_forced: Sums | None
    accepted: int
    rounds: int
    map: Map | None


def drift(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    drafters: Mapping[str, Drafter],
    prompts: Sequence[list[int]],
    settings: Settings | None = None,
    interventions: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Drift:
    """Measures how drafters' chains drift, on a target's own answers.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        drafters: Heads loaded for it, by name: those that chain a network (EAGLE, MTP), and those
            that recycle nothing, of which only acceptance and attention are there to measure.
        prompts: Token ids of each prompt.
        settings: What to measure; None for the defaults.
        interventions: What to do to each drafter
            (`mlx_drift.measure.inside.intervene.intervention`); each is measured without it anyway.
        progress: Told after each answer.

    Raises:
        DriftError: If there is nothing to measure, an intervention is unknown or has nothing to
            change, or a drafter does not fit or is no head.
    """
    settings = settings or Settings()
    if not drafters or not prompts:
        raise DriftError("there is nothing to measure: give a drafter and a prompt")
    chained, heads = _sorted(drafters)
    if heads and interventions:
        raise DriftError(
            f"{min(heads)} recycles no state, so {interventions[0]} has nothing to change: leave "
            "--intervene out, or the drafter"
        )
    treatments: dict[str | None, Intervention] = {None: lambda drafter, seed: drafter}
    treatments |= {text: intervention(text) for text in interventions}
    total = (len(chained) * len(treatments) + len(heads)) * len(prompts)
    done = 0

    def generate(drafter: Drafter, prompt: list[int]) -> Iterator[Any]:
        nonlocal done
        with warnings.catch_warnings():
            # That hardly any draft is accepted is what the figures say.
            warnings.filterwarnings("ignore", "only .* of the first drafts", DriftWarning)
            yield from stream_generate(
                model,
                tokenizer,
                prompt,
                settings.max_tokens,
                drafter=drafter,
                num_draft_tokens=settings.steps,
            )
        done += 1
        progress(done, total)

    arms: list[Arm] = []
    for name, drafter in chained.items():
        baseline: list[_Answer] = []
        for text, treat in treatments.items():
            answers = []
            for number, prompt in enumerate(prompts):
                treated = treat(drafter, settings.seed + number)
                answers.append(_answer(model, generate, treated, prompt, settings))
            baseline = baseline or answers
            arms.append(_arm(name, text, answers, baseline, drafter.config.num_layers))
    still = tuple(
        watch(name, head, prompts, settings.steps, settings.sinks, settings.recent, generate)
        for name, head in heads.items()
    )
    dtype = str(Target(model).dtype).removeprefix("mlx.core.")
    return Drift(tuple(arms), settings, len(prompts), dtype, still)


def _sorted(
    drafters: Mapping[str, Drafter],
) -> tuple[dict[str, ChainDrafter], dict[str, HeadDrafter]]:
    """Sorts heads into those that recycle a state and those that do not.

    Raises:
        DriftError: If one is no head.
    """
    chained, others = {}, {}
    for name, drafter in drafters.items():
        if isinstance(drafter, ChainDrafter) and drafter.recycles:
            chained[name] = drafter
        elif isinstance(drafter, HeadDrafter):
            others[name] = drafter
        else:
            raise DriftError(
                f"{name} recycles no state that could drift, and is no head to look into. Give an "
                "EAGLE or MTP head"
            )
    return chained, others


def _answer(
    model: nn.Module,
    generate: Callable[[Drafter, list[int]], Iterator[Any]],
    drafter: ChainDrafter,
    prompt: list[int],
    settings: Settings,
) -> _Answer:
    """Has one prompt answered and watches."""
    split = Split(len(prompt) - 1, settings.sinks, settings.recent)
    seen = Observed(drafter.network, MAP_ROWS)
    text = list(prompt)
    sums: Sums | None = None
    first: Map | None = None
    for response in generate(drafter.through(seen), prompt):
        text.append(response.token)
        for chain in seen.take():
            if len(chain.steps) < settings.steps:
                continue
            committed = chain.steps[0].weights[0].shape[-1]
            found = add_up(chain, slice(-1, None), [committed], split)
            sums = found if sums is None else sums + found
            first = first or _map(chain, split.edges(committed))
    forced = None
    if settings.teacher_forced:
        forced = _forced(model, drafter, text, len(prompt), settings.steps, split)
    statistics = response.statistics
    return _Answer(sums, forced, sum(statistics.accepted), statistics.rounds, first)


def _forced(
    model: nn.Module, drafter: ChainDrafter, text: list[int], prompt: int, steps: int, split: Split
) -> Sums | None:
    """Runs the teacher-forced chain and measures the positions whose drafts are of the answer."""
    rows = len(text) - 1
    wanted = range(max(0, prompt - 2), rows - steps + 1)  # row i: i + 1 committed rows
    if not wanted:
        return None
    target = Target(model, drafter.taps)
    tokens = mx.array(text, dtype=mx.int32)
    _, taps = target(tokens[:-1], target.make_cache())
    seen = Observed(drafter.network, rows)
    for _ in drafter.through(seen).train_time_test_steps(tokens, taps, steps):
        pass
    positions = slice(wanted.start, wanted.stop)
    return add_up(seen.take_last(), positions, [row + 1 for row in wanted], split)


def _map(chain: Chain, edges: list[int]) -> Map:
    """Puts the attention of one round into one matrix."""
    blocks = [np.array(mx.concatenate(step.weights).mean(axis=0)) for step in chain.steps]
    keys = blocks[-1].shape[-1]
    padded = [np.pad(block, ((0, 0), (0, keys - block.shape[-1]))) for block in blocks]
    return Map(np.concatenate(padded), edges)


def _arm(
    name: str,
    text: str | None,
    answers: Sequence[_Answer],
    baseline: Sequence[_Answer],
    layers: int,
) -> Arm:
    """Puts the answers of one arm together."""
    free = [answer.free_running for answer in answers if answer.free_running is not None]
    forced = [answer.teacher_forced for answer in answers if answer.teacher_forced is not None]
    first = next((answer.map for answer in answers if answer.map is not None), None)
    if first is None:
        raise DriftError(
            f"{name}: no round drafts as many tokens as there are steps, the answers are too "
            "short. Give other prompts, fewer steps or more max_tokens"
        )
    accepted, as_it_was = (
        ([answer.accepted for answer in of], [answer.rounds for answer in of])
        for of in (answers, baseline)
    )
    return Arm(
        name,
        text,
        ratio(*accepted),
        None if text is None else ratio_of_ratios(accepted, as_it_was),
        figures_of(free, layers),
        figures_of(forced, layers) if forced else None,
        first,
    )


def _plain(value: Any, bounded: bool) -> Any:
    """Turns figures into what JSON knows; intervals lose their bounds unless `bounded`."""
    if isinstance(value, Interval):
        return list(value) if bounded else [value.value, None, None]
    if isinstance(value, list):
        return [_plain(element, bounded) for element in value]
    if isinstance(value, dict):
        return {name: _plain(element, bounded) for name, element in value.items()}
    if isinstance(value, Arm | Still | Attention | Head):
        return _plain({k: v for k, v in vars(value).items() if k != "map"}, bounded)
    return value
