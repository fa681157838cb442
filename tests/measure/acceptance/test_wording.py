"""Wordings: exactly which tokens each condition gives."""

import pytest

from mlx_drift import load_demo
from mlx_drift.cli.prompts import apply_template, encode
from mlx_drift.errors import DriftError
from mlx_drift.measure.acceptance.perturb import perturbations, same_prompts
from mlx_drift.measure.acceptance.questions import Question
from mlx_drift.measure.acceptance.wording import Wording
from tiny import Letters

QUESTIONS = [Question("a", "set", "one", ("What?", "And then?"))]


@pytest.fixture(scope="module")
def demo():
    return load_demo()


class TestWording:
    TEXTS = ("What?", "That.", "And then?")

    def test_the_four_conditions(self, demo):
        _, tokenizer, _ = demo
        bos, inside = tokenizer.bos_token_id, lambda *texts: tokenizer.encode("".join(texts))
        laid_out = inside(
            "<|user|>What?<|eot|><|assistant|>That.<|eot|><|user|>And then?<|eot|><|assistant|>"
        )
        raw = inside("What?\n\nThat.\n\nAnd then?")
        found = [wording.encode(tokenizer, self.TEXTS) for wording in perturbations()]
        assert found == [[bos, *laid_out], laid_out, [bos, *raw], raw]

    def test_bos_is_there_once(self, demo):
        _, tokenizer, _ = demo
        twice, none = ("{{bos_token}}{{bos_token}}", ""), "{{messages[0].content}}"
        for prefix in (*twice, "{{bos_token}}"):
            wording = perturbations({"mine": prefix + none})[-1]
            assert wording.name == "template mine"
            assert wording.encode(tokenizer, ["What?"]) == [0, *tokenizer.encode("What?")]

    def test_a_system_prompt(self, demo):
        _, tokenizer, _ = demo
        *_, one, two = perturbations(system_prompts=["Be brief.", "Be kind."])
        assert (one.name, two.name) == ("system prompt 1", "system prompt 2")
        for wording, text in ((one, "Be brief."), (two, "Be kind.")):
            tokens = wording.encode(tokenizer, ["What?"], "the question's own")
            assert tokenizer.decode(tokens) == (
                f"<|bos|><|system|>{text}<|eot|><|user|>What?<|eot|><|assistant|>"
            )
        own = Wording().encode(tokenizer, ["What?"], "Its own.")
        assert tokenizer.decode(own).startswith("<|bos|><|system|>Its own.<|eot|>")
        assert Wording().head(tokenizer) == 2
        assert Wording().head(tokenizer, "Be kind.") == len(tokenizer.encode("Be kind.")) + 4
        assert Wording(ignore_chat_template=True).head(tokenizer) == 0

    def test_as_generate_has_it(self, demo):
        _, tokenizer, _ = demo
        for ignore in (False, True):
            laid_out = apply_template(
                tokenizer, "What?", template_keywords={}, system_prompt=None, ignore=ignore
            )
            wording = Wording(ignore_chat_template=ignore)
            assert wording.encode(tokenizer, ["What?"]) == encode(tokenizer, laid_out)

    def test_conditions_that_change_nothing(self, demo):
        _, tokenizer, _ = demo

        class NoBos:
            bos_token_id = None

            def __getattr__(self, name):
                return getattr(tokenizer, name)

        assert same_prompts(tokenizer, perturbations(), QUESTIONS) == {}
        assert same_prompts(NoBos(), perturbations(), QUESTIONS) == {
            "template, no BoS": "template, BoS",
            "no template, no BoS": "no template, BoS",
        }
        no_template = same_prompts(Letters(), perturbations(), QUESTIONS)
        assert set(no_template.values()) == {"template, BoS"}
        assert len(no_template) == 3

    def test_conditions_that_only_change_later_turns(self, demo):
        _, tokenizer, _ = demo
        last = "{{bos_token}}{{messages[-1].content}}"
        every = "{{bos_token}}{% for message in messages %}{{message.content}}{% endfor %}"
        wordings = perturbations({"last": last, "every": every})
        assert same_prompts(tokenizer, wordings, QUESTIONS) == {}
        one_turn = [Question("a", "set", "one", ("What?",))]
        assert same_prompts(tokenizer, wordings, one_turn) == {
            "template last": "no template, BoS",
            "template every": "no template, BoS",
        }

    def test_a_template_that_refuses(self, demo):
        _, tokenizer, _ = demo
        for template in ("{{ raise_exception('no') }}", "{% for", "{{ messages[9].content }}"):
            with pytest.raises(DriftError, match="template mine: the chat template refuses"):
                perturbations({"mine": template})[-1].encode(tokenizer, ["What?"])
        with pytest.raises(DriftError, match="nothing is left"):
            Wording("mine", chat_template="{{''}}", bos=False).encode(tokenizer, ["What?"])
