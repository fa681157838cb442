"""Draft models whose tokenizer is not quite the target's: what is drafted, told and refused."""

import json
import shutil

import mlx.core as mx
import pytest

from demo_text import expected_text
from mlx_drift import DraftModelDrafter, DriftError, stream_generate
from mlx_drift.demo import QUESTION, TARGET
from mlx_drift.drafters.shared_tokens import difference, shared_ids
from tiny import VOCAB, NoText, plain_greedy, tiny_llama

WORDS = {"a": 0, "b": 1, "c": 2}


class Tokenizer:
    """As much of one as is compared."""

    def __init__(self, words, added=()):
        self.words, self.added = words, dict(added)

    def get_vocab(self):
        return self.words | self.added

    def get_added_vocab(self):
        return self.added


TARGETS = Tokenizer(WORDS, {"<s>": 3, "<think>": 4})

SHARED = {
    "the same": (Tokenizer(WORDS, {"<s>": 3, "<think>": 4}), None),
    "the same, said otherwise": (Tokenizer(WORDS | {"<s>": 3}, {"<think>": 4}), None),
    "one is missing": (Tokenizer(WORDS, {"<s>": 3}), [0, 1, 2, 3]),
    "one more": (Tokenizer(WORDS, {"<s>": 3, "<think>": 4, "<tool>": 5}), [0, 1, 2, 3, 4]),
    "renamed": (Tokenizer(WORDS, {"<s>": 3, "<reserved>": 4}), [0, 1, 2, 3]),
    "swapped": (Tokenizer(WORDS, {"<think>": 3, "<s>": 4}), [0, 1, 2]),
    "fewer words": (Tokenizer({"a": 0, "b": 1}, {"<s>": 3, "<think>": 4}), [0, 1, 3, 4]),
    "more words": (Tokenizer(WORDS | {"d": 5}, {"<s>": 3, "<think>": 4}), [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", SHARED)
def test_ids_that_mean_the_same(name):
    other, expected = SHARED[name]
    assert shared_ids(TARGETS, other, "draft") == expected
    assert shared_ids(other, TARGETS, "draft") == expected
    if expected is not None:
        told = difference(TARGETS, other, expected, "draft")
        assert f"only the {len(expected)} others are drafted" in told


def test_the_tokens_that_differ_are_named():
    other, same = SHARED["renamed"]
    assert difference(TARGETS, other, same, "draft") == (
        "draft has not quite the target's tokenizer: 2 tokens are not the same in both "
        "(4 '<reserved>', 4 '<think>'); only the 4 others are drafted"
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Tokenizer({"b": 0, "a": 1, "c": 2}), "token 0 is 'b' and not 'a'"),
        (Tokenizer(WORDS | {"d": 3}), "token 3 is 'd' and not '<s>'"),
        (Tokenizer({"a": 0, "b": 1}, {"<x>": 2}), "token 2 is '<x>' and not 'c'"),
        (Tokenizer({"x": 7, "y": 8}), "share no token"),
    ],
)
def test_ids_that_matter_are_refused(other, message):
    with pytest.raises(DriftError, match=message) as refused:
        shared_ids(TARGETS, other, "draft")
    assert "draft has another tokenizer than the target" in str(refused.value)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("vocab_size", [VOCAB - 8, VOCAB, VOCAB + 8])
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_only_shared_ids_are_drafted(vocab_size, dtype, temp):
    """And what the draft model has no row for is not read beyond its embedding."""
    model, draft = tiny_llama(dtype), tiny_llama(dtype, vocab_size=vocab_size)
    shared = [token for token in range(VOCAB) if token % 3]
    drafter = DraftModelDrafter(draft, model, shared)
    prompt = [VOCAB - 1, 5, VOCAB - 2, 9]
    said, drafted, propose = [], [], drafter.propose

    def noted(k, cache, chooser=None):
        proposed = propose(k, cache, chooser)
        drafted.append(proposed.tokens)
        return proposed

    drafter.propose = noted
    for response in stream_generate(
        model, NoText(), prompt, 24, drafter=drafter, temp=temp, seed=3
    ):
        said.append(response.token)
    tokens = {token for tokens in drafted for token in tokens.tolist()}
    assert tokens
    assert tokens <= set(shared)
    if temp == 0.0 and dtype == mx.float32:
        assert said == plain_greedy(model, prompt, 24)


def test_an_id_without_a_row_is_read_as_the_last_one():
    model, draft = tiny_llama(), tiny_llama(vocab_size=VOCAB - 8)
    drafter = DraftModelDrafter(draft, model)
    logits = []
    for token in (VOCAB - 1, VOCAB - 9):  # the target's last one, the draft model's last one
        cache = drafter.make_cache()
        drafter.start(mx.array([token]), cache)
        logits.append(cache.logits)
    assert mx.array_equal(*logits)


def test_on_the_command_line(cli, refuses, tmp_path):
    def draft(name, change):
        folder = shutil.copytree(TARGET, tmp_path / name)
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        change(tokenizer)
        path.write_text(json.dumps(tokenizer))
        return folder

    def more(tokenizer):
        last = dict(tokenizer["added_tokens"][-1])
        known = max(tokenizer["model"]["vocab"].values())
        tokenizer["added_tokens"].append(last | {"id": known + 1, "content": "<think>"})

    def swap(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        first, second = "a", "b"
        vocab[first], vocab[second] = vocab[second], vocab[first]

    code, out, err = cli("generate", QUESTION, "-m", 16, "--draft-model", draft("more", more))
    assert (code, out) == (0, expected_text(16) + "\n")
    assert "not quite the target's tokenizer" in " ".join(err.split())
    assert "'<think>'" in err
    other = draft("swap", swap)
    refuses("has another tokenizer than the target", "generate", "x", "--draft-model", other)
