"""Processors with a state: what plain decoding gives, whatever drafts, and however many.

The whole grid is marked `long`: four kinds of state, four kinds of drafter, four numbers of drafts,
greedily against mlx-lm's plain loop, and sampled against the exact distribution (p > 0.001, with
fixed seeds).
"""

import copy
import itertools
from functools import cache
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from backend import ON_GPU
from chi_square import LEAST_P, p_value
from mlx_drift import make_prompt_cache, stream_generate
from mlx_drift.decode.chooser import Chooser
from mlx_drift.decode.sampling import Sampling
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.chain_config import MTPConfig
from mlx_drift.drafters.draft_model import DraftModelDrafter
from mlx_drift.drafters.mtp import MTPNetwork
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.target.model import Target
from stateful import (
    COUNT,
    EOS,
    PROMPT,
    SIZE,
    Automaton,
    Believed,
    Budget,
    Counter,
    Grammar,
    Text,
    plain,
    positions,
    say,
    small_llama,
    tokens_of,
)
from tiny import Scripted, tiny_drafter

TEMP = 1.3
FIRST = 4  # tokens whose joint distribution is tested
AUTO = [0, 0, 3, 1, 0, 2, 0, 0, 0, 4]  # as it may choose: stretches of plain decoding, and rounds

KINDS = {"counter": Counter, "automaton": Automaton, "budget": Budget, "grammar": Grammar}
DRAFTERS = ("eagle", "mtp", "lookup", "draft model")
BRANCHING = ("eagle", "mtp")
LENGTHS = (1, 3, 8, "auto")
GRID = list(itertools.product(KINDS, DRAFTERS, LENGTHS))
SAMPLE = [(k, d, LENGTHS[(i + j) % 4]) for i, k in enumerate(KINDS) for j, d in enumerate(DRAFTERS)]


def sampled_grid(sample):
    """The whole grid; what is not in the sample is marked `long`."""
    marks = {True: (), False: (pytest.mark.long,)}
    return [pytest.param(*case, marks=marks[case in sample]) for case in GRID]


@pytest.fixture(scope="module")
def model():
    return small_llama()


@pytest.fixture(scope="module")
def drafters(model):
    target = Target(model, (1, 2))
    # One of a reduced vocabulary: where none of its tokens is allowed, there is nothing to draft.
    d2t = mx.array([0, 1, 3, 5])
    base = tiny_drafter(model, draft_vocab_size=4, own_head=True)
    shape = target.shape
    block = {"model_type": "llama", "vocab_size": SIZE, "hidden_size": 16, "intermediate_size": 16}
    block |= {"num_hidden_layers": 2, "num_attention_heads": 2, "rms_norm_eps": 1e-5}
    config = MTPConfig(
        taps=(3,),
        hidden_size=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        target=shape,
        feedback="post",
        block=block,
    )
    mx.random.seed(8)
    head = MTPNetwork(config)
    mx.eval(head.parameters())
    return {
        "eagle": ChainDrafter(base.config, base.network, target, d2t),
        "mtp": ChainDrafter(config, head, Target(model, (3,))),
        "lookup": PromptLookupDrafter(model),
        "draft model": DraftModelDrafter(small_llama(num_hidden_layers=1), model),
    }


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    """What `auto` chooses hangs on time; here it goes to and fro for certain."""
    module = import_module("mlx_drift.generate")  # the package has a function of that name
    own = module.DraftLength

    def draft_length(fixed=None, **learned):
        return Scripted(AUTO) if fixed is None else own(fixed)

    monkeypatch.setattr(module, "DraftLength", draft_length)


@pytest.mark.skipif(ON_GPU, reason="bit for bit where rows do not see each other's rounding")
@pytest.mark.parametrize(("kind", "drafter", "k"), sampled_grid(SAMPLE))
def test_greedy_text_is_mlx_lms(model, drafters, kind, drafter, k):
    expected = plain(model, PROMPT, KINDS[kind]())
    processor = KINDS[kind](strict=True)
    responses = say(model, drafters[drafter], k, processor)
    assert tokens_of(responses) == expected
    assert processor.seen == positions(len(expected))


@pytest.mark.skipif(ON_GPU, reason="bit for bit where rows do not see each other's rounding")
@pytest.mark.parametrize(("kind", "drafter"), list(itertools.product(KINDS, BRANCHING)))
def test_greedy_text_of_trees_is_mlx_lms(model, drafters, kind, drafter):
    expected = plain(model, PROMPT, KINDS[kind]())
    processor = KINDS[kind](strict=True)
    responses = say(model, drafters[drafter], 5, processor, tree=6)
    assert tokens_of(responses) == expected
    assert processor.seen == positions(len(expected))
    assert responses[-1].statistics.ranks
    assert any(response.from_draft for response in responses)


@pytest.fixture(scope="module")
def joint(model):
    """The exact distribution of the first tokens; after the end there are ends."""

    @cache
    def of(kind):
        probabilities = np.zeros(SIZE**FIRST)

        def follow(said, processor, chance):
            if len(said) == FIRST or said[-1:] == [EOS]:
                probabilities[cell(said)] += chance
                return
            tokens = mx.array(PROMPT + said)
            logits = processor(tokens, model(tokens[None])[:, -1])
            p = np.exp(np.array(logits[0], dtype=np.float64) / TEMP)
            for token, part in enumerate(p / p.sum()):
                if part:
                    follow([*said, token], fork_of(processor), chance * part)

        follow([], KINDS[kind](), 1.0)
        return probabilities

    return of


def cell(said):
    return np.ravel_multi_index((said + [EOS] * FIRST)[:FIRST], [SIZE] * FIRST)


def fork_of(processor):
    if isinstance(processor, Grammar):
        matcher = processor.matcher.deep_copy()
        return copy.deepcopy(processor, {id(processor.matcher): matcher})
    return copy.deepcopy(processor)


def counts_of(model, drafter, k, make, generations, **keywords):
    counts, keywords = np.zeros(SIZE**FIRST), keywords | {"count": FIRST, "temp": TEMP}
    for seed in range(generations):
        processor = make()
        responses = say(model, drafter, k, processor, seed=seed, **keywords)
        counts[cell(tokens_of(responses))] += 1
        assert processor.seen == positions(len(responses))
    return counts


SAMPLED = [("counter", "eagle", 3), ("grammar", "draft model", "auto")]


@pytest.mark.parametrize(("kind", "drafter", "k"), sampled_grid(SAMPLED))
def test_sampled_text_has_the_targets_distribution(model, drafters, joint, kind, drafter, k):
    generations = 80 if (kind, drafter, k) in SAMPLED else 300
    counts = counts_of(model, drafters[drafter], k, KINDS[kind], generations)
    assert p_value(counts, joint(kind)) > LEAST_P


@pytest.mark.parametrize(("kind", "drafter"), [("automaton", "mtp"), ("budget", "eagle")])
def test_sampled_text_of_trees_has_the_targets_distribution(model, drafters, joint, kind, drafter):
    counts = counts_of(model, drafters[drafter], 4, KINDS[kind], 100, tree=5)
    assert p_value(counts, joint(kind)) > LEAST_P


def test_one_that_is_asked_about_every_row_gives_another_text(model, drafters, joint):
    """So the tests above can fail."""
    drafter = drafters["draft model"]
    assert tokens_of(say(model, drafter, 3, Believed())) != plain(model, PROMPT, Counter())
    sampled = {"count": FIRST, "temp": TEMP}
    texts = [tokens_of(say(model, drafter, 3, Believed(), seed=i, **sampled)) for i in range(10)]
    assert min(joint("counter")[cell(text)] for text in texts) == 0


def test_a_drafter_that_leaves_drafts_out_asks_no_processor(model):
    """Which would have missed a position."""
    processor = Automaton(strict=True)
    processor(mx.array(PROMPT), mx.zeros((1, SIZE)))
    history = mx.array([*PROMPT, 4])
    chooser = Chooser(Sampling(logits_processors=(processor,)), 3, history=history)
    logits = mx.array([[9.0, 0, 0, 0, 0, 0]])
    token, _ = chooser.draft(logits, [])
    assert token.item() == 1  # no 0 may come there
    assert chooser.draft(logits, [token, mx.array([0])])[0].item() == 0
    assert processor.seen == positions(1)


# What takes part in more than one answer.


@pytest.mark.skipif(ON_GPU, reason="bit for bit where rows do not see each other's rounding")
@pytest.mark.parametrize("k", [3, "auto"])
@pytest.mark.parametrize("after", [1, 4, 9, COUNT])
def test_turns_and_answers_that_are_broken_off(model, drafters, k, after):
    """The caller's object has seen what the prompt cache has, whatever was under way."""
    drafter = drafters["draft model"]
    cache = make_prompt_cache(model, drafter)
    processor, prompt = Counter(), PROMPT
    for _ in range(2):
        first = len(processor.seen)
        answer = stream_generate(
            model,
            Text(),
            prompt,
            COUNT,
            drafter=drafter,
            num_draft_tokens=k,
            logits_processors=[processor],
            prompt_cache=cache,
        )
        said = [response.token for response in itertools.islice(answer, after)]
        answer.close()
        committed = len(cache.tokens) - len(prompt)
        assert processor.seen[first:] == positions(committed, prompt)
        expected = Counter()
        expected.seen = [0] * first
        assert said == plain(model, prompt, expected)[: len(said)]
        prompt = [*cache.tokens, 2]


def test_a_sampler_with_a_state_draws_as_in_plain_decoding(model, drafters):
    """So a seed gives mlx-lm's text: it is called for what is committed, not for every row."""

    class Drawing:
        def __init__(self):
            self.calls = 0

        def __call__(self, log_probabilities):
            self.calls += 1
            return mx.random.categorical(log_probabilities, key=mx.random.key(self.calls))

    expected = plain(model, PROMPT, sampler=Drawing())
    for drafter, k in itertools.product(DRAFTERS, (3, "auto")):
        sampler = Drawing()
        assert tokens_of(say(model, drafters[drafter], k, sampler=sampler)) == expected
        assert sampler.calls == len(expected)
