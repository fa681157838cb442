"""The embedded heads that feed nothing back: small, lossless, and worth their drafts."""

import pytest

from mlx_drift import generate, load_demo, stream_generate
from mlx_drift.demo import DEMO
from mlx_drift.drafters.load import load_converted

QUESTION = "Show me the source of `shlex.quote`."
KINDS = {"dflash": 7, "medusa": 4}
MOST_BYTES = 1_500_000


@pytest.mark.parametrize("name", KINDS)
def test_it_is_small_and_drafts_as_many_as_it_was_trained_for(name):
    model, _, drafter = load_demo(name)
    assert (DEMO / name / "model.safetensors").stat().st_size <= MOST_BYTES
    assert drafter.max_drafts == KINDS[name]
    assert drafter.config.quantization is not None
    assert drafter.config.draft_vocab_size == 2048
    assert load_converted(DEMO / name, model).max_drafts == KINDS[name]


@pytest.mark.parametrize("name", KINDS)
def test_the_answer_is_the_targets_and_some_drafts_are(name):
    model, tokenizer, drafter = load_demo(name)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    *_, last = stream_generate(model, tokenizer, prompt, 40, drafter=drafter, num_draft_tokens=9)
    assert max(last.statistics.tested) > 0
    assert last.statistics.acceptance_length > 0.2
    ours = generate(model, tokenizer, prompt, drafter=drafter, max_tokens=40, num_draft_tokens=9)
    assert ours == generate(model, tokenizer, prompt, drafter=None, max_tokens=40)
