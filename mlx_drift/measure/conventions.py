"""The convention probe: which reading of a checkpoint's conventions its drafter was trained with.

Two switches are not in the tensors and wrong in some configs: whether tap ids mean the inputs or
the outputs of layers, and which state is fed back, or, of heads that draft a block, which position
a slot predicts. The readings are tried on the target's own greedy text with the teacher-forced
chain: what the *first* step drafts depends on the taps alone, what the *later* steps draft on the
feedback too. A block is filled behind each of the target's tokens; all its drafts depend on both.
Readings are compared position by position, by the likelihood they give the target's token: it
tells more than whether the draft agrees, so a few hundred tokens settle it. The idea is this
project's own; no engine does it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.convert.convert import OPEN, Candidate, Reading, Verdict
from mlx_drift.decode.statistics import LOW_ACCEPTANCE
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.load import build_drafter, cast
from mlx_drift.errors import DriftError
from mlx_drift.files.text import check_text
from mlx_drift.target.model import Target

STEPS = 3
TOKENS, MOST = 240, 80
"""Tokens of the target's own to try the readings on: over all prompts, and of one at most."""

CLEAR = 3.0
"""Standard errors by which the better reading must lead."""

PROMPTS = (
    "What does `textwrap.dedent` do in Python? Show me its source.",
    "Explain in a few sentences how rainbows form.",
    "What does `shutil.which` do in Python?",
    "What should I pack for a week of hiking in the mountains?",
    "How do I use `itertools.groupby` in Python?",
    "Write a short story about a lighthouse keeper.",
    "Show me the source of `functools.partial`.",
    "Translate into French: The library opens at nine.",
    "Show me the source of `string.capwords`.",
    "What does `os.path.commonpath` do in Python?",
)
"""Asked in turn until the target has said enough: everyday ones, and ones the embedded pair knows.
"""

UNTHINKABLE = -1e4
"""Nats of a token by logits that are NaN: such a reading is the last."""


@dataclass(frozen=True)
class Score:
    """How one reading's drafts compare with the target's own tokens `[P]`, at chain steps `[S]`.

    Attributes:
        agrees: Whether the draft is the target's token, `[S, P]`.
        log_likelihood: Nats of the target's token, `[S, P]`; NaN where the draft vocabulary lacks
            it.
        finite: Whether the drafter's states were finite.
    """

    agrees: npt.NDArray[np.bool_]
    log_likelihood: npt.NDArray[np.float64]
    finite: bool = True

    @property
    def likelihood(self) -> float:
        """The mean log-likelihood, in nats."""
        return float(np.nanmean(self.log_likelihood))

    def lead(self, other: "Score") -> float:
        """By how many standard errors this score is the likelier one.

        The steps draft the same tokens, so their differences are averaged token by token before
        they are taken for independent.
        """
        difference = (self.log_likelihood - other.log_likelihood).mean(axis=0)
        difference = difference[np.isfinite(difference)]
        if not difference.any():
            return 0.0
        error = float(difference.std()) / math.sqrt(difference.size)
        lead = float(difference.mean())
        return lead / error if error else math.copysign(math.inf, lead)


class ConventionProbe:
    """Tries readings of a checkpoint on its target; to be given to `convert_drafter`.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        prompts: What to ask it; its chat template is applied where it has one.
        tokens: How many tokens of its own to try the readings on, if the prompts give as many.

    Attributes:
        agreement: After a call, for each reading the share of drafts that agree at each step.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        prompts: Sequence[str] = PROMPTS,
        tokens: int = TOKENS,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.tokens = tokens
        self.agreement: dict[Reading, list[float]] = {}
        self._texts: list[tuple[list[int], int]] = []  # token ids, and where the target's begin

    def __call__(self, candidates: Mapping[Reading, Candidate]) -> Verdict:
        """Chooses between readings; see `Verdict`.

        Raises:
            DriftError: If the target says nothing to the prompts.
        """
        self._texts = self._texts or list(self._ask())
        if not self._texts:
            raise DriftError(
                "the target answers none of the prompts, or they are too short; probe on others: "
                "--probe-on"
            )
        target = Target(self.model, sorted({t for c in candidates.values() for t in c.config.taps}))
        taps = [target(mx.array(text[:-1]), target.make_cache())[1] for text, _ in self._texts]
        drafters = {reading: _bound(candidate, target) for reading, candidate in candidates.items()}
        steps = min(STEPS, *(drafter.max_drafts or STEPS for drafter in drafters.values()))
        tried: dict[Any, Score] = {}  # several readings may come to the same config
        scores: dict[Reading, Score] = {}
        for reading, drafter in drafters.items():
            config = drafter.config
            key = config.taps, *(getattr(config, name, None) for name in ("feedback", "slots"))
            known = tried.get(key) or self._score(drafter, target.taps, taps, steps)
            tried[key] = scores[reading] = known
        self.agreement = {
            reading: score.agrees.mean(axis=1).tolist() for reading, score in scores.items()
        }
        return decide(scores)

    def _ask(self) -> Iterator[tuple[list[int], int]]:
        """Yields the target's greedy text for each prompt."""
        said = 0
        for prompt in self.prompts:
            if said >= self.tokens:
                return
            text: Any = prompt
            if self.tokenizer.has_chat_template:
                messages = [{"role": "user", "content": prompt}]
                text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            if isinstance(text, str):
                text = self.tokenizer.encode(check_text(text, "a prompt of the probe"))
            tokens = list(text)
            start = len(tokens)
            for response in mlx_lm.stream_generate(
                self.model, self.tokenizer, tokens.copy(), max_tokens=MOST
            ):
                tokens.append(response.token)
            said += len(tokens) - start
            if len(tokens) > start >= STEPS + 1:
                yield tokens, start

    def _score(
        self, drafter: Any, of_target: Sequence[int], taps: Sequence[mx.array], steps: int
    ) -> Score:
        """Scores the drafts of each chain step at the target's own tokens."""
        columns = mx.array([of_target.index(tap) for tap in drafter.taps])
        draft_id = np.arange(drafter._vocab_size)  # of each target token; -1 for none
        if drafter._d2t is not None:
            ids = np.array(drafter._d2t)
            draft_id[:] = -1
            draft_id[ids] = np.arange(ids.size)
        else:
            draft_id[drafter.config.target.vocab_size :] = -1
        agrees, likelihood = [], []  # of each text, [S, P]
        finite = True
        for (text, start), captured in zip(self._texts, taps, strict=True):
            true = np.array(text[start:])
            known = draft_id[true]
            for logits in _forced(drafter, text, start, captured[:, columns], steps):
                nats = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)
                finite &= not np.isnan(nats).any()
                nats = np.where(np.isnan(nats), UNTHINKABLE, nats)
                agrees.append(np.array(drafter.choose(logits)) == true)
                likelihood.append(np.where(known >= 0, nats[np.arange(true.size), known], np.nan))
        return Score(_by_step(agrees, steps), _by_step(likelihood, steps), finite)


def _bound(candidate: Candidate, target: Target) -> Any:
    """Makes a candidate's drafter."""
    cast(candidate.network, target.dtype)
    return build_drafter(candidate.config, candidate.network, target, candidate.d2t)


def _forced(
    drafter: Any, text: list[int], start: int, taps: mx.array, steps: int
) -> Iterator[mx.array]:
    """Yields for each step the draft logits `[P, D]` of the target's tokens, the true ones read."""
    if not isinstance(drafter, ChainDrafter):
        yield from round_by_round(drafter, text, start, taps, steps)
        return
    chain = drafter.train_time_test_steps(mx.array(text), taps, steps)
    for step, (logits, _) in enumerate(chain):
        first = start - 2 - step  # the row that drafts the first of the target's tokens
        yield logits[first : first + len(text) - start].astype(mx.float32)


def round_by_round(
    drafter: Any, text: list[int], start: int, taps: mx.array, steps: int
) -> Iterator[mx.array]:
    """Drafts behind every token, as in decoding; what any head does, but slower than a chain.

    Args:
        drafter: The drafter.
        text: Token ids.
        start: Where the target's own begin.
        taps: Its states at all tokens but the last, `[L, A, T]`.
        steps: How many drafts.

    Yields:
        For each step the draft logits of the target's tokens, the true ones read, `[P, D]`.
    """
    cache = drafter.make_cache()
    first = start - steps  # the token behind which the last step drafts the target's first
    if first > 1:
        drafter.ingest(mx.array(text[1:first]), taps[: first - 1], cache)
    rounds = []
    for last in range(first, len(text) - 1):
        drafter.ingest(mx.array(text[last : last + 1]), taps[last - 1 : last], cache)
        chooser = Forced([*text[last + 1 :], *[0] * steps])
        drafter.propose(steps, cache, chooser)
        rounds.append(mx.concatenate(chooser.logits).astype(mx.float32))
        mx.eval(rounds[-1], cache.state)
    rows = mx.stack(rounds)  # behind each token, [tokens, steps, V]
    for step in range(steps):
        behind = steps - 1 - step
        logits = rows[behind : behind + len(text) - start, step]
        yield logits if drafter._d2t is None else logits[:, drafter._d2t]


class Forced:
    """Chooses the tokens that it was given, and keeps the logits that it was asked with."""

    drafts_greedily, processes, tells_tokens_apart = False, True, True

    def __init__(self, tokens: Sequence[int]):
        self.tokens = tokens
        self.logits: list[mx.array] = []

    def likeliest(self, logits: mx.array, drafted: Sequence[mx.array]) -> mx.array:
        """Takes the next token."""
        self.logits.append(logits)
        return mx.array([self.tokens[len(drafted)]], mx.int32)

    def draft(
        self, logits: mx.array, drafted: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """Takes the next token, as if for certain."""
        return self.likeliest(logits, drafted), None


def _by_step(of_texts: Sequence[npt.NDArray[Any]], steps: int) -> npt.NDArray[Any]:
    """Joins rows of texts, each with its steps in turn, to `[S, P]`."""
    return np.stack([np.concatenate(of_texts[step::steps]) for step in range(steps)])


def decide(scores: Mapping[Reading, Score]) -> Verdict:
    """Chooses the taps, each with what suits it, then that: the feedback, or the slots.

    Args:
        scores: The score of each reading.
    """
    ranked = sorted(scores, key=lambda reading: -scores[reading].likelihood)
    best = scores[ranked[0]]
    if not best.finite:
        return Verdict(
            None,
            None,
            [
                "the probe: the drafter's states are not finite, whatever the reading: they leave "
                "the range of float16, or its weights hold NaN; probe on the target in bfloat16"
            ],
        )
    if (first := best.agrees[0].mean()) < LOW_ACCEPTANCE:
        return Verdict(
            None,
            None,
            [
                f"the probe: even the best reading agrees with the target on {first:.0%} of its "
                "first drafts; the drafter was made for another target, or something else is read "
                "wrongly (RoPE, the prompt's template)"
            ],
        )
    taps, second = ranked[0]
    name = "slots" if second in OPEN["slots"] else "feedback"
    others: dict[str, Reading | None] = {
        "taps": next((reading for reading in ranked if reading[0] != taps), None),
        name: next((r for r in ranked if r[0] == taps and r[1] != second), None),
    }
    chosen: dict[str, Any] = {}
    notes = []
    for i, (what, other) in enumerate(others.items()):
        if other is None:
            continue
        lead = best.lead(scores[other])
        if lead == 0:  # two names of one reading
            continue
        step = slice(1, None) if what == "feedback" else slice(0, 1)
        shares = ", ".join(
            f"{reading[i]} {scores[reading].agrees[step].mean():.1%}"
            for reading in (ranked[0], other)
        )
        which = "later" if what == "feedback" else "first"
        figures = (
            f"{shares} of {best.agrees[step].size} {which} drafts agree "
            f"with the target, {lead:.1f} standard errors apart in likelihood"
        )
        if lead >= CLEAR:
            chosen[what] = ranked[0][i]
            notes.append(f"the probe settles {what} = {ranked[0][i]}: {figures}")
        else:
            notes.append(
                f"the probe does not settle {what}: {figures}, where {CLEAR:.0f} would do; give it "
                f"more text with --probe-on, or decide with --{what}"
            )
    return Verdict(chosen.get("taps"), chosen.get("feedback"), notes, chosen.get("slots"))
