"""Sampling loses nothing: chi-square tests against exact distributions, which wrong rules fail.

What is expected is computed apart from the package: mlx-lm's filters written anew in numpy, and
from them the joint distribution of the first three tokens after each prompt.

Every chi-square test asks for p > 0.001 with a fixed seed. There are 27 by default (5 of mlx-lm's
own samplers, 14 of the batched rule, 2 of its controls, 6 of the real loop) and 6 more marked
`long`: with other seeds one run in 37 would fail by chance.
"""

import copy
import itertools
import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from chi_square import CERTAINLY_WRONG, LEAST_P, p_value, survival
from mlx_drift import CopyingDrafter, Statistics, stream_generate
from mlx_drift.decode.accept import accept_sampled
from mlx_drift.decode.answer import answer
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.speculate import every, prefill
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.target.model import Target
from tiny import NoText, tiny_drafter, tiny_llama

FIRST = 3  # tokens whose joint distribution is tested
DRAWS = 200_000


# The chi-square test itself.


@pytest.mark.parametrize(
    ("statistic", "freedom", "chance"),
    [
        # Critical values as tables print them.
        (3.841458820694124, 1, 0.05),
        (10.827566170662733, 1, 0.001),
        (7.814727903251179, 3, 0.05),
        (18.307038053275146, 10, 0.05),
        (149.44925277903886, 100, 0.001),
        # Two degrees of freedom have a closed form: e^(-x/2).
        (50.0, 2, math.exp(-25)),
        (0.0, 7, 1.0),
    ],
)
def test_survival(statistic, freedom, chance):
    assert survival(statistic, freedom) == pytest.approx(chance, rel=1e-9)


def test_p_values_are_uniform_for_true_draws():
    """Of 1,000 samples, many small cells and impossible ones among them: p < 0.1 in a tenth."""
    rng = np.random.default_rng(0)
    probabilities = np.append(rng.dirichlet([0.3] * 40), [0.0, 0.0])
    values = [p_value(rng.multinomial(1000, probabilities), probabilities) for _ in range(1000)]
    for level in (0.1, 0.5, 0.9):
        assert abs(np.mean(np.array(values) < level) - level) < 0.05
    assert p_value(np.eye(42, dtype=int)[41], probabilities) == 0


# mlx-lm's samplers, written anew.


def exact(logits: np.ndarray, sampling: Sampling, xtc: bool) -> np.ndarray:
    """What mlx-lm draws from, given whether XTC's coin falls."""
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    if 0 < sampling.top_p < 1:
        more_likely = np.array([p[p > x].sum() for x in p])
        p[more_likely >= sampling.top_p] = 0
    if sampling.min_p:
        kept = np.sort(p)[-sampling.min_tokens_to_keep]
        p[(p < sampling.min_p * p.max()) & (p < kept)] = 0
    if xtc:
        p /= p.sum()
        seen = p[p > sampling.xtc_threshold]
        removed = p > seen.min(initial=np.inf)
        removed[list(sampling.xtc_special_tokens)] = False
        p[removed] = 0
    if sampling.top_k:
        p[np.argsort(-p)[sampling.top_k :]] = 0
    p **= 1 / sampling.temp
    return p / p.sum()


def over_coins(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The same over all coins."""
    tails, heads = (exact(logits, sampling, xtc) for xtc in (False, True))
    return (1 - sampling.xtc_probability) * tails + sampling.xtc_probability * heads


SAMPLINGS = {
    "temp 1": Sampling(temp=1.0),
    "temp 0.5": Sampling(temp=0.5),
    "temp 1.5": Sampling(temp=1.5),
    "top-p": Sampling(temp=1.0, top_p=0.8),
    "cold top-p": Sampling(temp=0.5, top_p=0.9),
    "top-k": Sampling(temp=1.5, top_k=3),
    "top-k 2": Sampling(temp=1.0, top_k=2),
    "min-p": Sampling(temp=1.0, min_p=0.2),
    "min-p keeps 3": Sampling(temp=1.5, min_p=0.5, min_tokens_to_keep=3),
    "xtc": Sampling(temp=1.0, xtc_probability=0.5, xtc_threshold=0.1),
    "xtc special": Sampling(
        temp=1.5, xtc_probability=0.7, xtc_threshold=0.15, xtc_special_tokens=(1, 4)
    ),
    "xtc always": Sampling(temp=0.5, xtc_probability=1.0, xtc_threshold=0.05),
    "top-p min-p top-k": Sampling(temp=1.5, top_p=0.95, min_p=0.05, top_k=4),
    "all": Sampling(
        temp=0.8, top_p=0.95, min_p=0.05, top_k=4, xtc_probability=0.3, xtc_threshold=0.2
    ),
}

DRAWN = ["cold top-p", "min-p keeps 3", "top-p min-p top-k", "xtc", "all"]
"""Of those the samplers themselves are drawn from; the others are but compared."""


def log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_log_distribution_is_mlx_lms(name):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (60, 12)).astype(np.float32)
    logits[0] *= 20  # one token has all the probability
    logits[1] *= 1e-3  # all have the same, nearly
    logits[2:12, ::3] = -np.inf  # a drafter's vocabulary
    coins = rng.random(60).astype(np.float32)
    sampling = SAMPLINGS[name]
    got = np.array(sampling.log_distribution(log_softmax(mx.array(logits)), mx.array(coins)))
    expected = np.stack(
        [
            exact(row, sampling, xtc=0 < sampling.xtc_probability >= coin)
            for row, coin in zip(logits, coins, strict=True)
        ]
    )
    assert ((got == -np.inf) == (expected == 0)).all()
    np.testing.assert_allclose(np.exp(got), expected, atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize("name", DRAWN)
def test_mlx_lm_draws_from_log_distribution(name):
    """Its XTC tosses one coin a call, so there each draw is a call."""
    sampling = SAMPLINGS[name]
    log_probabilities = log_softmax(mx.array([[0.3, 1.6, -0.2, 2.0, 0.9, -1.0, 0.0, 1.2]]))
    chance = sampling.xtc_probability
    heads, tails = (
        mx.exp(sampling.log_distribution(log_probabilities, mx.array([coin]))[0])
        for coin in (0.0, 0.999999)
    )
    mixture = np.array(chance * heads + (1 - chance) * tails, dtype=np.float64)
    mx.random.seed(2)
    sampler = sampling.as_sampler()
    if chance:
        counts = np.bincount([sampler(log_probabilities).item() for _ in range(1500)], minlength=8)
    else:
        rows = mx.repeat(log_probabilities, 20_000, axis=0)
        counts = np.bincount(np.array(sampler(rows)), minlength=8)
    assert p_value(counts, mixture / mixture.sum()) > LEAST_P


# The batched rule, on a target and drafters that are tables.


SIZE = 5  # of the tables' vocabulary
CONTEXTS = [c for length in range(FIRST) for c in itertools.product(range(SIZE), repeat=length)]
"""What may have been emitted before one of the first three tokens, the shortest first."""

BEYOND = len(CONTEXTS)  # the row of all longer contexts, whose tokens are not looked at
ROWS = {context: row for row, context in enumerate(CONTEXTS)}
NEXT = np.array([[ROWS.get((*c, t), BEYOND) for t in range(SIZE)] for c in [*CONTEXTS, ()]])
"""From a context's row and a token to the next context's row."""
NEXT[BEYOND] = BEYOND

D2T = np.array([1, 2, 4])
"""The drafter's vocabulary, where it is a reduced one."""


@dataclass
class Setting:
    """A target's and a drafter's logits after every context, and what tokens are drawn from."""

    sampling: Sampling
    drafter: str
    penalty: float = 1.0

    def __post_init__(self):
        rng = np.random.default_rng(3)
        by_last_token = rng.normal(0, 1.2, (SIZE + 1, SIZE))
        target = by_last_token[[context[-1] if context else SIZE for context in CONTEXTS]]
        noise = rng.normal(0, 1, target.shape)
        outside = np.ones(SIZE, bool)
        outside[D2T] = False
        drafter = {
            "perfect": target,
            "good": target + 0.5 * noise,
            "bad": 1.5 * noise,
            "adversarial": -target,
            "certain": target + 0.5 * noise,
            "disjoint": target,
            "reduced": np.where(outside, -np.inf, target + noise),
        }[self.drafter]
        self.target, self.draft = self._penalized(target), self._penalized(drafter)
        if self.drafter == "disjoint":
            kept = np.array([over_coins(row, self.sampling) > 0 for row in self.target])
            assert not kept.all(axis=1).any()
            self.draft = np.where(kept, -np.inf, 0.1 * noise)

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        """A repetition penalty's effect, which makes every row depend on all tokens before."""
        seen = np.array([[token in context for token in range(SIZE)] for context in CONTEXTS])
        penalized = np.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return np.where(seen, penalized, logits).astype(np.float32)

    def log_tables(self, logits: np.ndarray) -> np.ndarray:
        """What the package draws from: by XTC's coin, context and token."""
        rows = mx.array(np.concatenate([logits, np.arange(SIZE, dtype=np.float32)[None]]))
        coins = (mx.full(len(rows), coin) for coin in (0.999999, 0.0))
        return np.stack(
            [np.array(self.sampling.log_distribution(log_softmax(rows), coin)) for coin in coins]
        )

    def joint(self) -> np.ndarray:
        """The exact distribution of the first three tokens."""
        return joint([over_coins(row, self.sampling) for row in self.target])

    def acceptance(self) -> float:
        """Σ min(p, q) at the first draft."""
        chance, total = self.sampling.xtc_probability, 0.0
        for xtc, weight in ((False, 1 - chance), (True, chance)):
            p, q = (exact(rows[0], self.sampling, xtc) for rows in (self.target, self.draft))
            if self.drafter == "certain":
                q = np.eye(SIZE)[q.argmax()]
            total += weight * np.minimum(p, q).sum()
        return total


def joint(rows: list[np.ndarray]) -> np.ndarray:
    """The distribution of the first three tokens, `[V³]`, from those after every context."""
    first, second, third = np.split(np.array(rows), [1, 1 + SIZE])
    return (first[0, :, None, None] * second[:, :, None] * third.reshape((SIZE,) * 3)).flatten()


def emit(setting: Setting, accept=accept_sampled, *, draws=DRAWS, scattered=True, seed=4):
    """Decodes with the batched rule until every sequence has three tokens.

    Returns:
        The counts of the first three tokens `[V³]`, and how often the first draft was accepted.
    """
    rng = np.random.default_rng(seed)
    log_p, log_q = setting.log_tables(setting.target), setting.log_tables(setting.draft)
    cumulated = np.cumsum(np.exp(log_q.astype(np.float64)), axis=-1)
    cumulated /= cumulated[..., -1:]
    seen_log_q = log_q
    if not scattered:  # in the drafter's own columns
        seen_log_q = np.full_like(log_q, -np.inf)
        seen_log_q[..., : len(D2T)] = log_q[..., D2T]
    emitted = np.zeros((draws, FIRST), int)
    length, context = np.zeros(draws, int), np.zeros(draws, int)
    acceptance = None
    keys = mx.random.split(mx.random.key(seed), FIRST)
    for key, k in zip(keys, range(FIRST - 1, -1, -1), strict=True):  # no more drafts than wanted
        active = np.flatnonzero(length < FIRST)
        if not active.size:
            break
        coins = (rng.random((active.size, k + 1)) < setting.sampling.xtc_probability).astype(int)
        contexts, drafts = context[active][:, None], np.zeros((active.size, 0), int)
        for step in range(k):
            rows = coins[:, step], contexts[:, -1]
            if setting.drafter == "certain":
                token = log_q.argmax(axis=-1)[rows]
            else:
                token = (cumulated[rows] <= rng.random((active.size, 1))).sum(axis=-1)
            drafts = np.concatenate([drafts, token[:, None]], axis=1)
            contexts = np.concatenate([contexts, NEXT[contexts[:, -1:], token[:, None]]], axis=1)
        drawn_with = mx.array(seen_log_q[coins[:, :-1], contexts[:, :-1]])
        verdict = accept(
            mx.array(drafts, dtype=mx.int32),
            None if setting.drafter == "certain" else drawn_with,
            mx.array(log_p[coins, contexts]),
            key,
        )
        accepted, *tokens = np.array(verdict).T
        if acceptance is None:
            acceptance = (accepted > 0).mean()
        for place, token in enumerate(tokens):
            goes_on = (place <= accepted) & (length[active] < FIRST)
            rows, token = active[goes_on], token[goes_on]
            emitted[rows, length[rows]] = token
            context[rows] = NEXT[context[rows], token]
            length[rows] += 1
    assert (length == FIRST).all()
    return count_joint(emitted), acceptance


def count_joint(emitted: np.ndarray) -> np.ndarray:
    return np.bincount(emitted @ [SIZE**2, SIZE, 1], minlength=SIZE**3)


def assert_within_four_errors(measured: float, expected: float, count: int) -> None:
    error = math.sqrt(expected * (1 - expected) / count) if 0 < expected < 1 else 0.0
    assert abs(measured - expected) <= 4 * error + 1e-6


SETTINGS = {
    f"{sampling}, {drafter} drafter" + (f", repetition {penalty}" if penalty != 1 else ""): Setting(
        SAMPLINGS[sampling], drafter, penalty
    )
    for sampling, drafter, penalty in (
        ("temp 1", "certain", 1.0),
        ("temp 1", "good", 1.5),
        ("temp 1.5", "adversarial", 1.0),
        ("temp 1.5", "reduced", 1.0),
        ("top-p", "reduced", 1.3),
        ("cold top-p", "adversarial", 1.8),
        ("top-k", "bad", 1.0),
        ("top-k 2", "disjoint", 1.0),
        ("min-p", "good", 1.0),
        ("min-p keeps 3", "certain", 1.3),
        ("xtc", "good", 1.0),
        ("xtc special", "adversarial", 1.0),
        ("xtc always", "perfect", 1.5),
        ("all", "reduced", 1.3),
    )
}


@pytest.mark.parametrize("name", SETTINGS)
def test_batched_rule(name):
    setting = SETTINGS[name]
    counts, acceptance = emit(setting)
    assert p_value(counts, setting.joint()) > LEAST_P
    assert_within_four_errors(acceptance, setting.acceptance(), DRAWS)


def mistaken(draft, log_q, log_p, key, *, mistake):
    """The rule once more, with a mistake or without."""
    accept_key, draw_key = mx.random.split(key)
    p, q = mx.exp(log_p[..., :-1, :]), mx.exp(log_q)
    p_draft, q_draft = (mx.take_along_axis(x, draft[..., None], axis=-1)[..., 0] for x in (p, q))
    accepted = mx.random.uniform(shape=draft.shape, key=accept_key) < p_draft / q_draft
    if mistake == "accepts what equals a sample of the target":
        accepted = mx.random.categorical(log_p, key=accept_key)[..., :-1] == draft
    residual = mx.maximum(p - q, 0)
    if mistake == "draws the residual from p":
        residual = p
    drawn = mx.random.categorical(
        mx.concatenate([mx.log(residual), log_p[..., -1:, :]], axis=-2), key=draw_key
    )
    count = mx.cumprod(accepted.astype(mx.int32), axis=-1).sum(axis=-1, keepdims=True)
    drafted = mx.arange(draft.shape[-1]) < count
    tokens = mx.where(drafted, draft, drawn[..., :-1])
    return mx.concatenate([count, tokens, drawn[..., -1:]], axis=-1)


@pytest.mark.parametrize("name", ["temp 1.5, reduced drafter", "xtc, good drafter"])
@pytest.mark.parametrize(
    ("mistake", "passes"),
    [
        ("none", True),
        ("draws the residual from p", False),
        ("accepts what equals a sample of the target", False),
    ],
)
def test_mistaken_rules_fail(name, mistake, passes):
    setting = SETTINGS[name]
    counts, _ = emit(setting, partial(mistaken, mistake=mistake), draws=50_000)
    p = p_value(counts, setting.joint())
    assert p > LEAST_P if passes else p < CERTAINLY_WRONG


def test_draft_probabilities_that_are_not_scattered_fail():
    setting = SETTINGS["temp 1.5, reduced drafter"]
    counts, acceptance = emit(setting, draws=50_000, scattered=False)
    assert p_value(counts, setting.joint()) < CERTAINLY_WRONG
    assert acceptance > setting.acceptance() + 0.01


# The real loop.


PROMPT = [3, 1, 4]
PENALTY = {"repetition_penalty": 1.4}


class Pair:
    """A real target and a real drafter of a reduced vocabulary, as small as they can be."""

    def __init__(self):
        self.model = tiny_llama(
            vocab_size=SIZE,
            num_hidden_layers=1,
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        base = tiny_drafter(
            self.model,
            taps=(1,),
            intermediate_size=16,
            num_attention_heads=1,
            num_key_value_heads=1,
            fc=False,
            fc_norm=False,
            draft_vocab_size=len(D2T),
            own_head=True,
        )
        base.network.lm_head.weight = 3 * base.network.lm_head.weight  # of some opinion
        self.target = Target(self.model, base.taps)
        self.drafter = ChainDrafter(base.config, base.network, self.target, mx.array(D2T))

    def sample(self, generations: int, **keywords):
        """The counts of the first three tokens, and how often the first draft was accepted."""
        emitted, accepted = [], 0
        for seed in range(generations):
            responses = list(
                stream_generate(
                    self.model,
                    NoText(),
                    PROMPT,
                    FIRST,
                    drafter=self.drafter,
                    seed=seed,
                    **({} if "tree" in keywords else {"num_draft_tokens": FIRST - 1}),
                    **keywords,
                )
            )
            emitted.append([response.token for response in responses])
            accepted += responses[0].from_draft
        return count_joint(np.array(emitted)), accepted / generations

    def joint(self, sampling: Sampling) -> np.ndarray:
        """The target's exact distribution of the first three tokens."""
        rows = []
        for context in CONTEXTS:
            tokens = mx.array([*PROMPT, *context])
            logits = self.model(tokens[None])[:, -1]
            rows.append(over_coins(processed(tokens, logits, sampling), sampling))
        return joint(rows)

    def acceptance(self, sampling: Sampling) -> float:
        """Σ min(p, q) at the first draft, its probabilities laid out in numpy."""
        tokens = mx.array(PROMPT)
        cache, drafter_cache = self.target.make_cache(), self.drafter.make_cache()
        for _ in prefill(self.target, self.drafter, tokens, cache, drafter_cache, cut=every(8)):
            pass
        draft_logits = np.full((1, SIZE), -np.inf, dtype=np.float32)
        draft_logits[:, D2T] = np.array(drafter_cache.draft_logits)
        p_logits = processed(tokens, self.model(tokens[None])[:, -1], sampling)
        q_logits = processed(tokens, mx.array(draft_logits), sampling)
        chance, total = sampling.xtc_probability, 0.0
        for xtc, weight in ((False, 1 - chance), (True, chance)):
            p, q = (exact(logits, sampling, xtc) for logits in (p_logits, q_logits))
            total += weight * np.minimum(p, q).sum()
        return total


def processed(tokens: mx.array, logits: mx.array, sampling: Sampling) -> np.ndarray:
    for processor in sampling.logits_processors:
        logits = processor(tokens, logits)
    return np.array(logits[0])


@pytest.fixture(scope="module")
def pair():
    return Pair()


record_round = Statistics.record_round
SOME = 100
GENERATIONS = [SOME, pytest.param(6000, marks=pytest.mark.long)]
LOOPS = {
    "top-p, repetition": {
        "temp": 1.2,
        "top_p": 0.9,
        "logits_processors": make_logits_processors(**PENALTY),
    },
    "xtc": {"temp": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.1},
}


def sampling_of(keywords) -> Sampling:
    processors = tuple(keywords.get("logits_processors", ()))
    return Sampling(**keywords | {"logits_processors": processors})


@pytest.mark.parametrize("generations", GENERATIONS)
@pytest.mark.parametrize("name", LOOPS)
def test_real_loop(pair, name, generations):
    sampling = sampling_of(LOOPS[name])
    counts, acceptance = pair.sample(generations, **LOOPS[name])
    assert p_value(counts, pair.joint(sampling)) > LEAST_P
    assert_within_four_errors(acceptance, pair.acceptance(sampling), generations)


@pytest.mark.parametrize("generations", GENERATIONS)
def test_real_loop_with_copies(pair, generations, monkeypatch):
    """A copy is drafted with certainty, which is the worst that q can be for p."""
    monkeypatch.setattr(sys.modules[__name__], "PROMPT", [*PROMPT, 0, 2, *PROMPT])
    copying = copy.copy(pair)
    copying.drafter = PromptLookupDrafter(pair.model)
    counts, acceptance = copying.sample(generations, temp=1.2)
    assert p_value(counts, copying.joint(Sampling(temp=1.2))) > LEAST_P
    assert 0 < acceptance < 1


@pytest.mark.parametrize("generations", GENERATIONS)
@pytest.mark.parametrize("keywords", [{"temp": 1.2}, {"temp": 0.9, "top_p": 0.8}], ids=str)
def test_real_loop_with_trees(pair, keywords, generations):
    counts, acceptance = pair.sample(generations, tree=4, **keywords)
    assert p_value(counts, pair.joint(Sampling(**keywords))) > LEAST_P
    assert 0 < acceptance < 1


@pytest.mark.parametrize("generations", GENERATIONS)
@pytest.mark.parametrize("expected", [(), (1, 1, 0, 2)], ids=["conversation", "expected"])
def test_real_loop_with_copies_beside_the_head(pair, generations, expected, monkeypatch):
    """Copies of what followed before, or of what is expected; the head where they end."""
    here = [3, 1, 4, 0, 2]
    prompt = here if expected else [*here, 2, *here]
    monkeypatch.setattr(sys.modules[__name__], "PROMPT", prompt)
    loop = sys.modules["mlx_drift.decode.responses"]
    monkeypatch.setattr(loop, "answer", partial(answer, expected=expected))
    both, sources = copy.copy(pair), Counter()
    both.drafter = CopyingDrafter(pair.drafter)
    monkeypatch.setattr(
        Statistics,
        "record_round",
        lambda self, round: (
            sources.update([round.source == "copy"] if round.tested else []),
            record_round(self, round),
        ),
    )
    counts, acceptance = both.sample(generations, temp=1.2)
    assert p_value(counts, both.joint(Sampling(temp=1.2))) > LEAST_P
    assert 0 < acceptance < 1
    assert min(sources[True], sources[False]) > generations / 10


def test_real_loop_fails_if_draft_probabilities_are_not_scattered(pair, monkeypatch):
    """Drawn in the drafter's own columns; only the token goes through `d2t`."""

    def unscattered(self, logits):
        return mx.pad(logits, ((0, 0), (0, SIZE - len(D2T))), constant_values=-math.inf)

    monkeypatch.setattr(ChainDrafter, "_spread", unscattered)
    counts, _ = pair.sample(SOME, temp=0.7)
    assert p_value(counts, pair.joint(Sampling(temp=0.7))) < CERTAINLY_WRONG


@pytest.mark.parametrize("generations", GENERATIONS)
def test_real_loop_with_an_opaque_sampler(pair, generations):
    """Nothing is known of its probabilities, and yet its distribution is kept."""
    known = Sampling(temp=1.3, top_k=4)
    keys = iter(mx.random.split(mx.random.key(6), 10 * generations))

    def sampler(log_probabilities):
        p = known.log_distribution(log_probabilities, mx.zeros(1))
        return mx.random.categorical(p, key=next(keys))

    counts, acceptance = pair.sample(generations, sampler=sampler)
    assert p_value(counts, pair.joint(known)) > LEAST_P
    assert 0 < acceptance < 1
