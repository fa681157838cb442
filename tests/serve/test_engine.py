"""The engine: exact whatever is interleaved, fair by device time, nobody stuck, bytes bounded."""

import random
import threading

import mlx.core as mx
import pytest

from families import build
from mlx_drift import load_demo
from mlx_drift.decode.sampling import Sampling
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.serve.conversation import Conversation
from mlx_drift.serve.request import Busy, Ended, Failed, Piece, Request
from serving import Heard, ask, engine, loaded
from tiny import VOCAB, plain_greedy, tiny_drafter, tiny_llama

CLIENTS = 8


def tiny(family, **settings):
    model = tiny_llama() if family == "llama" else build(family)
    return loaded(model, tiny_drafter(model), **settings)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def test_what_is_read_and_said_is_found_again(llama):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    with engine() as running:
        first, _ = ask(running, llama, prompt)
        assert first.wait().usage.cached_tokens == 0
        assert first.tokens == plain_greedy(llama.model, prompt, 12)
        follow = [*prompt, *first.tokens, 7, 8]
        second, _ = ask(running, llama, follow)
        assert second.wait().usage.cached_tokens == len(prompt) + 12 - 1
        assert second.tokens == plain_greedy(llama.model, follow, 12)
        again, _ = ask(running, llama, prompt)  # it branches off from what went on
        assert again.wait().usage.cached_tokens == len(prompt) - 2  # the first draft needs a row
        assert again.tokens == first.tokens
        third, _ = ask(running, llama, [*follow, *second.tokens, 9])  # which is still there
        assert third.wait().usage.cached_tokens == len(follow) + 12 - 1


def test_trees_take_turns():
    model = tiny("llama", tree=6)
    prompts = [[3, 1, 4, 1, 5, i] for i in range(4)]
    with engine() as running:
        heard = [ask(running, model, prompt, 30)[0] for prompt in prompts]
        chain, _ = ask(running, model, prompts[0], 30, num_draft_tokens=2)
        drawn = [
            ask(running, model, prompts[1], seed=3, sampling=Sampling(temp=0.8))[0]
            for _ in range(2)
        ]
        for one in (*heard, chain, *drawn):
            assert isinstance(one.wait(), Ended)
        for prompt, one in zip(prompts, heard, strict=True):
            assert one.tokens == plain_greedy(model.model, prompt, 30)
        assert chain.tokens == heard[0].tokens
        assert drawn[0].tokens == drawn[1].tokens
        follow = [*prompts[2], *heard[2].tokens, 9]
        again, _ = ask(running, model, follow, 30)
        assert again.wait().usage.cached_tokens == len(follow) - 2
        assert again.tokens == plain_greedy(model.model, follow, 30)


def test_a_prompt_that_is_being_read_is_waited_for_and_forked(llama):
    """Vendors' servers read the same prompt once for each of several choices."""
    prompt = [i * 7 % VOCAB for i in range(900)]
    with engine() as running:
        heard = [ask(running, llama, [*prompt, i])[0] for i in range(4)]
        ended = [h.wait() for h in heard]
        for i, h in enumerate(heard):
            assert h.tokens == plain_greedy(llama.model, [*prompt, i], 12)
    assert [e.usage.cached_tokens for e in ended[1:]] == [899] * 3


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss"])
def test_what_cannot_be_trimmed_is_kept_where_prompts_part(family):
    model = tiny(family)
    assert model.footprint.copies
    system = [i * 5 % VOCAB for i in range(400)]
    with engine() as running:
        for i in range(3):  # without a mark: the second finds where they part, the third uses it
            heard, _ = ask(running, model, [*system, i, i, i])
            cached = heard.wait().usage.cached_tokens
            assert heard.tokens == plain_greedy(model.model, [*system, i, i, i], 12)
        assert cached == len(system) - 1
        other = [60, *system]
        for i in range(2):  # with a mark
            heard, _ = ask(running, model, [*other, i, i], marks=(len(other),))
            cached = heard.wait().usage.cached_tokens
        assert cached == len(other) - 1


def conversations(rng, number, vocabulary=VOCAB):
    """Random prompts that build on each other: turns, edits, repeats; how many tokens were met."""
    systems = [[rng.randrange(vocabulary) for _ in range(rng.randint(20, 80))] for _ in range(3)]
    prompts = []
    for _ in range(number):
        kind = rng.random()
        if not prompts or kind < 0.25:
            base = rng.choice(systems)
        elif kind < 0.4:
            prompts.append(rng.choice(prompts))
            continue
        else:
            base = rng.choice(prompts)
            if kind < 0.6:
                base = base[: rng.randrange(2, len(base))]
        prompts.append([*base, *(rng.randrange(vocabulary) for _ in range(rng.randint(1, 12)))])
    return prompts


def run_conversations(model, number, seed, bound, lengths, vocabulary=VOCAB):
    """Runs them over clients that leave at random moments; checks what was said.

    Every greedy answer is what mlx-lm says on a fresh cache, of one that was left the beginning.
    """
    rng = random.Random(seed)
    prompts = conversations(rng, number, vocabulary)
    waiting, lock, failures, cached = list(enumerate(prompts)), threading.Lock(), [], 0
    done = []
    with engine(bound) as running:

        def client(rng):
            nonlocal cached
            while True:
                with lock:
                    if not waiting:
                        return
                    _, prompt = waiting.pop(0)
                count, leaves = rng.choice(lengths), rng.random() < 0.2
                heard, ticket = ask(running, model, prompt, count)
                if leaves:
                    moment = rng.randrange(4)

                    def leave(event, heard=heard, ticket=ticket, moment=moment):
                        if len(heard.events) > moment:
                            running.cancel([ticket])

                    heard.on_event = leave
                ended = heard.wait()
                with lock:
                    done.append((prompt, count, heard.tokens, leaves, ended))

        threads = [
            threading.Thread(target=client, args=(random.Random(seed + i),)) for i in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        most = running.metrics.registry.get_sample_value("mlx_drift_cache_bytes_most")
    assert most <= bound
    for prompt, count, tokens, leaves, ended in done:
        expected = plain_greedy(model.model, prompt, count)
        ends = [i for i, token in enumerate(expected) if token in model.tokenizer.eos_token_ids]
        expected = expected[: ends[0]] if ends else expected  # which no piece tells
        if leaves and isinstance(ended, Failed):
            assert ended.kind == "cancelled"
            assert tokens == expected[: len(tokens)]
            continue
        assert isinstance(ended, Ended), ended
        if tokens != expected:
            failures.append((prompt, tokens, expected))
        cached += ended.usage.cached_tokens
    assert not failures
    return cached


TARGETS = ["llama", "gpt_oss", "qwen3_next"]


@pytest.mark.parametrize("family", TARGETS)
def test_random_conversations(family):
    assert run_conversations(tiny(family), 24, 1, 1 << 30, (4, 12)) > 0


BOUNDS = {"roomy": lambda model: 1 << 30, "tight": lambda model: 4 * model.footprint.bytes(300)}
"""Of the caches' bytes. So few that conversations have to leave, in the second."""


@pytest.mark.long
@pytest.mark.parametrize("family", TARGETS)
def test_more_random_conversations(family):
    model = tiny(family, k="auto")
    assert run_conversations(model, 100, 2, BOUNDS["tight"](model), (1, 4, 12, 30)) > 0


@pytest.mark.hours
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("k", [3, "auto", 0])
@pytest.mark.parametrize("family", [*TARGETS, "gemma3_text", "falcon_h1", "nemotron_h", "llama4"])
def test_many_random_conversations(family, k, bound):
    model = tiny(family, k=k)
    assert run_conversations(model, 200, 2, BOUNDS[bound](model), (1, 4, 12, 30)) > 0


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(0, marks=pytest.mark.long),
        *(pytest.param(i, marks=pytest.mark.hours) for i in range(1, 5)),
    ],
)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", ["eagle3.1", "mtp", None])
def test_many_random_conversations_of_the_embedded_pair(name, bound, part):
    """200 in all, in parts of some minutes each."""
    model, tokenizer, drafter = load_demo(name or "eagle3.1")
    drafter = drafter if name else PromptLookupDrafter(model)
    whole = loaded(model, drafter, tokenizer)
    assert run_conversations(whole, 40, 3 + part, BOUNDS[bound](whole), (1, 8, 30), 4096) > 0


def test_whoever_asks_the_device_belongs_to_one_thread(llama):
    """serving.md 3.19: an MLX stream bound to the thread of a request."""
    prompt, names, said = [3, 1, 4, 1, 5], set(), []

    def client(running):
        heard = Heard()
        heard.on_event = lambda event: names.add(threading.current_thread().name)
        running.submit(llama, [Request(prompt, 12, top_logprobs=0)], [heard])
        heard.wait()
        said.append(heard.tokens)

    for _ in range(2):  # an engine of its own thread each, over one model
        with engine() as running:
            threads = [threading.Thread(target=client, args=(running,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert names == {"device"}
    assert said == [plain_greedy(llama.model, prompt, 12)] * 6


def test_the_bound_holds_and_the_oldest_leave(llama):
    """serving.md 3.21: a kernel panic from keys and values without bound."""
    bound = llama.footprint.bytes(60) * 3
    with engine(bound) as running:
        for i in range(12):
            heard, _ = ask(running, llama, [i] * 40)
            assert isinstance(heard.wait(), Ended)
            assert running.store.nbytes <= bound
        assert running.store.evicted
        again, _ = ask(running, llama, [11] * 40)
        assert again.wait().usage.cached_tokens == 38
        oldest, _ = ask(running, llama, [0] * 40)
        assert oldest.wait().usage.cached_tokens == 0
        huge, _ = ask(running, llama, [1] * 2000, 100)
        assert huge.wait().kind == "refused"


def test_the_footprint_is_an_upper_bound():
    for family in TARGETS:
        model = tiny(family)
        with engine() as running:
            for size in (1, 100, 300):
                heard, _ = ask(running, model, [i % VOCAB for i in range(size)], 8)
                heard.wait()
                most = running.metrics.registry.get_sample_value("mlx_drift_cache_bytes_most")
                assert most <= model.footprint.bytes(size + 8)
                running.call(lambda m=model, r=running: r.store.forget(m)).result()


def test_a_full_queue_says_so(llama):
    with engine(running=1, waiting=1) as running:
        held, released = threading.Event(), threading.Event()
        running.call(lambda: (held.set(), released.wait(60)))
        held.wait()
        heard = [ask(running, llama, [1, 2])[0] for _ in range(2)]
        with pytest.raises(Busy) as busy:
            ask(running, llama, [1, 2])
        assert busy.value.retry_after >= 1
        assert not busy.value.is_closing
        released.set()
        assert all(isinstance(h.wait(), Ended) for h in heard)
        assert isinstance(ask(running, llama, [1, 2])[0].wait(), Ended)


def test_one_that_takes_too_long_is_given_up(llama):
    with engine(seconds=0.05) as running:
        heard, _ = ask(running, llama, [1, 2, 3], 100_000)
        assert heard.wait().kind == "timeout"
        held = threading.Event()
        running.call(lambda: held.wait(0.2))
        queued, _ = ask(running, llama, [1, 2, 3], 5)
        assert queued.wait().kind == "timeout"


def test_who_leaves_is_noticed_before_the_next_turn_and_leaves_whole_caches(llama):
    prompt = [i % VOCAB for i in range(300)]
    with engine() as running:
        heard, ticket = ask(running, llama, prompt, 50)
        heard.on_event = lambda event: isinstance(event, Piece) and running.cancel([ticket])
        assert heard.wait().kind == "cancelled"
        assert sum(isinstance(e, Piece) for e in heard.events) == 1
        again, _ = ask(running, llama, prompt, 12)
        assert again.wait().usage.cached_tokens == 298
        assert again.tokens == plain_greedy(llama.model, prompt, 12)


def test_closing_cuts_answers_off_at_the_deadline(llama):
    with engine() as running:
        heard, _ = ask(running, llama, [1, 2, 3], 1_000_000)
        queue = [ask(running, llama, [1, 2, 3], 1_000_000)[0] for _ in range(9)]
        while not heard.tokens:
            heard.over.wait(0.01)
        running.close(0.2)
        assert {h.wait().kind for h in [heard, *queue]} == {"shutdown"}
        with pytest.raises(Busy) as busy:
            ask(running, llama, [1])
        assert busy.value.is_closing


def test_a_failure_ends_one_conversation_alone(llama, monkeypatch):
    with engine() as running:
        other, _ = ask(running, llama, [5, 6, 7], 40)
        real = mx.random.key
        monkeypatch.setattr(mx.random, "key", lambda seed: 1 / 0)
        broken, _ = ask(running, llama, [1, 2], sampling=Sampling(temp=1.0), seed=1)
        assert broken.wait().kind == "error"
        monkeypatch.setattr(mx.random, "key", real)
        assert isinstance(other.wait(), Ended)
        assert other.tokens == plain_greedy(llama.model, [5, 6, 7], 40)


def test_a_fault_of_the_engine_leaves_nobody_waiting(llama):
    with engine() as running:
        heard, _ = ask(running, llama, [1, 2, 3], 100_000)
        while not heard.tokens:
            heard.over.wait(0.01)
        running.when_idle = running._count = lambda: 1 / 0
        assert heard.wait().kind == "error"
        with pytest.raises(Busy):
            ask(running, llama, [1])
        running._thread.join(60)
        assert not running.is_alive


def test_a_fault_of_the_engine_is_told_to_those_it_had_not_heard_of_yet(llama):
    late = []

    def fault():
        late.append(ask(running, llama, [4, 5, 6])[0])  # taken on in the very turn that fails
        raise ZeroDivisionError

    with engine() as running:
        running._count = fault
        heard, _ = ask(running, llama, [1, 2, 3], 100_000)
        assert heard.wait().kind == "error"
        assert late[0].wait().kind == "error"


def test_an_answer_that_cannot_be_ended_ends_alone(llama, monkeypatch):
    with engine() as running:
        heard, ticket = ask(running, llama, [1, 2, 3], 100_000)
        while not heard.tokens:
            heard.over.wait(0.01)
        monkeypatch.setattr(Conversation, "close", lambda self: 1 / 0)
        running.cancel([ticket])
        assert heard.wait().kind == "cancelled"
        monkeypatch.undo()
        other, _ = ask(running, llama, [1, 2, 3])
        assert other.wait().usage.cached_tokens == 0  # nobody knows what those caches hold
        assert other.tokens == plain_greedy(llama.model, [1, 2, 3], 12)


def test_a_seed_says_the_same_again_whatever_else_runs(llama):
    auto = loaded(llama.model, llama.drafter, k="auto")
    asked = {"sampling": Sampling(temp=0.8, top_p=0.9), "seed": 7}
    with engine() as running:
        alone, _ = ask(running, auto, [1, 2, 3], 30, **asked)
        alone.wait()
        others = [ask(running, auto, [i, 2, 3], 30)[0] for i in range(5)]
        again, _ = ask(running, auto, [1, 2, 3], 30, **asked)
        again.wait()
        assert again.tokens == alone.tokens
        assert all(isinstance(h.wait(), Ended) for h in others)
        assert others[2].tokens == plain_greedy(llama.model, [2, 2, 3], 30)


def test_a_stop_text_ends_within_a_round(llama):
    prompt = [3, 1, 4, 1, 5]
    text = "".join(chr(60 + token) for token in plain_greedy(llama.model, prompt, 12))
    spelling = Spelling()
    with engine() as running:
        model = loaded(llama.model, llama.drafter, spelling)
        heard, _ = ask(running, model, prompt, 12, stop=(text[5:7],))
        ended = heard.wait()
    at = text.index(text[5:7])
    assert heard.text == text[:at]
    assert ended.reason == "stop"
    assert ended.usage.completion_tokens == at + 2


class Spelling:
    """A tokenizer whose tokens are letters."""

    eos_token_ids = frozenset()

    @property
    def detokenizer(self):
        return Spelled()


class Spelled:
    last_segment = ""

    def add_token(self, token):
        self.last_segment = chr(60 + token)

    def finalize(self):
        self.last_segment = ""
