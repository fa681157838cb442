"""`measure`: every figure against one computed by hand, and against what `generate` says."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_drift import load_demo, make_prompt_cache, stream_generate
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.measure.acceptance.asking import Answer, Settings, answer, ask
from mlx_drift.measure.acceptance.count import ALL, Acceptance, conditions
from mlx_drift.measure.acceptance.questions import Question
from mlx_drift.measure.acceptance.wording import Wording
from mlx_drift.measure.bootstrap import ratio, ratio_of_ratios
from tiny import Knowing, Letters, NoText, tiny_drafter, tiny_llama

QUESTIONS = [
    Question("a", "set", "one", ("What?", "And then?")),
    Question("b", "set", "two", ("Why?",)),
]
SETTINGS = Settings(num_draft_tokens=3, max_tokens=9)


@pytest.fixture(scope="module")
def tiny():
    return tiny_llama()


@pytest.fixture(scope="module")
def demo():
    return load_demo()


class TestByHand:
    # Nine tokens, at most three drafts a round. All right: 4 tokens; the first wrong: 1; the third
    # wrong: 3; one token is left, for which nothing is drafted.
    SPOILT = (set(), {0}, {2}, {1})
    ROUNDS = ((3, 3), (1, 0), (3, 2), (0, 0))

    def test_rounds(self, tiny):
        wrong = Knowing(tiny, [{0}])
        drafters = {"some": Knowing(tiny, self.SPOILT), "none": wrong}
        found = ask(tiny, Letters(), drafters, QUESTIONS[0], Wording(), SETTINGS)
        assert found["some"].rounds == self.ROUNDS * 2  # two turns
        assert found["none"].rounds == (((1, 0),) * 8 + ((0, 0),)) * 2
        assert found["some"].prompt_tokens == (5, 5 + 2 + 0 + 2 + 9)  # its answer has no text

    def test_figures(self):
        found = Acceptance.of([Answer((5, 18), self.ROUNDS * 2), Answer((4,), self.ROUNDS)])
        assert (found.questions, found.rounds, found.prompt_tokens) == (2, 12, 11)
        assert found.acceptance_length == (1.25, 1.25, 1.25)
        assert found.tokens_per_round == (2.25, 2.25, 2.25)
        assert [v.value for v in found.conditional_acceptance] == [2 / 3, 1, 1 / 2]
        assert [v.value for v in found.unconditional_acceptance] == [1 / 2, 1 / 2, 1 / 4]

    def test_acceptance_by_level_and_rank_of_trees(self):
        ranks = ((0, 0, 2), (0, 1, 5), (0, 3, 1), (1, 0, 4))
        answers = [Answer((4,), self.ROUNDS, ranks), Answer((4,), self.ROUNDS, ((0, 1, 2),))]
        first, second = Acceptance.of(answers).acceptance_by_rank
        assert [share.value for share in first] == [7 / 10, 0, 1 / 10]
        assert [share.value for share in second] == [0]
        assert Acceptance.of([Answer((4,), self.ROUNDS)]).to_dict()["acceptance_by_rank"] == []

    def test_figures_as_json(self):
        (one,) = [Acceptance.of([Answer((4,), self.ROUNDS)]).to_dict()]
        assert one == {
            "questions": 1,
            "rounds": 4,
            "prompt_tokens": 4,
            "acceptance_length": [1.25, None, None],
            "tokens_per_round": [2.25, None, None],
            "conditional_acceptance": [[2 / 3, None, None], [1, None, None], [0.5, None, None]],
            "unconditional_acceptance": [[0.5, None, None], [0.5, None, None], [0.25, None, None]],
            "acceptance_by_rank": [],
        }

    def test_groups_and_ratios(self):
        good, bad = Answer((1,), ((2, 2), (2, 1))), Answer((1,), ((1, 0), (2, 1)))
        questions = [
            Question("1", "a", "x", ("?",)),
            Question("2", "a", "y", ("?",)),
            Question("3", "b", "z", ("?",)),
        ]
        of_each = {"first": {"A": good, "B": bad}, "second": {"A": bad, "B": bad}}
        found = [(question, of_each) for question in questions]
        first, second, same = conditions(found, {"third": "second"})
        assert list(first.acceptance["A"]) == [ALL, "a", "a/x", "a/y", "b"]  # b/z is b
        assert [one.questions for one in first.acceptance["A"].values()] == [3, 2, 1, 1, 1]
        assert first.acceptance["A"][ALL].acceptance_length.value == 1.5
        third = (1 / 3, 1 / 3, 1 / 3)
        assert first.ratio == {
            name: dict.fromkeys(first.acceptance[name], ratio)
            for name, ratio in {"A": (1, 1, 1), "B": third}.items()
        }
        assert first.kept == {"A": (1, 1, 1), "B": (1, 1, 1)}
        assert second.kept == {"A": third, "B": (1, 1, 1)}
        assert (same.name, same.same_as, same.acceptance) == ("third", "second", second.acceptance)
        one_source = conditions(found[:2])
        assert list(one_source[0].acceptance["A"]) == [ALL, "x", "y"]

    def test_a_ratio_is_of_its_group(self):
        """What all questions together hide: one group gains and the other loses."""
        some, more = Answer((1,), ((1, 1), (1, 0))), Answer((1,), ((1, 1), (1, 1)))
        questions = [Question(str(n), "a", "xy"[n % 2], ("?",)) for n in range(4)]
        of_each = [{"c": {"A": some, "B": more}}, {"c": {"A": more, "B": some}}]
        (found,) = conditions([(one, of_each[n % 2]) for n, one in enumerate(questions)])
        assert found.ratio["B"]["x"] == (2, 2, 2)
        assert found.ratio["B"]["y"] == (0.5, 0.5, 0.5)
        value, low, high = found.ratio["B"][ALL]
        assert (value, low, high) == (1, 0.5, 2)
        told = found.to_dict()["drafters"]["B"]["ratio_to_first_drafter"]
        assert told == {ALL: [value, low, high], "x": [2, 2, 2], "y": [0.5, 0.5, 0.5]}

    def test_a_ratio_to_nothing(self):
        nothing, some = Answer((1,), ((1, 0),)), Answer((1,), ((1, 1),))
        (found,) = conditions([(QUESTIONS[0], {"c": {"A": nothing, "B": some}})])
        assert found.ratio == {"A": {ALL: None}, "B": {ALL: None}}
        assert found.to_dict()["drafters"]["B"]["ratio_to_first_drafter"] == {ALL: None}


class TestBootstrap:
    def test_bounds_of_two_prompts(self):
        # A quarter of the draws is of the first one alone, a quarter of the second.
        assert ratio([1, 4], [4, 4]) == (5 / 8, 1 / 4, 1)
        assert ratio([0, 4], [0, 4]) == (1, 1, 1)

    def test_coverage(self):
        random = np.random.default_rng(1)
        hits = 0
        for trial in range(200):
            rounds = random.integers(20, 60, 40)
            found = ratio(random.binomial(rounds, 0.6), rounds, seed=trial)
            hits += found.low <= 0.6 <= found.high
        assert 180 <= hits <= 199

    def test_a_ratio_is_paired(self):
        above, below = ([2, 8, 2], [1, 2, 4]), ([1, 4, 1], [1, 2, 4])
        assert ratio_of_ratios(above, below) == (2, 2, 2)
        assert ratio_of_ratios(above, ([0, 0, 0], [1, 2, 4])) is None


class TestAgainstGenerate:
    @pytest.mark.parametrize("temp", [0.0, 0.8])
    def test_all_turns(self, demo, temp):
        model, tokenizer, drafter = demo
        other = load_demo_drafter(model)
        settings = Settings(num_draft_tokens=4, max_tokens=12, temp=temp)
        question = Question("q", "set", "c", ("Show me `shlex.quote`.", "What does it return?"))
        seeds = iter(range(2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "mlx_drift.measure.acceptance.asking.question_seed", lambda *_: next(seeds)
            )
            found = ask(model, tokenizer, {"A": drafter, "B": other}, question, Wording(), settings)
        messages = []
        rounds = []
        for seed, turn in enumerate(question.turns):
            messages.append({"role": "user", "content": turn})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            texts = []
            for one in (drafter, other):
                *_, last = responses = list(
                    stream_generate(
                        model,
                        tokenizer,
                        prompt,
                        drafter=one,
                        num_draft_tokens=4,
                        max_tokens=12,
                        temp=temp,
                        seed=seed,
                    )
                )
                rounds.append(last.statistics)
                texts.append("".join(response.text for response in responses))
            messages.append({"role": "assistant", "content": texts[0]})
        for name, statistics in (("A", rounds[0::2]), ("B", rounds[1::2])):
            statistics[0].add(statistics[1])
            figures = Acceptance.of([found[name]])
            assert figures.rounds == statistics[0].rounds
            assert figures.acceptance_length.value == statistics[0].acceptance_length
            assert figures.tokens_per_round.value == statistics[0].tokens_per_round
            assert [value.value for value in figures.conditional_acceptance] == statistics[
                0
            ].conditional_acceptance

    def test_the_commands(self, cli, tmp_path):
        path = tmp_path / "one.txt"
        path.write_text("Show me the source of `shlex.quote`.")
        options = ("--max-tokens", 20, "--num-draft-tokens", 4, "--json")
        _, out, _ = cli("measure", "--questions", path, *options)
        measured = json.loads(out)["conditions"][0]["drafters"]["eagle3.1"]["acceptance"][ALL]
        _, out, _ = cli("generate", path.read_text(), *options)
        generated = json.loads(out)["statistics"]
        assert measured["rounds"] == generated["rounds"]
        assert measured["acceptance_length"][0] == generated["acceptance_length"]
        assert [v[0] for v in measured["conditional_acceptance"]] == generated[
            "conditional_acceptance"
        ]

    def test_drafters_of_other_taps_and_of_none(self, tiny):
        drafters = {
            "A": tiny_drafter(tiny),
            "B": tiny_drafter(tiny, taps=(0, 2, 4), feedback="pre"),
            "C": PromptLookupDrafter(tiny),
        }
        prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
        settings = Settings(num_draft_tokens=2, max_tokens=20, prefill_step_size=4)
        _, together = answer(tiny, NoText(), drafters, prompt, settings)
        for name, drafter in drafters.items():
            _, alone = answer(tiny, NoText(), {name: drafter}, prompt, settings)
            assert alone[name] == together[name]
            *_, last = stream_generate(
                tiny, NoText(), prompt, 20, drafter=drafter, num_draft_tokens=2
            )
            assert len(together[name].rounds) == last.statistics.rounds
            assert sum(n for _, n in together[name].rounds) == sum(last.statistics.accepted)
        assert answer(tiny, NoText(), drafters, [7], settings)[1]["A"].rounds  # nothing to read

    def test_a_prompt_read_together_leaves_what_one_read_alone_does(self, tiny):
        from mlx_drift.measure.acceptance.asking import _read_together

        drafter, prompt = tiny_drafter(tiny), [3, 1, 4, 1, 5, 9, 2, 6]
        (together,) = _read_together(tiny, [drafter], prompt, 3)
        alone = make_prompt_cache(tiny, drafter, max_snapshots=0)
        alone.read(prompt, step_size=3, progress=lambda done, total: None)
        for owner in ("target_cache", "drafter_cache"):
            a, b = (getattr(cache, owner).to_arrays() for cache in (together, alone))
            assert a.keys() == b.keys()
            assert all(mx.array_equal(a[name], b[name]) for name in a)


def load_demo_drafter(model):
    from mlx_drift.demo import DEMO
    from mlx_drift.drafters.load import load_converted

    return load_converted(DEMO / "eagle3", model)


class TestTheCommand:
    @pytest.fixture
    def asked(self, tmp_path):
        path = tmp_path / "set.jsonl"
        path.write_text(
            '{"question_id": 1, "category": "a", "turns": ["Show me `shlex.quote`.", "Why?"]}\n'
            '{"question_id": 2, "category": "b", "turns": ["What does `os.getcwd` do?"]}\n'
        )
        return ("measure", "--questions", path, "-m", 5, "--num-draft-tokens", 2)

    BOTH = ("--drafter", "eagle3", "--drafter", "eagle3.1")

    def test_a_table(self, cli, asked, tmp_path):
        picture = tmp_path / "picture.png"
        code, out, err = cli(*asked, *self.BOTH, "--plot", picture)
        assert (code, err) == (0, "")
        for text in ("eagle3.1", "tokens_per_round", "÷ that of eagle3", "  draft 2", "  b (1)"):
            assert text in out
        assert "vLLM's mean acceptance length" in out
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_two_runs_give_the_same_json(self, cli, asked, tmp_path):
        save = ("--save", tmp_path / "answers.jsonl")
        _, first, _ = cli(*asked, *self.BOTH, "--json", "--temp", 0.5)
        _, second, _ = cli(*asked, *self.BOTH, "--json", "--temp", 0.5, "--limit", 1, *save)
        _, third, _ = cli(*asked, *self.BOTH, "--json", "--temp", 0.5, *save)
        assert first == third
        assert json.loads(second)["conditions"][0]["drafters"]["eagle3"]["acceptance"][ALL][
            "acceptance_length"
        ][1:] == [None, None]
        told = json.loads(first)
        assert list(told["conditions"][0]["drafters"]["eagle3.1"]["acceptance"]) == [ALL, "a", "b"]
        assert told["settings"]["num_draft_tokens"] == 2
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3

    def test_perturbed(self, cli, asked, tmp_path):
        template = tmp_path / "mine.jinja"
        template.write_text("{{messages[0].content}}:")
        picture = tmp_path / "picture.png"
        code, out, _ = cli(
            *asked,
            *self.BOTH,
            "--limit",
            1,
            "--perturb",
            "--chat-template",
            template,
            "--system-prompt",
            "Be brief.",
            "--plot",
            picture,
        )
        assert code == 0
        for text in ("no template, no BoS", "template mine", "system prompt 1", "eagle3.1 ÷"):
            assert text in out
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_contexts(self, cli, asked, tmp_path):
        picture = tmp_path / "picture.svg"
        options = ("--context", "64,96", "--window", 16, "-m", 4)
        save = ("--save", tmp_path / "answers.jsonl")
        code, out, _ = cli(*asked, *options, "--plot", picture, *save)
        assert code == 0
        assert cli(*asked, *options, *save) == (0, out, "")
        for text in ("64 tokens, full", "96 tokens, window + system prompt", "come 2."):
            assert text in out
        assert "<svg" in picture.read_text()

    def test_what_it_refuses(self, refuses, asked, tmp_path, monkeypatch):
        refuses("no such file", "measure", "--questions", tmp_path / "none.jsonl")
        refuses("none: cannot be read", *asked, "--chat-template", tmp_path / "none")
        refuses("beyond the target's 4096", *asked, "--context", "1k,5k")
        refuses("none.txt: cannot be read", *asked, "--context", "1k", "--document", "none.txt")
        empty = tmp_path / "empty.txt"
        empty.write_text("")
        refuses("the document is empty", *asked, "--context", "1k", "--document", empty)
        refuses("give more questions, or", *asked, "--context", "1k", "--limit", 1)
        refuses("is given more than once", *asked, "--drafter", "eagle3", "--drafter", "eagle3")
        refuses("needs its --model", *asked, "--drafter", "eagle3", "--drafter", "other")
        refuses("measure one after the other", *asked, "--perturb", "--context", "1k")
        refuses("--document is for --context", *asked, "--document", "none.txt")
        refuses("give one of them", *asked, "--perturb", "--ignore-chat-template")
        refuses("only --perturb", *asked, "--system-prompt", "a", "--system-prompt", "b")
        refuses("--num-draft-tokens is 0", *asked, "--num-draft-tokens", 0)
        alone = asked[: asked.index("--num-draft-tokens")]
        for flag in ("--num-draft-tokens", "--tree"):
            refuses(f"{flag} is auto; expected a number: what auto", *alone, flag, "auto")
        refuses("--tree is 1; expected 2 to 65 rows", *alone, "--tree", 1)
        refuses("a picture is written as .png", *asked, "--plot", "picture.gif")
        refuses("there is no folder", *asked, "--plot", tmp_path / "none" / "picture.png")
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        refuses("pip install 'mlx-drift[plot]'", *asked, "--plot", "picture.png")

    def test_interrupted(self, cli, asked, tmp_path, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("mlx_drift.measure.acceptance.perturb.ask", interrupt)
        path = tmp_path / "answers.jsonl"
        code, out, err = cli(*asked, "--save", path)
        assert (code, out) == (130, "")
        assert err.strip() == f"interrupted after 0 of 2; with --save {path} again it goes on"
