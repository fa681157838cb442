"""What the grammar's processor lets come: for any text the same, whatever was asked before."""

import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from chi_square import LEAST_P, p_value
from mlx_drift import DriftError, Grammar
from mlx_drift.demo import TARGET
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.draft_model import DraftModelDrafter
from mlx_drift.grammar.follow import GrammarProcessor
from mlx_drift.grammar.vocabulary import Vocabulary
from mlx_drift.target.model import Target
from schemas import SCHEMAS, grammar_of
from stateful import EOS, PROMPT, SIZE, grammar, plain, say, small_llama, tokens_of
from stateful import Grammar as InOrder
from tiny import tiny_drafter

SENT = 2, 3, 4
TEMP = 1.3
PATIENCE = 60
FIRST = 4  # tokens whose joint distribution is tested


def own_tokenizer(*tokens):
    """The embedded target's tokenizer with some tokens added, which end turns and mark thought."""
    own = PreTrainedTokenizerFast.from_pretrained(TARGET)
    own.add_tokens([*tokens])
    return TokenizerWrapper(own)


@pytest.fixture(scope="module")
def tokenizer():
    return own_tokenizer()


@pytest.fixture(scope="module")
def thinker():
    return own_tokenizer("<turn>", "<think>", "</think>")


def allowed(processor, tokens):
    size = 4200
    logits = processor(mx.array([*tokens]), mx.zeros((1, size)))
    return np.flatnonzero(np.isfinite(np.array(logits[0]))).tolist()


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_may_come_depends_on_the_text_alone(tokenizer, name):
    """However one went to and fro before, past tokens that may not come, too."""
    random = np.random.default_rng(1)
    grammar = grammar_of(name)
    asked = grammar.processor(tokenizer, SENT)
    text: list[int] = []
    for _ in range(40):
        place = int(random.integers(max(0, len(text) - 6), len(text) + 1))
        text = text[:place]
        for _ in range(int(random.integers(1, 6))):
            may = allowed(asked, [*SENT, *text])
            assert may == allowed(grammar.processor(tokenizer, SENT), [*SENT, *text])
            stray = random.random() < 0.1
            text.append(int(random.integers(4096)) if stray else int(random.choice(may)))


def test_drafts_are_possible_up_to_the_first_that_may_not_come(tokenizer):
    follow = grammar_of("object").processor(tokenizer, SENT)
    said = mx.array([*SENT, *tokenizer.encode('{"name": "', add_special_tokens=False)])
    drafts = tokenizer.encode('Bob", "age": 3}', add_special_tokens=False)
    wrong = tokenizer.encode("]", add_special_tokens=False)
    assert follow.count_possible(said, drafts) == len(drafts)
    assert follow.count_possible(said, [*drafts[:4], *wrong, *drafts[4:]]) in range(4, len(drafts))
    assert follow.count_possible(said, [*drafts, *wrong]) == len(drafts)
    assert follow.count_possible(said, [1 << 20]) == 0
    assert follow.count_possible(said, drafts) == len(drafts)


def test_what_is_forced(tokenizer):
    follow = grammar_of("object").processor(tokenizer, SENT)
    forced = follow.forced(mx.array([*SENT]))
    assert tokenizer.decode(forced) == '{"name":'
    said = tokenizer.encode('{"name": "Bob",', add_special_tokens=False)
    assert tokenizer.decode(follow.forced(mx.array([*SENT, *said]))) == ' "age":'
    assert follow.forced(mx.array([*SENT, *said, *tokenizer.encode("]")])) == []
    assert tokenizer.decode(follow.forced(mx.array([*SENT]))) == '{"name":'


# Reasoning comes first.


def ids(tokenizer, *texts):
    return [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]


def test_the_grammar_begins_after_reasoning_that_the_template_opened(thinker):
    ends = thinker.eos_token_ids
    prompt = ids(thinker, "What?<turn><think>")
    follow = grammar_of("object").processor(thinker, prompt)
    free = {*range(4200)} - ends
    for thought in ("", "let me see", 'so {"name": 1}', "</thin"):
        assert {*allowed(follow, prompt + ids(thinker, thought))} == free
        assert follow.forced(mx.array(prompt + ids(thinker, thought))) == []
    over = ids(thinker, "let me see</think>")
    assert thinker.decode(allowed(follow, prompt + over)) == "{"
    assert thinker.decode(follow.forced(mx.array(prompt + over))) == '{"name":'
    assert follow.count_possible(mx.array(prompt), [*over, *ids(thinker, '{"')]) == len(over) + 2


def test_an_answer_may_open_reasoning_itself(thinker):
    think = ids(thinker, "<think>")
    prompt = ids(thinker, "What does <think> mean?<turn>")  # that one is another's
    follow = grammar_of("object").processor(thinker, prompt)
    assert {*allowed(follow, prompt)} == {*ids(thinker, "{"), *think}
    assert {*allowed(follow, prompt + think)} == {*range(4200)} - thinker.eos_token_ids
    assert thinker.decode(allowed(follow, prompt + ids(thinker, "<think>well</think>"))) == "{"
    assert thinker.decode(allowed(follow, prompt + ids(thinker, "{"))) == '"'


def test_reasoning_that_the_template_closed_is_not_opened_again(thinker):
    prompt = ids(thinker, "What?<turn><think>\n\n</think>\n\n")
    follow = grammar_of("object").processor(thinker, prompt)
    assert thinker.decode(allowed(follow, prompt)) == "{"


def test_tags_of_several_tokens():
    several = own_tokenizer("<turn>")
    start, end = ids(several, "<|channel>thought"), ids(several, "<channel|>")
    assert min(len(start), len(end)) > 1
    several._think_start, several._think_start_tokens = "<|channel>thought", tuple(start)
    several._think_end, several._think_end_tokens = "<channel|>", tuple(end)
    prompt = ids(several, "What?<turn>")
    follow = grammar_of("object").processor(several, prompt)
    assert {*allowed(follow, prompt)} == {*ids(several, "{"), start[0]}
    for done in range(1, len(start)):
        assert allowed(follow, prompt + start[:done]) == [start[done]]
        assert follow.forced(mx.array(prompt + start[:done])) == start[done:]
    thought = [*start, *ids(several, "so"), *end[:-1]]
    assert len(allowed(follow, prompt + thought)) > 4000
    assert several.decode(allowed(follow, [*prompt, *thought, end[-1]])) == "{"


# Against a matcher that is called for every committed position, once and in order.


class Held(GrammarProcessor):
    """The rule of `stateful.Grammar`, in letters."""

    def __init__(self):
        stops = frozenset([EOS])
        super().__init__(grammar().deep_copy(), PROMPT, thought=None, stops=stops, size=SIZE)


def drafter_of(kind, model):
    if kind == "draft model":
        return DraftModelDrafter(small_llama(num_hidden_layers=1), model)
    # Of a reduced vocabulary: where none of its tokens may come, there is nothing to draft.
    base = tiny_drafter(model, draft_vocab_size=4, own_head=True)
    d2t = mx.array([0, 1, 3, 5])
    return ChainDrafter(base.config, base.network, Target(model, (1, 2)), d2t)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("kind", ["draft model", "head", "trees"])
def test_greedy_text_is_that_of_a_processor_with_a_state(kind, k):
    model = small_llama()
    drafter, tree = drafter_of(kind, model), k + 1 if kind == "trees" else None
    expected = plain(model, PROMPT, InOrder())
    assert tokens_of(say(model, drafter, k, Held(), tree=tree)) == expected
    assert plain(model, PROMPT, Held()) == expected


@pytest.mark.parametrize("kind", ["draft model", "head", "trees"])
def test_sampled_text_has_the_distribution_of_plain_decoding(kind):
    model = small_llama()
    drafter = drafter_of(kind, model)
    expected, counts = np.zeros(SIZE**FIRST), np.zeros(SIZE**FIRST)

    def cell(said):
        return np.ravel_multi_index((said + [EOS] * FIRST)[:FIRST], [SIZE] * FIRST)

    def follow(said, chance):
        if len(said) == FIRST or said[-1:] == [EOS]:
            expected[cell(said)] += chance
            return
        tokens = mx.array(PROMPT + said)
        logits = Held()(tokens, model(tokens[None])[:, -1])
        p = np.exp(np.array(logits[0], dtype=np.float64) / TEMP)
        for token, part in enumerate(p / p.sum()):
            if part:
                follow([*said, token], chance * part)

    follow([], 1.0)
    keywords = {"count": FIRST, "temp": TEMP, "tree": 4 if kind == "trees" else None}
    for seed in range(150):
        responses = say(model, drafter, 3, Held(), seed=seed, **keywords)
        counts[cell(tokens_of(responses))] += 1
    assert p_value(counts, expected) > LEAST_P


# What is refused.


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"$ref": "https://example.org/schema"}, "is not present in a registry"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex parse error"),
        ({"$ref": "#"}, "no text fits it"),
        ({"enum": []}, "Unsatisfiable schema"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused_with_the_reason(tokenizer, schema, reason):
    with pytest.raises(DriftError) as refused:
        Grammar.json_schema(schema).check(tokenizer)
    assert str(refused.value).startswith("no answer can be held to the JSON schema: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("grammar", "kind"),
    [(Grammar.regex("(a"), "regular expression"), (Grammar.lark("start: nothing"), "Lark grammar")],
)
def test_other_grammars_that_are_none(tokenizer, grammar, kind):
    with pytest.raises(DriftError, match=f"no answer can be held to the {kind}: .{{5}}"):
        grammar.check(tokenizer)


@pytest.mark.parametrize("schema", ["{", "[]", "true", {"a": {1, 2}}, "[" * 100_000])
def test_what_is_no_schema(schema):
    with pytest.raises(DriftError, match="the JSON schema is "):
        Grammar.json_schema(schema)


def test_without_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = own_tokenizer()
    with pytest.raises(DriftError, match=r"pip install 'mlx-drift\[grammar\]'"):
        grammar_of("object").check(fresh)


def test_a_grammar_that_takes_long_holds_up_no_other(tokenizer, monkeypatch):
    ready, begun, go_on = Grammar.regex("a+"), threading.Event(), threading.Event()
    ready.check(tokenizer)
    compiled = Vocabulary._compile

    def slowly(*asked):
        begun.set()
        assert go_on.wait(PATIENCE)
        return compiled(*asked)

    monkeypatch.setattr(Vocabulary, "_compile", slowly)
    threads = [
        threading.Thread(target=grammar.check, args=(tokenizer,), daemon=True)
        for grammar in (Grammar.regex("b+"), ready)
    ]
    threads[0].start()
    assert begun.wait(PATIENCE)
    threads[1].start()
    threads[1].join(PATIENCE)
    was_held_up = threads[1].is_alive()
    go_on.set()
    threads[0].join(PATIENCE)
    assert not was_held_up


def test_what_is_no_grammar(tokenizer):
    drafter = tiny_drafter(model := small_llama())
    with pytest.raises(DriftError, match=r"grammar is of type dict; expected Grammar\.json_schema"):
        say(model, drafter, 3, grammar=SCHEMAS["object"])
