"""On a real model: what mlx-drift says is what mlx-lm says, and its head is found."""

import json

import mlx_lm
import pytest

import real
from mlx_drift import stream_generate
from mlx_drift.demo import smollm2
from mlx_drift.drafters.load import load_converted

pytestmark = pytest.mark.real

SKY = "Why is the sky blue? Explain it to a child."
SAID = (
    "The sky is blue because of a process called scattering. When sunlight reaches our pla"
    "net, it's made up of different colors. Blue light has a shorter wavelength than"
)
"""How the 4-bit model begins to answer, on MLX's CPU backend."""

PROMPTS = {
    "words": SKY,
    "code": "Write a Python function that counts the vowels of a text.",
    "Chinese": "用中文介绍一下北京。",
    "emoji": "Tell a story in emoji only: 🐶🏠🌧️",
}


@pytest.fixture(scope="module")
def pair():
    model, tokenizer = mlx_lm.load(str(real.folder()))
    return model, tokenizer, load_converted(smollm2.HEAD, model)


def test_its_answer_is_known(pair):
    model, tokenizer, drafter = pair
    said = "".join(
        one.text
        for one in stream_generate(model, tokenizer, asked(tokenizer, SKY), 32, drafter=drafter)
    )
    assert said == SAID


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_its_tokens_are_those_of_mlx_lm(pair, prompt):
    model, tokenizer, drafter = pair
    tokens = asked(tokenizer, prompt)
    plain = [one.token for one in mlx_lm.stream_generate(model, tokenizer, tokens, 24)]
    said = stream_generate(model, tokenizer, tokens, 24, drafter=drafter, num_draft_tokens=4)
    assert [one.token for one in said] == plain


def test_auto_finds_the_head_and_demo_answers(cli, monkeypatch, tmp_path):
    count = "--max-tokens", 16, "--json"
    code, out, err = cli("generate", SKY, "--model", real.folder(), "--drafter", "auto", *count)
    assert code == 0, err
    assert "the head in this package" in err
    assert SAID.startswith(json.loads(out)["text"])
    monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path))
    code, out, err = cli("demo", "-p", SKY, "--gguf", real.gguf(), *count)
    assert code == 0, err
    found = json.loads(out)
    assert SAID.startswith(found["text"])
    assert found["statistics"]["rounds"] > 0


def asked(tokenizer, prompt):
    """The prompt in the model's template."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True
    )
