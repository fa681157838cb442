"""`examples/smollm2` from a target's folder to heads, with a target that says anything."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCAB, END, SHARD = 320, 2, 600


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    """Makes the examples importable."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


@pytest.fixture
def target(tmp_path):
    """The folder of a random Llama whose tokens are words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from recipe.target import Llama, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    folder, model = tmp_path / "target", Llama(LlamaConfig(**sizes, num_hidden_layers=8))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.02)  # what it says is nearly chance
    model.save(folder, 1, END)
    words = {f"word{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word20"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def ran(monkeypatch, module, **options):
    """Runs a program of the example."""
    words = [module.__name__]
    for name, values in options.items():
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    monkeypatch.setattr(sys, "argv", words)
    module.main()


@pytest.fixture
def chats(target, tmp_path, monkeypatch):
    """A file of chats that the target wrote."""
    from smollm2 import chats

    monkeypatch.setattr(chats, "FIRST_WORD", 0)  # it says any word as often
    file = tmp_path / "0.jsonl"
    options = {"target": [target], "out": [file], "rows": [16], "context": [256]}
    ran(monkeypatch, chats, **options, tokens=[200])
    written = file.read_text().count("\n")
    ran(monkeypatch, chats, **options, tokens=[3000], turns=[1, 1, 2], float32=[])  # goes on
    assert file.read_text().count("\n") > written
    return file


def test_chats_are_turns_that_the_target_wrote(target, chats):
    from tokenizers import Tokenizer

    from smollm2.chats import SYSTEM_PROMPTS, varied

    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    openings = [
        tokenizer.encode(f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\n").ids
        for prompt in SYSTEM_PROMPTS
    ]
    to_answer = tokenizer.encode("\n<|im_start|>assistant\n").ids
    for line in chats.read_text().splitlines():
        chat = json.loads(line)
        assert any(chat["ids"][: len(opening)] == opening for opening in openings)
        assert chat["said"], "a chat without an answer teaches nothing"
        for first, stop in chat["said"]:
            answer = chat["ids"][first:stop]
            assert chat["ids"][first - len(to_answer) : first] == to_answer
            assert varied(answer)
            assert END not in answer[:-1]


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    target, chats, tmp_path, monkeypatch, capsys
):
    import torch

    from smollm2 import texts, train

    monkeypatch.setattr(texts, "SHARD", SHARD)
    monkeypatch.setattr(texts, "HELD_OUT", 4)
    options = {
        "target": [target],
        "chats": [chats],
        "batch": [128],
        "depth": [2],
        "draft_vocab": [32],
        "measure_every": [2],
        "features": [tmp_path / "features"],
        "cooldown": [0],
    }
    ran(monkeypatch, train, **options, run=[tmp_path / "whole"], tokens=[900])
    for tokens in (300, 900):
        ran(monkeypatch, train, **options, run=[tmp_path / "stopped"], tokens=[tokens])
    whole, stopped = (
        torch.load(tmp_path / name / "checkpoint.pt")["averages"] for name in ("whole", "stopped")
    )
    for head in train.HEADS:
        for name, weight in whole[head].items():
            assert torch.equal(weight, stopped[head][name]), f"{head}: {name}"
    curve = json.loads((tmp_path / "stopped" / "curve.json").read_text())
    assert [line["step"] for line in curve] == [2, 4, 6, 8][: len(curve)]
    assert set(curve[-1]["held-out"]) == {*train.HEADS}
    assert "accepted held-out" in capsys.readouterr().out
    for head in train.HEADS:
        assert (tmp_path / "stopped" / head / "config.json").exists()


def test_threads_that_share_a_step_add_up_to_it(target):
    import torch

    from recipe.drafter import NORMALIZED, Eagle3
    from recipe.features import read
    from recipe.learner import Learner, dealt
    from recipe.target import Llama

    model = Llama.load(target).requires_grad_(False)
    rows = []
    for length in (9, 40, 17, 30, 21):
        ids = torch.randint(VOCAB, (1, length))
        rows += read(model, ids, torch.ones_like(ids, dtype=torch.bool))
    sizes = [[len(row.ids) for row in hand] for hand in dealt(rows, 2)]
    assert sizes == [[40, 17], [30, 21, 9]]

    def learned(threads):
        torch.manual_seed(0)
        head = Eagle3(model.config, torch.arange(VOCAB), NORMALIZED)
        head.init_from_target(model)
        learner = Learner(head, 1e-3, threads)
        return torch.stack([learner.learn(model, rows, 3, 1.0) for _ in range(4)])

    alone = learned(1)
    assert (alone[-1] < alone[0]).all()
    torch.testing.assert_close(learned(2), alone, atol=0, rtol=2e-3)
