"""Processors with a state: what plain decoding gives, whatever drafts, and however many.

The whole grid is marked `long`: four kinds of state, four kinds of drafter, four numbers of drafts,
greedily against mlx-lm's plain loop, and sampled against the exact distribution (p > 0.001, with
fixed seeds).
"""

import copy
import itertools
import warnings
from functools import cache, partial
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from backend import ON_GPU
from chi_square import LEAST_P, p_value
from mlx_drift import DriftWarning, make_prompt_cache, stream_generate
from mlx_drift.decode.accept import accept_matching
from mlx_drift.decode.fork import fork, unforkable
from mlx_drift.decode.sampling import Chooser, Sampling
from mlx_drift.decode.stateless import is_stateless
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.config import MTPConfig
from mlx_drift.drafters.draft_model import DraftModelDrafter
from mlx_drift.drafters.mtp import MTPNetwork
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.drafters.protocol import Draft
from mlx_drift.target.model import Target
from tiny import NoText, Scripted, tiny_drafter, tiny_llama

SIZE, EOS = 6, 5  # of the vocabulary; five letters, and what ends a text
PROMPT = [3, 1, 4, 1, 2]
COUNT = 48
TEMP = 1.3
FIRST = 4  # tokens whose joint distribution is tested
AUTO = [0, 0, 3, 1, 0, 2, 0, 0, 0, 4]  # as it may choose: stretches of plain decoding, and rounds


class Stateful:
    """Sees every committed position once, in order, and says what may come there.

    Attributes:
        seen: How many tokens there were at each call.
        strict: Raise at a token that was not allowed, or after the last: no text of a plain loop,
            but for the step that it is ahead.
    """

    def __init__(self, strict=False):
        self.strict = strict
        self.seen = []
        self.may_come = [True] * SIZE

    def __call__(self, tokens, logits):
        if self.seen:
            last = tokens[-1].item()
            assert not self.strict or (self.may_come[last] and last != EOS)
            self.advance(last)
        self.seen.append(tokens.size)
        self.may_come = self.allowed()
        return mx.where(mx.array(self.may_come), logits, -mx.inf)


class Counter(Stateful):
    """Every third token is the first letter, and no other is."""

    def advance(self, token):
        pass

    def allowed(self):
        third = len(self.seen) % 3 == 0
        return [(token == 0) == third for token in range(SIZE)]


class Automaton(Stateful):
    """What may come hangs on the tokens before by a table; it forks by itself."""

    state = 0

    def fork(self):
        other = Automaton(self.strict)
        other.seen, other.may_come, other.state = self.seen[:], self.may_come, self.state
        return other

    def advance(self, token):
        self.state = (2 * self.state + token) % 4

    def allowed(self):
        return [(self.state + token) % 3 != 0 for token in range(SIZE)]


class Budget(Stateful):
    """Four tokens of thought after a 1, at most: then comes a 2, and no end before it."""

    thought = None

    def advance(self, token):
        if token == 1 and self.thought is None:
            self.thought = 0
        elif token == 2:
            self.thought = None
        elif self.thought is not None:
            self.thought += 1

    def allowed(self):
        if self.thought is None:
            return [token != EOS for token in range(SIZE)]
        return [token == 2 if self.thought == 4 else token != EOS for token in range(SIZE)]


class Letters:
    """The vocabulary, as llguidance asks for it."""

    eos_token_id, bos_token_id, special_token_ids = EOS, None, (EOS,)
    tokens = (b"a", b"b", b"c", b"d", b"e", b"<eos>")

    def __call__(self, text):
        return [self.tokens.index(bytes([letter])) for letter in text]


@cache
def grammar():
    llguidance = pytest.importorskip("llguidance")  # of the dev extra
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Letters()))
    rule = llguidance.LLMatcher.grammar_from_regex("(a[bc]?[de]+|[bd]c(ab)*){1,12}")
    return llguidance.LLMatcher(tokenizer, rule)


class Grammar(Stateful):
    """llguidance's matcher, which cannot be pickled but has a `deep_copy`."""

    def __init__(self, strict=False):
        super().__init__(strict)
        self.matcher = grammar().deep_copy()

    def advance(self, token):
        assert self.matcher.consume_token(token)

    def allowed(self):
        mask = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(mask, bitorder="little")[:SIZE].astype(bool).tolist()


KINDS = {"counter": Counter, "automaton": Automaton, "budget": Budget, "grammar": Grammar}
DRAFTERS = ("eagle", "mtp", "lookup", "draft model")
LENGTHS = (1, 3, 8, "auto")
GRID = list(itertools.product(KINDS, DRAFTERS, LENGTHS))
SAMPLE = [(k, d, LENGTHS[(i + j) % 4]) for i, k in enumerate(KINDS) for j, d in enumerate(DRAFTERS)]


def sampled_grid(sample):
    """The whole grid; what is not in the sample is marked `long`."""
    marks = {True: (), False: (pytest.mark.long,)}
    return [pytest.param(*case, marks=marks[case in sample]) for case in GRID]


class Text(NoText):
    eos_token_ids = frozenset([EOS])


def small_llama(**overrides):
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_llama(vocab_size=SIZE, **sizes | overrides)


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

    def draft_length(fixed=None, costs=None):
        return Scripted(AUTO) if fixed is None else own(fixed)

    monkeypatch.setattr(module, "DraftLength", draft_length)


def plain(model, prompt, *processors, count=COUNT, **keywords):
    """What mlx-lm's plain loop gives."""
    steps = generate_step(
        mx.array(prompt), model, max_tokens=count, logits_processors=list(processors), **keywords
    )
    tokens = [int(token) for token, _ in steps]
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def say(model, drafter, k, *processors, prompt=PROMPT, count=COUNT, **keywords):
    return list(
        stream_generate(
            model,
            Text(),
            prompt,
            count,
            drafter=drafter,
            num_draft_tokens=k,
            logits_processors=processors,
            **keywords,
        )
    )


def tokens_of(responses):
    return [response.token for response in responses]


def positions(count, prompt=PROMPT):
    return list(range(len(prompt), len(prompt) + count))


@pytest.mark.skipif(ON_GPU, reason="bit for bit where rows do not see each other's rounding")
@pytest.mark.parametrize(("kind", "drafter", "k"), sampled_grid(SAMPLE))
def test_greedy_text_is_mlx_lms(model, drafters, kind, drafter, k):
    expected = plain(model, PROMPT, KINDS[kind]())
    processor = KINDS[kind](strict=True)
    responses = say(model, drafters[drafter], k, processor)
    assert tokens_of(responses) == expected
    assert processor.seen == positions(len(expected))


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


def counts_of(model, drafter, k, make, generations):
    counts = np.zeros(SIZE**FIRST)
    for seed in range(generations):
        processor = make()
        responses = say(model, drafter, k, processor, count=FIRST, temp=TEMP, seed=seed)
        counts[cell(tokens_of(responses))] += 1
        assert processor.seen == positions(len(responses))
    return counts


SAMPLED = [("counter", "eagle", 3), ("grammar", "draft model", "auto")]


@pytest.mark.parametrize(("kind", "drafter", "k"), sampled_grid(SAMPLED))
def test_sampled_text_has_the_targets_distribution(model, drafters, joint, kind, drafter, k):
    generations = 80 if (kind, drafter, k) in SAMPLED else 300
    counts = counts_of(model, drafters[drafter], k, KINDS[kind], generations)
    assert p_value(counts, joint(kind)) > LEAST_P


class Believed(Counter):
    """Marked for what it is not."""

    stateless = True


def test_one_that_is_asked_about_every_row_gives_another_text(model):
    """So the tests above can fail."""
    drafter = PromptLookupDrafter(model)
    assert tokens_of(say(model, drafter, 3, Believed())) != plain(model, PROMPT, Counter())


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


# Which keep a state, and which of those can be forked.


def counting():
    calls = 0

    def processor(tokens, logits):
        nonlocal calls
        calls += 1
        return mx.where(mx.arange(SIZE) == calls % EOS, logits, -mx.inf)

    return processor


calls_so_far: list[int] = []
number_of_calls = 0


def every_other(number, logits):
    return mx.where(mx.arange(SIZE) == 1 + number % 2, logits, -mx.inf)


def with_a_global_list(tokens, logits):
    calls_so_far.append(1)
    return every_other(len(calls_so_far), logits)


def with_a_global_number(tokens, logits):
    global number_of_calls
    number_of_calls += 1
    return every_other(number_of_calls, logits)


def with_a_default(tokens, logits, calls=[]):  # noqa: B006
    calls.append(1)
    return every_other(len(calls), logits)


def with_an_attribute(tokens, logits):
    with_an_attribute.calls = getattr(with_an_attribute, "calls", 0) + 1
    return every_other(with_an_attribute.calls, logits)


class Counting:
    def __init__(self, **held):
        self.calls = 0
        vars(self).update(held)

    def __call__(self, tokens, logits):
        self.calls += 1
        return every_other(self.calls, logits)


class InItsClass:
    calls: list[int] = []  # noqa: RUF012

    def __call__(self, tokens, logits):
        self.calls.append(1)
        return every_other(len(self.calls), logits)


class InAGlobal:
    def __call__(self, tokens, logits):
        global number_of_calls
        number_of_calls += 1
        return every_other(number_of_calls, logits)


class Refusing(Counting):
    def fork(self):
        raise NotImplementedError


def forget():
    global number_of_calls
    number_of_calls = 0
    for calls in (calls_so_far, InItsClass.calls, with_a_default.__defaults__[0]):
        calls.clear()
    vars(with_an_attribute).clear()


UNFORKABLE = {
    "a cell": counting,
    "a global list": lambda: with_a_global_list,
    "a global number": lambda: with_a_global_number,
    "a default": lambda: with_a_default,
    "an attribute": lambda: with_an_attribute,
    "a partial of one": lambda: partial(counting()),
    "in its class": InItsClass,
    "in a global": InAGlobal,
    "held": lambda: Counting(step=counting()),
    "a generator": lambda: Counting(held=iter(x for x in [1])),
    "refuses": Refusing,
}


@pytest.mark.parametrize("name", UNFORKABLE)
def test_what_cannot_be_forked_is_decoded_plainly(model, drafters, name):
    make = UNFORKABLE[name]
    forget()
    expected = plain(model, PROMPT, make(), count=12)
    forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        responses = say(model, drafters["eagle"], 3, make(), count=12)
    assert tokens_of(responses) == expected
    assert responses[-1].statistics.rounds == 0
    assert [w.category for w in caught] == [DriftWarning]
    assert "stateless = True" in str(caught[0].message)


def test_a_state_is_copied_once_for_all_who_share_it():
    shared = Counting()

    class Reader:
        __slots__ = ("counting", "network")

        def __call__(self, tokens, logits):
            return logits + self.counting.calls

    reader = Reader()
    reader.counting, reader.network = shared, nn.Module()
    forked, of_shared, method = fork([reader, shared, shared.__call__])
    assert forked.counting is of_shared is method.__self__ is not shared
    assert forked.network is reader.network
    of_shared(mx.array([1]), mx.zeros((1, SIZE)))
    assert (of_shared.calls, shared.calls) == (1, 0)


def test_llguidances_matcher_is_copied():
    processor = Grammar()
    processor(mx.array(PROMPT), mx.zeros((1, SIZE)))
    (forked,) = fork([processor])
    forked(mx.array([*PROMPT, 0]), mx.zeros((1, SIZE)))
    assert forked.may_come != processor.may_come == Grammar().allowed()


def test_what_a_wrapper_of_one_holds_is_copied_or_shared():
    """As outlines' processors do: matchers in a list, a tokenizer, a module, their own method."""
    llguidance = pytest.importorskip("llguidance")

    class Adapter:
        def __init__(self):
            self.library = np

    class Wrapper:
        def __init__(self):
            self.tokenizer = llguidance.LLTokenizer("byte")
            self.matchers = [grammar().deep_copy()]
            self.adapter, self.step = Adapter(), self.advance

        def advance(self, token):
            return self.matchers[0].consume_token(token)

        def __call__(self, tokens, logits):
            assert self.step(tokens[-1].item())
            return logits

    wrapper = Wrapper()
    (forked,) = fork([wrapper])
    forked(mx.array([0]), mx.zeros((1, SIZE)))
    fresh = grammar().compute_bitmask()
    assert forked.matchers[0].compute_bitmask() != fresh == wrapper.matchers[0].compute_bitmask()
    assert forked.tokenizer is wrapper.tokenizer


def biased(tokens, logits, bias=1.5):
    return logits + bias * (mx.arange(SIZE) == 2)


def scaled(factor):
    def processor(tokens, logits):
        logits[:, 1:3] = sum(x * factor for x in [logits[:, 1:3]])
        return biased(tokens, logits)

    return processor


def marked():
    processor = counting()
    processor.stateless = True
    return processor


PENALTIES = make_logits_processors({1: 2.0}, 1.1, 20, 0.3, 20, 0.2)


KEEPING_NOTHING = [*PENALTIES, make_sampler(1.0), make_sampler(0), biased, scaled(2.0), Believed()]
KEEPING_NOTHING += [mx.compile(biased), partial(biased, bias=3.0), marked()]
KEEPING_NOTHING += [lambda tokens, logits: mx.abs(logits)]


@pytest.mark.parametrize("function", KEEPING_NOTHING)
def test_what_keeps_nothing_is_seen_to(function):
    assert is_stateless(function)
    assert unforkable([function]) is None
    assert fork([function]) == [function]


def primitives(path, *arrays):
    mx.export_to_dot(str(path), *arrays)
    return path.read_text().count("shape=rectangle")


def test_mlx_lms_own_cost_a_round_their_own_work_alone(tmp_path):
    history, draft, logits = mx.array(PROMPT), mx.array([1, 2, 1]), mx.ones((4, SIZE))
    chooser = Chooser(Sampling(logits_processors=tuple(PENALTIES)), 3, history=history)
    mx.eval(history, draft, logits)
    rows = []
    for i in range(4):
        row = logits[i : i + 1]
        for processor in PENALTIES:
            seen = mx.concatenate([history, *(draft[j : j + 1] for j in range(i))])
            row = processor(seen, mx.array(row))
        rows.append(row)
    row = mx.concatenate(rows)
    row = row - mx.logsumexp(row, axis=-1, keepdims=True)
    decided = accept_matching(draft, mx.argmax(row, axis=-1))
    got = chooser.verify(Draft(draft), logits)
    # A round shares the slices of the draft between its rows.
    assert primitives(tmp_path / "got", *got) <= primitives(tmp_path / "own", decided, row)


@pytest.mark.parametrize("make", [*UNFORKABLE.values(), Counting, Counter, Grammar])
def test_what_may_keep_a_state_is_seen_to(make):
    assert not is_stateless(make())


def test_drawing_at_random_is_a_state():
    assert not is_stateless(lambda logits: mx.random.categorical(logits))
