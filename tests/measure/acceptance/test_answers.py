"""A file of answers: what a kill leaves, and what is refused."""

import json

import mlx.core as mx
import pytest

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.errors import DriftError
from mlx_drift.measure.acceptance.answers import AnswerFile, Task, collect, describe
from mlx_drift.measure.acceptance.asking import Answer, Settings
from mlx_drift.measure.acceptance.questions import Question
from mlx_drift.target.model import Target
from tiny import tiny_drafter, tiny_llama

DESCRIBED = {"num_draft_tokens": 4, "drafters": {"A": 1}}


class TestGoingOn:
    def tasks(self, asked, stop=None):
        def ask(name):
            if name == stop:
                raise KeyboardInterrupt
            asked.append(name)
            return {"c": {"A": Answer((3, 7), ((4, int(name) % 4), (2, 1)))}}

        return [
            Task(
                Question(str(i), "set", "c", (f"{i}?",)), "c", {"c": ["A"]}, lambda i=i: ask(str(i))
            )
            for i in range(5)
        ]

    def run(self, path, asked, stop=None, settings=None):
        with AnswerFile(path, settings or DESCRIBED) as file:
            return collect(self.tasks(asked, stop), file)

    def test_no_question_is_repeated_or_lost(self, tmp_path):
        path, asked = tmp_path / "new" / "answers.jsonl", []
        with pytest.raises(KeyboardInterrupt):
            self.run(path, asked, stop="3")
        found = self.run(path, asked)
        assert asked == ["0", "1", "2", "3", "4"]
        assert found == self.run(None, [])
        assert self.run(path, asked) == found
        assert len(asked) == 5

    @pytest.mark.parametrize("cut", [1, 20, "a whole line", "the first line"])
    def test_what_a_kill_leaves(self, cut, tmp_path):
        path, asked = tmp_path / "answers.jsonl", []
        found = self.run(path, asked)
        data = path.read_bytes()
        end = {"a whole line": data[:-1].rfind(b"\n") + 1, "the first line": 30}
        path.write_bytes(data[: end[cut] if isinstance(cut, str) else -cut])
        asked.clear()
        assert self.run(path, asked) == found
        assert asked == (["0", "1", "2", "3", "4"] if cut == "the first line" else ["4"])
        assert path.read_bytes() == data

    def test_one_run_at_a_time(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        with AnswerFile(path, DESCRIBED), pytest.raises(DriftError, match="another run is writing"):
            AnswerFile(path, DESCRIBED)
        self.run(path, asked := [])
        assert len(asked) == 5

    def test_what_is_not_its_own(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        self.run(path, [])
        with pytest.raises(DriftError, match="num_draft_tokens was 4, not 3; give another file"):
            self.run(path, [], settings=DESCRIBED | {"num_draft_tokens": 3})
        with pytest.raises(DriftError, match="drafters was "):
            self.run(path, [], settings={"num_draft_tokens": 4})
        lines = path.read_bytes().splitlines(keepends=True)
        damage = (b"{}\n", b"[]\n", lines[3].replace(b"[4, 2]", b"[4, 5]"), b"\xff\n")
        for wrong in damage:
            path.write_bytes(b"".join([*lines[:3], wrong, *lines[4:]]))
            with pytest.raises(DriftError, match="damaged in line 4"):
                self.run(path, [])
        texts = b'{"mlx_drift_texts": 1, "settings": {}}\n'
        for other, told in {
            b"a text\n": "not a file of answers",
            b"a text without an end": "not a file of answers",
            texts: "not a file of answers",
            b'{"mlx_drift_answers": 9}\n': "is of version 9, not 1; give another",
        }.items():
            path.write_bytes(other)
            with pytest.raises(DriftError, match=told):
                self.run(path, [])
            assert path.read_bytes() == other  # which is left alone
        with pytest.raises(DriftError, match="cannot be written"):
            self.run(tmp_path, [])

    @pytest.mark.parametrize(
        "answers",
        [
            {},
            {"c": {}},
            {"other": {"A": {"prompt_tokens": [3], "rounds": [[4, 2]]}}},
            {"c": {"B": {"prompt_tokens": [3], "rounds": [[4, 2]]}}},
            {"c": {"A": {"prompt_tokens": [], "rounds": [[4, 2]]}}},
            {"c": {"A": {"prompt_tokens": [10**400], "rounds": [[4, 2]]}}},
            {"c": {"A": {"prompt_tokens": [float("inf")], "rounds": [[4, 2]]}}},
            {"c": {"A": {"prompt_tokens": [3], "rounds": []}}},
            {"c": {"A": {"prompt_tokens": [3], "rounds": [[10**30, 0]]}}},
            {"c": {"A": {"prompt_tokens": [3], "rounds": [[5, 0]]}}},
            {"c": {"A": {"prompt_tokens": [3], "rounds": [[2, -1]]}}},
        ],
    )
    def test_what_no_run_can_have_written(self, answers, tmp_path):
        path, asked = tmp_path / "answers.jsonl", []
        self.run(path, asked)
        lines = path.read_text().splitlines()
        lines[2] = json.dumps(json.loads(lines[2]) | {"answers": answers})
        path.write_text("\n".join([*lines[:-1], ""]))
        asked.clear()
        with pytest.raises(DriftError, match=r"answers\.jsonl is damaged in line 3; give another"):
            self.run(path, asked)
        assert asked == []

    def test_what_answers_depend_on(self):
        tiny = tiny_llama()
        drafter = tiny_drafter(tiny)
        told = [
            describe(tiny, {"A": one}, settings)
            for one in (drafter, drafter.windowed(8))
            for settings in (Settings(), Settings(seed=1))
        ]
        alike = tiny_drafter(tiny, rope_theta=5000.0), tiny_drafter(tiny, feedback="pre")
        mapped = ChainDrafter(drafter.config, drafter.network, Target(tiny), mx.arange(64))
        told += [describe(tiny, {"A": one}, Settings()) for one in (*alike, mapped)]
        assert all(a != b for i, a in enumerate(told) for b in told[:i])
        elsewhere = tiny_drafter(tiny, source={"repo": "another/name"})
        assert describe(tiny, {"A": elsewhere}, Settings()) == told[0]

    def test_what_prompt_lookup_depends_on(self):
        tiny = tiny_llama()
        shorter, longer = (
            describe(tiny, {"A": PromptLookupDrafter(tiny, shortest)}, Settings())
            for shortest in (3, 4)
        )
        assert shorter != longer

    def test_the_order_of_drafters(self, tmp_path):
        tiny = tiny_llama()
        drafter, path = tiny_drafter(tiny), tmp_path / "answers.jsonl"
        both = {"A": drafter, "B": drafter.windowed(8)}
        with AnswerFile(path, describe(tiny, both, Settings())):
            pass
        backwards = describe(tiny, dict(reversed(both.items())), Settings())
        with pytest.raises(DriftError, match=r"drafter_order was \['A', 'B'\], not \['B', 'A'\]"):
            AnswerFile(path, backwards)
