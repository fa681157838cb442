"""MTP heads on targets of their families: the tokens are the target's own, whatever is drafted."""

import mlx.core as mx
import pytest

from families import build
from mlx_drift import convert_drafter, stream_generate
from mlx_drift.drafters.load import load_converted
from mlx_drift.target.model import Target
from mtp_heads import FAMILIES, config_of, head, write_repository, written
from tiny import NoText, plain_greedy

PROMPT = [5, 9, 2, 44, 17, 3, 60, 11, 25]
LENGTH = 32


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Converts each family's head once."""
    home, done = tmp_path_factory.mktemp("heads"), {}

    def convert(name):
        if name not in done:
            source = home / name / "source"
            write_repository(source, config_of(name), written(name, head(name)))
            done[name] = home / name / "out"
            convert_drafter(str(source), done[name], mtp=True, strict=True)
        return done[name]

    return convert


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_head_comes_back_as_mlx_lm_has_its_block(name, converted):
    expected, found = head(name), mx.load(str(converted(name) / "model.safetensors"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert mx.array_equal(found[key], value).item(), key


@pytest.mark.filterwarnings("ignore:only 0% of the first drafts")
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_the_target_s(name, converted):
    model = build(FAMILIES[name].target)
    drafter = load_converted(converted(name), model)
    plain = plain_greedy(model, PROMPT, LENGTH)
    for k in (1, 2, 3):
        responses = stream_generate(
            model, NoText(), PROMPT, LENGTH, drafter=drafter, num_draft_tokens=k
        )
        assert [response.token for response in responses] == plain


@pytest.mark.filterwarnings("ignore:only .* of the first drafts")
@pytest.mark.parametrize("name", ["mimo", "qwen3_5"])
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_a_target_that_is_padded_since(name, temp, tmp_path):
    """Its config names a few ids less than the target has; the target's own head is used."""
    model = build(FAMILIES[name].target)
    shape = Target(model).shape
    sizes = {"vocab_size": shape.vocab_size - 3}
    write_repository(tmp_path / "source", config_of(name, **sizes), written(name, head(name)))
    done = convert_drafter(str(tmp_path / "source"), tmp_path / "out", mtp=True, target=shape)
    assert "others are taken for padding" in done.notes[-1]
    drafter = load_converted(tmp_path / "out", model)
    responses = stream_generate(model, NoText(), PROMPT, LENGTH, drafter=drafter, temp=temp, seed=0)
    said = [response.token for response in responses]
    assert len(said) == LENGTH
    if temp == 0.0:
        assert said == plain_greedy(model, PROMPT, LENGTH)
