"""Stretches of plain decoding between the rounds: the same tokens, the same caches after them."""

from importlib import import_module
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors

from backend import assert_same, assert_same_rows
from families import build
from mlx_drift import (
    DriftError,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    stream_generate,
)
from mlx_drift.decode import plain
from mlx_drift.decode.sampling import GREEDY, Sampling
from mlx_drift.decode.speculate import speculate
from mlx_drift.target.model import Target
from tiny import NoText, Oracle, Scripted, plain_greedy, tiny_drafter, tiny_llama

PROMPT = [5, 9, 2, 44, 17, 3, 60]
LENGTH = 24
SCRIPTS = [[0], [0, 3, 3], [0, 0, 2, 2], [4, 0, 0, 0, 1, 1], [0, 0, 0, 0, 5, 5, 5]]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def text(model):
    return PROMPT + plain_greedy(model, PROMPT, LENGTH + 10)


class Decoding:
    """A decoding of `text` through an oracle, as a script says."""

    def __init__(self, model, text, script, *, count=LENGTH, stop=frozenset(), sampling=GREEDY):
        drafter = Oracle(text, [set(), {0}, {1}, {2}])
        self.target = Target(model, drafter.taps)
        self.cache, self.drafter_cache = self.target.make_cache(), drafter.make_cache()
        _, taps = self.target(mx.array(PROMPT[:-1]), self.cache)
        drafter.ingest(mx.array(PROMPT[1:]), taps, self.drafter_cache)
        self.rounds = speculate(
            self.target,
            drafter,
            mx.array(PROMPT[-1:]),
            self.cache,
            self.drafter_cache,
            num_draft_tokens=Scripted(script),
            max_tokens=count,
            stop_tokens=stop,
            sampling=sampling,
            history=PROMPT,
        )

    def check_caches(self, committed):
        """The target has a row for every token but the last, the drafter one but for the first."""
        fresh = Target(self.target.model, self.target.taps)
        reference = fresh.make_cache()
        _, taps = fresh(mx.array(committed[:-1]), reference)
        assert self.drafter_cache.tokens == committed
        assert_same(mx.concatenate(self.drafter_cache.taps), taps)
        assert_same_rows(self.cache, reference)


@pytest.mark.parametrize("script", SCRIPTS)
def test_equals_plain_greedy(model, text, script):
    decoding = Decoding(model, text, script)
    rounds = list(decoding.rounds)
    assert [t for r in rounds for t in r.tokens] == text[len(PROMPT) :][:LENGTH]
    assert any(r.is_plain for r in rounds)
    assert any(r.accepted for r in rounds) == (script != [0])
    decoding.check_caches(text[: len(PROMPT) + LENGTH])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("after", [1, 2, 3, 4, 7])
def test_closed_after_any_round_it_takes_back_what_is_under_way(model, text, script, after):
    decoding = Decoding(model, text, script)
    tokens = [token for _ in range(after) for token in next(decoding.rounds).tokens]
    decoding.rounds.close()
    decoding.check_caches(PROMPT + tokens)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("position", range(6))
def test_a_stop_token_takes_back_what_is_under_way(model, text, script, position):
    stop = text[len(PROMPT) + position]
    end = text.index(stop, len(PROMPT)) + 1
    decoding = Decoding(model, text, script, stop={stop})
    assert [t for r in decoding.rounds for t in r.tokens] == text[len(PROMPT) : end]
    decoding.check_caches(text[:end])


class Waiting(Scripted):
    """Begins no plain step before the token that it follows is known."""

    def is_ahead(self):
        return False


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("after", [1, 2, 3, 7, LENGTH])
def test_a_step_that_waits_gives_the_same_tokens_and_caches(
    model, text, script, after, monkeypatch
):
    monkeypatch.setitem(globals(), "Scripted", Waiting)
    decoding = Decoding(model, text, script)
    said = []
    while len(said) < after:
        round = next(decoding.rounds)
        said += round.tokens
    decoding.rounds.close()
    assert said == text[len(PROMPT) :][: len(said)]
    decoding.check_caches(PROMPT + said)


def test_no_more_taps_are_kept_than_the_bound(model, text, monkeypatch):
    monkeypatch.setattr(plain, "MOST_PENDING", 5)
    decoding = Decoding(model, text, [0])
    list(decoding.rounds)
    assert max(taps.shape[0] for taps in decoding.drafter_cache.taps[1:]) == 5
    decoding.check_caches(text[: len(PROMPT) + LENGTH])


def test_the_next_step_is_under_way_when_a_token_is_read(model, text, monkeypatch):
    decoding = Decoding(model, text, [0])
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, lambda *a, name=name: pytest.fail(f"mx.{name} in a stretch"))
    rows = [decoding.cache[0].offset for _ in decoding.rounds]
    last = len(PROMPT) + LENGTH - 1
    assert rows == [*range(len(PROMPT) + 1, last + 1), last]


def test_processors_see_the_history(model, text):
    processors = make_logits_processors(repetition_penalty=1.7, repetition_context_size=6)
    steps = generate_step(
        mx.array(PROMPT), model, max_tokens=LENGTH + 8, logits_processors=processors
    )
    said = PROMPT + [int(token) for token, _ in steps]
    assert said[: LENGTH + 7] != text[: LENGTH + 7]
    sampling = Sampling(logits_processors=tuple(processors))
    for script in SCRIPTS:
        rounds = Decoding(model, said, script, sampling=sampling).rounds
        assert [t for r in rounds for t in r.tokens] == said[len(PROMPT) :][:LENGTH]


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "gemma3_text"])
def test_a_conversation_goes_on_after_an_answer_that_was_broken_off(family, monkeypatch):
    """Recurrent states and sliding windows included."""
    model = build(family)
    drafter = tiny_drafter(model)
    module = import_module("mlx_drift.generate")  # the package has a function of that name
    monkeypatch.setattr(module, "DraftLength", lambda fixed: Scripted([0, 0, 0, 2, 2]))
    said = plain_greedy(model, PROMPT, 12)
    cache = make_prompt_cache(model, drafter)
    answer = stream_generate(model, NoText(), PROMPT, drafter=drafter, prompt_cache=cache)
    begun = [next(answer).token for _ in range(2)]
    assert begun == said[:2]
    del answer  # nobody says that it is closed
    assert cache.tokens == PROMPT + begun
    rest = stream_generate(model, NoText(), cache.tokens, 10, drafter=drafter, prompt_cache=cache)
    assert [response.token for response in rest] == said[2:]
    assert cache.reuse == "extended"


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_conversation_goes_on_though_an_old_answer_was_never_closed(
    family, monkeypatch, tmp_path
):
    model = build(family)
    drafter = tiny_drafter(model)
    module = import_module("mlx_drift.generate")
    monkeypatch.setattr(module, "DraftLength", lambda fixed: Scripted([0]))
    cache = make_prompt_cache(model, drafter)
    old = stream_generate(model, NoText(), PROMPT, drafter=drafter, prompt_cache=cache)
    for _ in range(3):
        next(old)
    with pytest.raises(DriftError, match="ahead of an answer under way"):
        save_prompt_cache(tmp_path / "cache.safetensors", cache)
    prompt = [*cache.tokens, 7, 8]
    said = plain_greedy(model, prompt, 6)
    new = stream_generate(model, NoText(), prompt, 3, drafter=drafter, prompt_cache=cache)
    assert [response.token for response in new] == said[:3]
    with pytest.raises(DriftError, match="used for another prompt"):
        next(old)
    old.close()
    rest = stream_generate(model, NoText(), cache.tokens, 3, drafter=drafter, prompt_cache=cache)
    assert [response.token for response in rest] == said[3:]
    save_prompt_cache(tmp_path / "cache.safetensors", cache)
    assert load_prompt_cache(tmp_path / "cache.safetensors", model, drafter).tokens == cache.tokens


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_only_tokens_that_overlap_with_the_next_step_are_timed(model, count):
    """The first of a stretch waits for its whole step, which is told; the last starts no other."""

    class Timed(Scripted):
        def record_plain(self, seconds, *, waited):
            told.append((seconds is not None, waited))

    told = []
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    cache.draft_length = Timed([0])
    keywords = {"drafter": drafter, "prompt_cache": cache, "num_draft_tokens": "auto"}
    assert len(list(stream_generate(model, NoText(), PROMPT, count, **keywords))) == count
    assert told == [(i < max(1, count - 1), not i) for i in range(count)]


def test_after_a_short_answer_it_is_what_was_timed_and_not_one_tokens_time(model, monkeypatch):
    caches = import_module("mlx_drift.decode.prompt_cache")
    monkeypatch.setattr(caches, "time_plain_steps", lambda *_: 7.0)
    for count in (1, 2, 3, 6):
        drafter = tiny_drafter(model)
        keywords = {"drafter": drafter, "num_draft_tokens": "auto", "compare_plain": True}
        *_, last = stream_generate(model, NoText(), PROMPT, count, **keywords)
        assert last.statistics.plain_step_seconds == 7.0


def test_what_other_work_adds_to_most_runs_does_not_count(model, monkeypatch):
    """Nor what the first takes, in which a process warms up."""
    ticks = iter([second for took in (90, 3, 30, 60, 6, 45) for second in (0.0, took)])
    monkeypatch.setattr(plain, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    target = Target(model)
    cache = target.make_cache()
    target(mx.array(PROMPT), cache)
    assert plain.time_plain_steps(target, mx.array([1]), cache) == 6 / plain.PLAIN_STEPS


def test_a_cache_that_went_on_to_another_prompt_is_not_timed(model):
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    keywords = {"drafter": drafter, "prompt_cache": cache}
    first = stream_generate(model, NoText(), PROMPT, 3, **keywords, compare_plain=True)
    responses = [next(first) for _ in range(3)]
    second = stream_generate(model, NoText(), [9, 8, 7], 9, **keywords)
    said = [next(second).token]
    assert list(first) == []  # it is whole, and nothing of it is told a second time
    assert responses[-1].statistics.plain_step_seconds is None
    said += [response.token for response in second]
    assert said == plain_greedy(model, [9, 8, 7], 9)
