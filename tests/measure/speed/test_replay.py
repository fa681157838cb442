"""Replays: the rounds of a recorded answer are those that the answer took."""

import json
import warnings

import pytest

from mlx_drift import CopyingDrafter, PromptLookupDrafter, load_demo, stream_generate
from mlx_drift.cli.transcripts import read_transcripts
from mlx_drift.measure.speed.replay import Recorded, ReplayCosts, measure_costs, replay
from tiny import NoText, plain_greedy, tiny_drafter, tiny_llama

COSTS = ReplayCosts({0: 1.0, 1: 1.4, 2: 1.6}, {1: 1.1, 16: 1.5}, 0.01)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4]


def said_with(model, drafter, prompt, count, k):
    with warnings.catch_warnings(action="ignore"):  # random weights accept little
        *_, last = stream_generate(
            model, NoText(), prompt, count, drafter=drafter, num_draft_tokens=k
        )
    return last.statistics


def test_a_replay_has_the_rounds_of_the_answer():
    model = tiny_llama()
    head = tiny_drafter(model)
    recorded = []
    for number, prompt in enumerate((PROMPT, PROMPT * 3)):
        recorded.append(Recorded(prompt, plain_greedy(model, prompt, 40), number))
    found = replay(model, head, recorded, COSTS, lengths=[2, "auto"])
    arms = {arm.name: arm for arm in found.arms}
    assert arms["plain"].seconds == arms["plain"].tokens == 80
    for name, drafter, k in (
        ("K=2", head, 2),
        ("K=2 + lookup", CopyingDrafter(head), 2),
        ("lookup K=4", PromptLookupDrafter(model), 4),
    ):
        real = said_with(model, drafter, recorded[0].prompt, 40, k)
        real.add(said_with(model, drafter, recorded[1].prompt, 40, k))
        told = arms[name].statistics.to_dict()
        for figure in ("rounds", "conditional_acceptance", "sources"):
            assert told[figure] == real.to_dict()[figure]
    rounds = arms["K=2"].statistics.rounds
    assert arms["K=2"].seconds <= rounds * COSTS.drafted[2]
    assert arms["K=2"].seconds > (rounds - 2) * COSTS.drafted[2]
    assert arms["K=2 + lookup"].statistics.free_rounds["copy"]
    auto = arms["auto, head alone"].statistics
    assert sum(auto.accepted) + auto.rounds + auto.plain_tokens == 80


def test_costs_are_of_the_lengths_that_are_tried():
    model = tiny_llama()
    costs = measure_costs(model, tiny_drafter(model), PROMPT, turns=1)
    assert [*costs.drafted] == [*range(9)]
    assert [*costs.copied] == [1, 2, 4, 8, 16]
    assert costs.of(0, is_copy=True) == costs.drafted[0]
    assert min(*costs.drafted.values(), *costs.copied.values(), costs.missed_row) > 0


def test_every_answer_of_a_conversation_is_read(tmp_path):
    _, tokenizer, _ = load_demo()
    asked = [{"role": "user", "content": "What is `bisect` for?"}]
    answer = {"role": "assistant", "content": "For sorted lists."}
    lines = [
        {"messages": [*asked, answer, *asked, answer]},
        {"prompt": asked[0]["content"], "text": answer["content"]},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    one, two, three = read_transcripts(path, tokenizer, {})
    assert one.prompt == three.prompt == two.prompt[: len(one.prompt)]
    assert tokenizer.decode(one.answer) == answer["content"]
    assert (one.conversation, two.conversation, three.conversation) == (1, 1, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: Expecting"),
        ("[]", "line 1: it is no object"),
        ('{"prompt": "a"}', "line 1: a message lacks its role or its content"),
        ('{"messages": [1]}', "line 1: messages is no list of objects"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "holds no answer"),
    ],
)
def test_what_is_no_recording_is_told(refuses, tmp_path, line, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(line)
    refuses(message, "bench", "--replay", path)


def test_figures_are_on_stdout(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_drift.cli.bench.measure_costs", lambda *given: COSTS)
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "Say", "text": "one two three " * 12}))
    code, out, _ = cli("bench", "--replay", path, "--num-draft-tokens", 2, "--json")
    assert code == 0
    arms = {arm["name"]: arm for arm in json.loads(out)["arms"]}
    assert arms["K=2 + lookup"]["tokens_per_round"] > 2 * arms["K=2"]["tokens_per_round"]
