"""What is learned from: records in the forms they come in, and what of them the assistant says."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapting import tiny_pair, write_tiny_head
from mlx.utils import tree_flatten

from kinds import BLOCK, random_head
from mlx_drift import DriftError, load_demo
from mlx_drift.demo import DEMO
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.measure.acceptance.asking import Settings, answer
from mlx_drift.measure.acceptance.wording import Wording
from mlx_drift.target.model import Target
from mlx_drift.train.answers import Answerer, Asking
from mlx_drift.train.checkpoint import order
from mlx_drift.train.conversations import Conversation, read_conversations, read_data
from mlx_drift.train.head import load_trainable
from mlx_drift.train.held_out import Held, replay, rounds
from mlx_drift.train.layout import Layout, Text
from mlx_drift.train.learner import Learner, Recipe
from mlx_drift.train.memory import estimate_memory
from mlx_drift.train.objective import Objective, Row
from mlx_drift.train.repetition import distinct, replay_lookup
from mlx_drift.train.rows import see
from mlx_drift.train.text_file import TextFile
from tiny import HIDDEN, tiny_drafter, tiny_llama

SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is json?"},
    {"role": "assistant", "content": "A format."},
    {"role": "user", "content": "And csv?"},
    {"role": "assistant", "content": "Another."},
]
CHAT = Conversation("1", "file", "chat", tuple(SAID))


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def write(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_records_of_every_form(tmp_path):
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now"}}]}
    path = write(
        tmp_path / "all.jsonl",
        {"messages": SAID, "category": "short"},
        {"messages": [SAID[1], call, {"role": "tool", "content": "12:00"}], "tools": tools},
        {"prompt": "One?", "completion": "Two."},
        {"text": "All of it."},
        {"question_id": 81, "turns": ["Why?", "How?"]},
    )
    chat, tool, completion, text, question = read_conversations(path)
    assert (chat.messages, chat.category, chat.calls_tools) == (tuple(SAID), "short", False)
    assert (tool.tools, tool.calls_tools) == (tuple(tools), True)
    assert [m["content"] for m in completion.messages] == ["One?", "Two."]
    assert (text.text, text.messages, text.has_answers) == ("All of it.", (), True)
    assert [m["role"] for m in question.messages] == ["user", "user"]
    assert (question.id, question.has_answers) == ("81", False)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, r"messages is \[\]; expected a list"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\]\.role is 'bot'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content is None; expected a text"),
        ({"messages": [SAID[0]]}, "none of the user's and none of the assistant's"),
        ({"messages": SAID, "tools": [1]}, r"tools is \[1\]; expected a list of objects"),
        ({"prompt": "x", "completion": 3}, "completion is 3; expected a text"),
        ({"text": " "}, "text is empty"),
        ({"other": 1}, "none of the fields"),
    ],
)
def test_a_record_that_is_none_is_told_by_line_and_field(record, message, tmp_path):
    path = write(tmp_path / "x.jsonl", {"text": "fine"}, record)
    with pytest.raises(DriftError, match=rf"x\.jsonl, line 2: .*{message}"):
        read_conversations(path)


def test_a_folder_says_what_is_held_out_and_a_file_does_not(tmp_path):
    with pytest.raises(DriftError, match=r"has no train\.jsonl; expected one, as for mlx_lm\.lora"):
        read_data(str(tmp_path))
    for name in ("train", "valid", "test"):
        write(tmp_path / f"{name}.jsonl", *({"text": f"{name} {n}"} for n in range(30)))
    data = read_data(str(tmp_path), limit=3)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [3, 3, 3]
    assert data.valid[0].text == "valid 0"
    one = read_data(str(tmp_path / "train.jsonl"))
    assert (len(one.train), len(one.valid), one.test) == (27, 3, [])
    assert read_data(str(tmp_path / "train.jsonl"), seed=1).valid != one.valid
    assert not {c.text for c in one.train} & {c.text for c in one.valid}
    with pytest.raises(DriftError, match="one conversation; expected at least two"):
        read_data(write(tmp_path / "one.jsonl", {"text": "x"}))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DriftError, match="there are no conversations in it"):
        read_data(str(tmp_path / "empty.jsonl"))


def test_every_turn_of_the_assistant_counts(demo):
    _, tokenizer, _ = demo
    (text,) = Layout(tokenizer, [Wording()]).given(CHAT)
    assert text.tokens == tokenizer.apply_chat_template(SAID)
    said = [tokenizer.decode(text.tokens[start:stop]) for start, stop in text.said]
    assert said == [f"{answer}{tokenizer.eos_token}" for answer in ("A format.", "Another.")]
    cut = text.cut(text.said[1][0])
    assert cut.said == text.said[:1]
    assert sum(text.cut(text.said[1][0] + 1).learned) == sum(cut.learned) + 1


def test_a_template_that_rewrites_what_was_said_begins_a_text_anew(demo):
    _, tokenizer, _ = demo
    forgetful = (
        "{% for m in messages %}{{ m.role }}: {% if m.role != 'assistant' or loop.last %}"
        "{{ m.content }}{% else %}…{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    wording = Wording(chat_template=forgetful, system_prompt="Other.")
    first, second = Layout(tokenizer, [wording]).given(CHAT)
    assert tokenizer.decode(first.tokens).startswith("system: Other. user: What is json? ")
    assert "assistant: …" in tokenizer.decode(second.tokens)
    for text, said in ((first, "A format."), (second, "Another.")):
        ((start, stop),) = text.said
        assert tokenizer.decode(text.tokens[start:stop]).strip() == said


def test_each_conversation_draws_its_wording(demo):
    _, tokenizer, _ = demo
    layout = Layout(tokenizer, [Wording("a"), Wording("b", system_prompt="B.")])
    drawn = [layout.wording(Conversation(str(n), "x", "y", tuple(SAID))).name for n in range(40)]
    assert {*drawn} == {"a", "b"}
    assert 10 < drawn.count("a") < 30


def test_answers_do_not_depend_on_which_others_are_asked_for(demo):
    model, tokenizer, drafter = demo
    layout = Layout(tokenizer, [Wording()])
    asking = Asking(max_tokens=16, sampled=1.0, num_draft_tokens=2)
    answerer = Answerer(model, tokenizer, layout, asking, drafter)
    others = [Conversation(str(n), "x", "y", ({"role": "user", "content": "Hm?"},)) for n in "12"]
    alone = answerer.answer(CHAT)
    answered = [answerer.answer(one) for one in others]
    assert answerer.answer(CHAT) == alone
    assert answered[0] != answered[1]
    assert sum(len(text.said) for text in alone) == 2
    prompt = tokenizer.apply_chat_template(SAID[:2], add_generation_prompt=True)
    assert alone[0].tokens[: alone[0].said[0][0]] == prompt
    full = Answerer(model, tokenizer, layout, Asking(max_seq_length=20)).answer(CHAT)
    assert full == []


def test_what_is_held_out_is_learned_nowhere(tmp_path):
    """A question that a file has twice is not both learned and measured on."""
    asked = [{"turns": [f"What is {n // 2}?"]} for n in range(40)]
    data = read_data(write(tmp_path / "twice.jsonl", *asked))
    assert not {one.said for one in data.train} & {one.said for one in data.valid}
    assert len(data.valid) == 4
    with pytest.raises(DriftError, match="all conversations say the same"):
        read_data(write(tmp_path / "same.jsonl", *asked[:2]))


def test_a_call_is_answered_after_what_the_file_has(demo):
    model, tokenizer, _ = demo
    said = [*SAID[1:3], {"role": "tool", "content": "12:00"}, SAID[4]]
    called = Conversation("1", "x", "y", tuple(said))
    texts = Answerer(model, tokenizer, Layout(tokenizer, [Wording()]), Asking(8)).answer(called, 0)
    assert len(texts) == 2
    for text, number in zip(texts, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(said[:number], add_generation_prompt=True)
        assert text.tokens[: text.said[0][0]] == prompt


@pytest.mark.parametrize("kind", ["p-eagle", "eagle-attn"])
def test_chains_of_all_positions_are_what_each_drafts(kind):
    """What is measured in training, and judged, is what the head drafts in decoding."""
    model = tiny_llama()
    head = random_head(kind, model)
    tokens = mx.array([5, 9, 2, 44, 17, 3, 60, 11, 25])
    taps = mx.random.normal((tokens.size - 1, len(head.taps), HIDDEN), key=mx.random.key(5))
    steps = BLOCK + 1
    drafts = np.array([step.tolist() for step in head.chains(tokens, taps, steps)])
    assert len(drafts) == min(steps, head.max_drafts or steps)
    for row in range(1, tokens.size):
        cache = head.make_cache()
        head.ingest(tokens[1 : row + 1], taps[:row], cache)
        assert head.propose(steps, cache).tokens.tolist() == drafts[:, row - 1].tolist()
    logits, _ = next(head.train_time_test_steps(tokens, taps, 1))
    assert head.choose(logits).tolist() == drafts[0].tolist()


@pytest.mark.parametrize("kind", ["eagle3.1", "eagle3", "mtp"])
def test_replayed_rounds_are_those_of_decoding(kind):
    """Answers that end by themselves, and such as are cut short, at every K."""
    model, tokenizer, drafter = load_demo(kind)
    layout = Layout(tokenizer, [Wording()])
    target = Target(model, drafter.taps)
    question = Conversation("1", "x", "y", (SAID[1],))
    for length, k in ((40, 4), (23, 2), (200, 5)):
        (text,) = Answerer(model, tokenizer, layout, Asking(length)).answer(question, 0.0)
        held = Held("x", "1", "y", (text,))
        settings = Settings(num_draft_tokens=k, max_tokens=length)
        prompt = text.tokens[: text.said[0][0]]
        real = answer(model, tokenizer, {"x": drafter}, prompt, settings)[1]["x"]
        assert replay(target, drafter, held, k, layout.stops) == real


@pytest.mark.parametrize(("length", "k"), [(80, 4), (41, 2)])
def test_replayed_copies_are_those_of_prompt_lookup(length, k):
    """A target whose next token depends on the last alone soon goes round in a circle."""
    model, tokenizer = tiny_pair()
    for layer in model.layers:
        layer.self_attn.o_proj.weight *= 0
        layer.mlp.down_proj.weight *= 0
    layout = Layout(tokenizer, [Wording()])
    question = Conversation("1", "x", "y", (SAID[1],))
    (text,) = Answerer(model, tokenizer, layout, Asking(length)).answer(question, 0.0)
    settings = Settings(num_draft_tokens=k, max_tokens=length)
    prompt, drafter = text.tokens[: text.said[0][0]], PromptLookupDrafter(model)
    real = answer(model, tokenizer, {"x": drafter}, prompt, settings)[1]["x"]
    assert sum(accepted for _, accepted in real.rounds) > length // 2
    assert replay_lookup(Held("x", "1", "y", (text,)), k, layout.stops) == real


def test_rounds_end_with_the_text():
    tokens = [7, 7, 1, 2, 3, 4]

    def right(at):
        return [tokens[min(at + j, 5)] for j in range(3)]

    assert rounds(tokens, right, (2, 6), ends=False) == [(3, 3)]
    assert rounds(tokens, right, (2, 5), ends=False) == [(2, 2)]
    assert rounds(tokens, right, (2, 5), ends=True) == [(3, 3)]
    assert rounds(tokens, lambda at: [0] * 3, (2, 6), ends=False) == [(1, 0)] * 3 + [(0, 0)]
    assert rounds(tokens, lambda at: [], (2, 6), ends=False) == [(0, 0)] * 4


@pytest.mark.parametrize("rank", [0, 2])
def test_gradients_are_the_same_when_they_are_computed_again(demo, rank):
    model, tokenizer, _ = demo
    drafter = load_trainable(DEMO / "eagle3.1", model, rank=rank)
    (text,) = Layout(tokenizer, [Wording()]).given(CHAT)
    target = Target(model, drafter.taps)
    row = see(target, drafter, mx.array(text.tokens), mx.array(text.learned))

    def gradients(recompute):
        objective = Objective(3, recompute=recompute)
        value, found = nn.value_and_grad(drafter.network, lambda: objective(drafter, row))()
        return value.item(), dict(tree_flatten(found))

    (value, kept), (other, again) = gradients(False), gradients(True)
    assert value == other
    assert all(
        mx.any(gradient != 0).item() for name, gradient in kept.items() if "lora_a" not in name
    )
    for name, gradient in kept.items():
        np.testing.assert_allclose(again[name], gradient, rtol=1e-5, atol=1e-7, err_msg=name)


def test_what_is_computed_again_is_not_kept():
    """Attention and logits of a long row are most of what its gradients take."""
    model, _ = tiny_pair()
    drafter = tiny_drafter(model, draft_vocab_size=2048, own_head=True)
    length = 384
    key = mx.random.key(0)
    row = Row(
        tokens=mx.zeros(length + 1, mx.int32),
        taps=mx.random.normal((length, 2, 32), key=key),
        logits=mx.random.normal((length + 1, 2048), key=key),
        counted=mx.ones(length + 1, mx.bool_),
    )
    mx.eval(row.taps, row.logits, row.counted)
    taken = []
    for recompute in (False, True):
        objective = Objective(8, recompute=recompute)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        step = nn.value_and_grad(drafter.network, lambda o=objective: o(drafter, row))
        mx.eval(step())
        taken.append(mx.get_peak_memory() - before)
    assert taken[1] < 0.6 * taken[0]


def test_every_text_comes_once_an_epoch():
    taken = [i for step in range(14) for i in order(step, 3, 7, seed=1)]
    epochs = [taken[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == [*range(7)] for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 6
    assert order(5, 3, 7, seed=1) == taken[15:18]


def test_answers_survive_a_line_that_was_cut(tmp_path):
    path, texts = tmp_path / "answers.jsonl", [Text([1, 2, 3], [(1, 3)])]
    TextFile(path, {"seed": 0}, 8).add("a", texts)
    with path.open("ab") as stream:
        stream.write(b'{"conversation": "b", "te')
    again = TextFile(path, {"seed": 0}, 8)
    assert (again.find("a"), again.find("b")) == (texts, None)
    again.add("b", [])
    assert TextFile(path, {"seed": 0}, 8).find("b") == []
    with pytest.raises(DriftError, match="holds texts of other settings: seed was 0, not 1"):
        TextFile(path, {"seed": 1}, 8)
    with path.open("ab") as stream:
        stream.write(b"no json\n")
    with pytest.raises(DriftError, match="damaged in line 4"):
        TextFile(path, {"seed": 0}, 8)


@pytest.mark.parametrize("token", [3, -1, 10**30])
def test_answers_with_a_token_that_the_target_has_not_are_damaged(token, tmp_path):
    path = tmp_path / "answers.jsonl"
    TextFile(path, {}, 2**100).add("a", [Text([1, token], [(1, 2)])])
    with pytest.raises(DriftError, match="damaged in line 2; remove it"):
        TextFile(path, {}, 3)


def test_distinct_4_grams():
    assert distinct([[1, 2, 3, 4, 5]]) == 1
    assert distinct([[1] * 13]) == 0.1
    assert distinct([[1, 2]]) == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_takes_about_what_was_estimated(recompute, tmp_path):
    model, _ = tiny_pair()
    drafter = load_trainable(write_tiny_head(tmp_path / "head", model), model)
    target, length = Target(model, drafter.taps), 512
    recipe = Recipe(steps=4, grad_checkpoint=recompute)
    estimated = estimate_memory(target, drafter, recipe, length)
    learner = Learner(target, drafter, recipe)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    learner.learn([Text([i % 60 for i in range(length)], [(5, length)])], 0)
    taken = mx.get_peak_memory() - before
    assert taken < estimated.total - estimated.target - estimated.head < 3 * taken
