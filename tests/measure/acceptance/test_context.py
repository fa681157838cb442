"""Long contexts: what the prompts hold, and what the drafter sees of them."""

import pytest

from mlx_drift import load_demo
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.errors import DriftError
from mlx_drift.measure.acceptance.asking import Settings, answer
from mlx_drift.measure.acceptance.context import (
    ATTENTION,
    Contexts,
    check_lengths,
    parse_condition,
    parse_lengths,
    read_document,
    windows,
)
from mlx_drift.measure.acceptance.count import ALL, conditions
from mlx_drift.measure.acceptance.questions import Question
from mlx_drift.measure.acceptance.wording import Wording
from tiny import Letters, NoText, tiny_drafter, tiny_llama


@pytest.fixture(scope="module")
def tiny():
    return tiny_llama()


@pytest.fixture(scope="module")
def demo():
    return load_demo()


LONG = [
    Question(str(i), "set", "c", (f"What does `{name}` do?",))
    for i, name in enumerate(("os.path.join", "shlex.quote", "textwrap.dedent"))
]


class TestContexts:
    def contexts(self, demo, settings=None, document=None, drafters=None):
        model, tokenizer, drafter = demo
        return Contexts(
            model,
            tokenizer,
            drafters or {"A": drafter},
            LONG,
            Wording(),
            settings or Settings(num_draft_tokens=2, max_tokens=24),
            window=16,
            document=document,
        )

    def test_a_conversation_of_many_turns(self, demo):
        _, tokenizer, _ = demo
        found = self.contexts(demo)
        for length in (128, 300):
            prompt = found.prompt(1, length)
            assert length - 24 - 20 < len(prompt) <= length - 24
            text = tokenizer.decode(prompt)
            assert text.startswith("<|bos|><|user|>What does `")
            turns = text.removesuffix("<|eot|><|assistant|>").split("<|user|>")[1:]
            names = [turn.split("`")[1] for turn in turns]
            others = ["textwrap.dedent", "os.path.join"] * 9
            assert names[::-1] == ["shlex.quote", *others][: len(names)]  # itself but once
            own = found._own_answer(2)
            assert turns[-2] == f"What does `textwrap.dedent` do?<|eot|><|assistant|>{own}<|eot|>"

    def test_a_document(self, demo):
        _, tokenizer, _ = demo
        text = "".join(f"Line {i} of a long text about nothing. " for i in range(80))
        prompt = self.contexts(demo, document=text).prompt(0, 200)
        assert 170 < len(prompt) <= 176
        said = tokenizer.decode(prompt)
        assert said.startswith("<|bos|><|user|>Line 0 of a long text")
        assert said.endswith("\n\nWhat does `os.path.join` do?<|eot|><|assistant|>")
        with pytest.raises(DriftError, match="too few for a prompt of 976"):
            self.contexts(demo, document="A short one.").prompt(0, 1000)

    def test_an_empty_document(self, demo, tmp_path):
        path = tmp_path / "empty.txt"
        path.write_text(" \n")
        with pytest.raises(DriftError, match=r"empty\.txt: the document is empty"):
            read_document(path)
        with pytest.raises(DriftError, match="the document has 0 tokens"):
            self.contexts(demo, document="").prompt(0, 200)

    def test_a_single_question(self, tiny):
        def of(document):
            drafters = {"A": PromptLookupDrafter(tiny)}
            return Contexts(
                tiny,
                Letters(),
                drafters,
                LONG[:1],
                Wording(),
                Settings(max_tokens=12),
                window=16,
                document=document,
            )

        with pytest.raises(DriftError, match="give more questions, or a --document"):
            of(None)
        assert of("abc" * 99).prompt(0, 80)

    def test_what_a_task_gives(self, tiny):
        drafters = {"A": PromptLookupDrafter(tiny), "B": tiny_drafter(tiny)}
        settings = Settings(num_draft_tokens=2, max_tokens=12)
        found = Contexts(tiny, Letters(), drafters, LONG, Wording(), settings, window=16)
        task, *_ = found.tasks([80])
        answers = task.ask()
        assert [*map(list, answers.values())] == [["A", "B"], ["B"], ["B"], ["B"]]
        assert [(seen, list(by)) for seen, by in task.gives.items()] == [
            (seen, list(by)) for seen, by in answers.items()
        ]

    def test_a_question_that_does_not_fit(self, demo):
        with pytest.raises(DriftError, match="question 0 alone does not fit a context of 30"):
            self.contexts(demo).prompt(0, 30)

    def test_what_the_drafter_sees(self, demo):
        _, _, drafter = demo
        found = windows(drafter, 16, 7)
        assert tuple(found) == ATTENTION
        assert [(view.window, view.sinks) for view in found.values()] == [
            (None, 0),
            (16, 0),
            (16, 1),
            (16, 7),
        ]
        assert list(windows(PromptLookupDrafter(drafter.model), 16, 7)) == ["full"]

    def test_each_kind_of_attention_is_asked_the_same(self, tiny):
        drafter, settings = tiny_drafter(tiny), Settings(num_draft_tokens=2, max_tokens=12)
        drafters = {"A": drafter, "B": PromptLookupDrafter(tiny)}
        found = Contexts(tiny, Letters(), drafters, LONG, Wording(), settings, window=16)
        answers = found.ask(0, 80)
        assert [parse_condition(name) for name in answers] == [(80, seen) for seen in ATTENTION]
        prompt = found.prompt(0, 80)
        views = windows(drafter, 16, 0)
        for (name, by_drafter), (seen, view) in zip(answers.items(), views.items(), strict=True):
            assert list(by_drafter) == (["A", "B"] if seen == "full" else ["A"])
            _, alone = answer(tiny, NoText(), {"A": view}, prompt, settings)
            assert by_drafter["A"] == alone["A"], name
        reported = conditions([(LONG[0], answers)])
        assert [list(one.acceptance) for one in reported] == [["A", "B"], ["A"], ["A"], ["A"]]
        backwards = {"B": drafters["B"], "A": drafter}
        found = Contexts(tiny, Letters(), backwards, LONG, Wording(), settings, window=16)
        reported = conditions([(LONG[0], found.ask(0, 80))])
        assert reported[1].ratio == {"A": {ALL: None}}

    @pytest.mark.parametrize(
        ("text", "lengths"), [("1k,2K, 512", [512, 1024, 2048]), ("1000,1000", [1000])]
    )
    def test_lengths(self, text, lengths):
        assert parse_lengths(text) == lengths

    @pytest.mark.parametrize("text", ["", "1k,", "0", "-5", "4m", "1.5k", "9" * 10])
    def test_no_lengths(self, text):
        with pytest.raises(DriftError, match="is no length"):
            parse_lengths(text)

    @pytest.mark.parametrize(
        "config",
        [
            {"max_position_embeddings": 4096},
            {"text_config": {"max_position_embeddings": 4096}},
        ],
    )
    def test_the_targets_limit(self, config):
        check_lengths([1024, 4096], 128, config)
        with pytest.raises(DriftError, match="4097 tokens is beyond the target's 4096"):
            check_lengths([1024, 4097], 128, config)
        with pytest.raises(DriftError, match="128 tokens has no room for a prompt"):
            check_lengths([128], 128, config)

    def test_no_limit_is_known(self):
        check_lengths([1 << 20], 128, {"text_config": None, "max_position_embeddings": None})
