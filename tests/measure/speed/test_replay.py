"""Replays: the rounds of a recorded answer are those that the answer took."""

import json
import warnings
from collections import defaultdict

import pytest

from mlx_drift import CopyingDrafter, PromptLookupDrafter, load_demo, stream_generate
from mlx_drift.cli.transcripts import read_transcripts
from mlx_drift.drafters.protocol import Source
from mlx_drift.measure.speed.recording import Recorded
from mlx_drift.measure.speed.replay import ReplayCosts, measure_costs, replay
from tiny import NoText, plain_greedy, tiny_drafter, tiny_llama

COSTS = ReplayCosts({0: 1.0, 1: 1.4, 2: 1.6}, {1: 1.1, 16: 1.5}, 0.01, {2: 1.8, 4: 2.0})
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4]


def said_with(model, drafter, prompt, count, k=None, **keywords):
    with warnings.catch_warnings(action="ignore"):  # random weights accept little
        keywords |= {} if k is None else {"num_draft_tokens": k}
        *_, last = stream_generate(model, NoText(), prompt, count, drafter=drafter, **keywords)
    return last.statistics


def test_a_replay_has_the_rounds_of_the_answer():
    model = tiny_llama()
    head = tiny_drafter(model)
    recorded = []
    for number, prompt in enumerate((PROMPT, PROMPT * 3)):
        recorded.append(Recorded(prompt, plain_greedy(model, prompt, 40), number))
    found = replay(model, head, recorded, COSTS, lengths=[2, "auto"])
    arms = {arm.name: arm for arm in found.arms}
    assert arms["plain"].seconds == arms["plain"].tokens == [40, 40]
    assert_rounds_are(arms["K=2"], model, head, recorded, 2)
    assert_rounds_are(arms["K=2 + lookup"], model, CopyingDrafter(head), recorded, 2)
    assert_rounds_are(arms["lookup K=4"], model, PromptLookupDrafter(model), recorded, 4)
    assert_spent(arms["K=2"], COSTS.drafted[2])
    assert arms["K=2 + lookup"].statistics.free_rounds["copy"]
    assert committed(arms["auto, head alone"]) == 80


def test_a_replay_has_the_rounds_of_trees():
    model = tiny_llama()
    head = tiny_drafter(model)
    recorded = [Recorded(PROMPT, plain_greedy(model, PROMPT, 40), 0)]
    found = replay(model, head, recorded, COSTS, lengths=[4, "auto"], trees=[5, "auto"])
    arms = {arm.name: arm for arm in found.arms}
    assert [*arms] == ["plain", "K=4", "auto, head alone", "tree of 5", "auto, trees"]
    assert_rounds_are(arms["K=4"], model, head, recorded, 4)
    assert_rounds_are(arms["tree of 5"], model, head, recorded, tree=5)
    assert_spent(arms["tree of 5"], COSTS.branched[4])
    assert len(arms["tree of 5"].statistics.ranks[0]) > 1
    assert committed(arms["auto, trees"]) == 40
    chain, tree = (arms[name].statistics.tokens_per_round for name in ("K=4", "tree of 5"))
    assert found.over_chain(arms["tree of 5"]).value == pytest.approx(tree / chain)
    assert all(found.over_chain(arms[name]) is None for name in ("plain", "K=4", "auto, trees"))


def test_what_was_drafted_once_is_not_drafted_again(monkeypatch):
    model = tiny_llama()
    head = tiny_drafter(model)
    recorded = [Recorded(PROMPT, plain_greedy(model, PROMPT, 24), 0)]
    drafts = defaultdict(dict)

    def again():
        ways = {"lengths": [4, "auto"], "trees": [5, "auto"]}
        return replay(model, head, recorded, COSTS, **ways, drafts=drafts).to_dict()

    def refused(k, cache, chooser=None):
        raise AssertionError("drafts anew")

    found = again()
    monkeypatch.setattr(head, "propose", refused)
    monkeypatch.setattr(head, "propose_tree", refused)
    assert again() == found
    drafts.clear()
    with pytest.raises(AssertionError, match="drafts anew"):
        again()


def assert_rounds_are(arm, model, drafter, recorded, k=None, **way):
    real = said_with(model, drafter, recorded[0].prompt, 40, k, **way)
    for one in recorded[1:]:
        real.add(said_with(model, drafter, one.prompt, 40, k, **way))
    told = arm.statistics.to_dict()
    for figure in ("rounds", "conditional_acceptance", "acceptance_by_rank", "sources"):
        assert told[figure] == real.to_dict()[figure]
    assert sum(arm.rounds) == real.rounds


def assert_spent(arm, seconds):
    """What so many rounds take, but for the last of each answer, which may be shorter."""
    rounds = arm.statistics.rounds
    assert (rounds - len(arm.tokens)) * seconds <= sum(arm.seconds) <= rounds * seconds


def committed(arm):
    return sum(arm.statistics.accepted) + arm.statistics.rounds + arm.statistics.plain_tokens


def test_costs_are_of_the_lengths_that_are_tried():
    model = tiny_llama()
    costs = measure_costs(model, tiny_drafter(model), PROMPT, trees=True, turns=1)
    assert [*costs.drafted] == [*range(9)]
    assert [*costs.copied] == [1, 2, 4, 8, 16]
    assert [*costs.branched] == [2, 4, 7, 11, 16]
    assert costs.of(0, Source("copy")) == costs.drafted[0]
    all_costs = [costs.drafted, costs.copied, costs.branched, {0: costs.missed_row}]
    assert min(seconds for known in all_costs for seconds in known.values()) > 0


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
    monkeypatch.setattr("mlx_drift.cli.bench.measure_costs", lambda *given, trees: COSTS)
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "Say", "text": "one two three " * 12}))
    code, out, _ = cli("bench", "--replay", path, "--num-draft-tokens", 2, "--json")
    assert code == 0
    arms = {arm["name"]: arm for arm in json.loads(out)["arms"]}
    assert arms["K=2 + lookup"]["tokens_per_round"] > 2 * arms["K=2"]["tokens_per_round"]
    trees = "--num-draft-tokens", 2, "--tree", 3, "--tree", "auto"
    code, out, _ = cli("bench", "--replay", path, *trees, "--json")
    assert code == 0
    arms = {arm["name"]: arm for arm in json.loads(out)["arms"]}
    share = arms["tree of 3"]["tokens_per_round"] / arms["K=2"]["tokens_per_round"]
    assert arms["tree of 3"]["over_chain"][0] == pytest.approx(share)
    code, out, _ = cli("bench", "--replay", path, *trees)
    assert code == 0
    assert "auto, trees" in out
