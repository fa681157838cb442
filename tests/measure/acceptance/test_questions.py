"""Question files: every known record, and every way a file can be wrong."""

import json

import pytest

from hub_stub import StubHub, set_endpoint, settle
from mlx_drift.errors import DriftError
from mlx_drift.measure.acceptance.questions import (
    MOST_AT_ONCE,
    Question,
    read_question_files,
    read_questions,
)

RECORDS = {
    "fastchat": (
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        Question("81", "q", "writing", ("Write.", "Again.")),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "#### 3"},
        Question("1", "q", "gsm8k", ("How many?",)),
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "assert f()"},
        Question("HumanEval/0", "q", "humaneval", ("def f():\n",)),
    ),
    "alpaca": (
        {"instruction": "Translate.", "input": "Hallo", "output": "Hello"},
        Question("1", "q", "alpaca", ("Translate.\n\nHallo",)),
    ),
    "alpaca without input": (
        {"instruction": "Say something.", "input": ""},
        Question("1", "q", "alpaca", ("Say something.",)),
    ),
    "math-500": (
        {"problem": "Solve $x=1$.", "subject": "Algebra", "unique_id": "test/1.json"},
        Question("test/1.json", "q", "math-500", ("Solve $x=1$.",)),
    ),
    "gpqa": (
        {
            "Question": "Which?",
            "Correct Answer": "delta",
            "Incorrect Answer 1": "beta",
            "Incorrect Answer 2": "alpha",
            "Incorrect Answer 3": "gamma",
            "Record ID": "rec0",
        },
        Question("rec0", "q", "gpqa", ("Which?\n\nA) alpha\nB) beta\nC) delta\nD) gamma",)),
    ),
    "livecodebench": (
        {"question_content": "Sort.", "starter_code": "def sort(x):", "question_id": "1873_A"},
        Question(
            "1873_A",
            "q",
            "livecodebench",
            ("Sort.\n\nStart from this code:\n\n```python\ndef sort(x):\n```",),
        ),
    ),
    "livecodebench without code": (
        {"question_content": "Sort.", "starter_code": ""},
        Question("1", "q", "livecodebench", ("Sort.",)),
    ),
    "messages": (
        {
            "id": "a",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
                {"role": "assistant", "content": None},
                {"role": "user", "content": "Bye."},
            ],
        },
        Question("a", "q", "messages", ("Hi.", "Bye."), "Be brief."),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("form", ["lines", "list"])
def test_every_known_record(name, form, tmp_path):
    record, expected = RECORDS[name]
    path = tmp_path / "q.json"
    text = f"\n{json.dumps(record)}\n\n" if form == "lines" else json.dumps([record], indent=1)
    path.write_text(text, encoding="utf-8-sig")
    (found,) = read_questions(path)
    if form == "lines" and expected.id == "1":
        assert found.id == "2"  # the line
    else:
        assert found == expected


def test_records_of_several_kinds_in_one_file(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(record) for record, _ in RECORDS.values()))
    found = read_questions(path)
    assert [question.turns for question in found] == [e.turns for _, e in RECORDS.values()]
    assert read_questions(path, limit=3) == found[:3]


def test_plain_text(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("[What is this?]\r\n\n  And that?  \n")
    assert read_questions(path) == [
        Question("1", "plain", "text", ("[What is this?]",)),
        Question("3", "plain", "text", ("And that?",)),
    ]


def test_a_table(tmp_path):
    path = tmp_path / "gpqa.csv"
    path.write_text(
        "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n"
        '"Which,\nand why?",d,c,b,a\n'
    )
    (question,) = read_questions(path)
    assert question.turns == ("Which,\nand why?\n\nA) a\nB) b\nC) c\nD) d",)


def test_a_table_with_separators_in_its_texts(tmp_path):
    path = tmp_path / "table.csv"
    texts = "One\u2028two", "three\x85four", "five\x0csix", "a line\r\nand another"
    rows = "".join(f'"{text}",x\r\n' for text in texts)
    path.write_bytes(f"question,category\r\n{rows}".encode())
    assert [(q.id, q.turns) for q in read_questions(path)] == [
        (str(number), (text,)) for number, text in enumerate(texts, 1)
    ]


def test_ids_and_sources_are_unique(tmp_path):
    paths = [tmp_path / "a" / "test.jsonl", tmp_path / "b" / "test.jsonl"]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"id": 7, "prompt": "One."}\n{"id": 7, "prompt": "Two."}\n')
    found = read_question_files(paths)
    assert [(q.source, q.id) for q in found] == [
        ("test", "7"),
        ("test", "7#2"),
        ("test-2", "7"),
        ("test-2", "7#2"),
    ]
    assert len(read_question_files(paths, limit=1)) == 2


MALFORMED = {
    "line 2: none of the fields turns": {"text": "?"},
    "line 2: a JSON list; expected an object": ["?"],
    "line 2: prompt has '\\ud800' at 1, which is half a character": {"prompt": "A\ud800"},
    "line 2: turns[0] has '\\udc00' at 0": {"turns": ["\udc00"]},
    "line 2: category has '\\ud800' at 0": {"prompt": "A", "category": "\ud800"},
    "line 2: task_id has '\\ud800' at 0": {"prompt": "A", "task_id": "\ud800"},
    "line 2: turns is 'Hi.'; expected a list": {"turns": "Hi."},
    "line 2: turns is []": {"turns": []},
    "line 2: turns[1] is 3; expected a text": {"turns": ["Hi.", 3]},
    "line 2: question is empty": {"question": "  "},
    "line 2: prompt is None": {"prompt": None},
    "line 2: input is 3": {"instruction": "Go.", "input": 3},
    "line 2: Incorrect Answer 1 is None": {"Question": "?", "Correct Answer": "!"},
    "line 2: starter_code is []": {"question_content": "Sort.", "starter_code": []},
    "line 2: messages is {}": {"messages": {}},
    "line 2: messages has none of the user's": {"messages": []},
    "line 2: messages[0] is 'Hi.'": {"messages": ["Hi."]},
    "line 2: messages[0].role is 'tool'": {"messages": [{"role": "tool", "content": "?"}]},
    "line 2: messages[0].content is None": {"messages": [{"role": "user"}]},
    "messages[0].content[0] is {'type': 'image'}": {
        "messages": [{"role": "user", "content": [{"type": "image"}]}]
    },
}


@pytest.mark.parametrize("message", MALFORMED)
def test_a_malformed_record_names_line_and_field(message, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "Fine."}) + "\n" + json.dumps(MALFORMED[message]))
    with pytest.raises(DriftError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", b'{"prompt": "Fine."}\n{"prompt": \n', "line 2: not valid JSON"),
        ("q.jsonl", b'{"prompt": "Fine."}\n{"prompt": "\xff"}', "line 2: not UTF-8"),
        ("q.jsonl", b"[" * 100_000, "not valid JSON"),
        ("q.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", "line 1: not valid JSON"),
        ("q.jsonl", b" " * (MOST_AT_ONCE + 2), "line 1: longer than 64 MiB"),
        ("q.json", b'[{"prompt": "Fine."}, 3]', "record 2: a JSON int"),
        ("q.json", b"[" + b" " * MOST_AT_ONCE, "larger than 64 MiB"),
        ("q.jsonl", b"\n\n", "there are no questions in it"),
        ("q.txt", b"", "there are no questions in it"),
        ("q.csv", b"Question\n?\n", "record 1: Correct Answer is None"),
        ("q.parquet", b"PAR1", "not from .parquet"),
    ],
)
def test_a_file_that_is_wrong(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DriftError, match="q") as error:
        read_questions(path)
    assert message in str(error.value)


def test_no_file(tmp_path):
    for text in (tmp_path / "none.jsonl", "none.jsonl", "a/b/none.jsonl"):
        with pytest.raises(DriftError, match="no such file"):
            read_questions(text)
    with pytest.raises(DriftError, match="not a file"):
        read_questions(tmp_path)


class TestTheHub:
    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        settle(monkeypatch, tmp_path)
        folder = tmp_path / "dataset"
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "test.jsonl").write_text('{"question": "How many?"}')
        with StubHub(folder, "datasets/owner/sums", revisions=("main", "v2")).serve() as hub:
            set_endpoint(monkeypatch, hub.endpoint)
            yield hub

    @pytest.mark.parametrize(
        "text",
        [
            "hf://datasets/owner/sums/data/test.jsonl",
            "hf://datasets/owner/sums@v2/data/test.jsonl",
            "owner/sums:data/test.jsonl",
            "owner/sums@v2:data/test.jsonl",
        ],
    )
    def test_a_file_of_a_data_set(self, hub, text):
        assert read_questions(text) == [Question("1", "sums", "gsm8k", ("How many?",))]
        assert all(("v2" if "v2" in text else "main") in path for path in hub.asked)

    def test_it_stays_in_the_cache(self, hub, monkeypatch):
        found = read_questions("owner/sums:data/test.jsonl")
        set_endpoint(monkeypatch, "http://127.0.0.1:9")
        assert read_questions("owner/sums:data/test.jsonl") == found

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("owner/sums:none.jsonl", "owner/sums:none.jsonl: the Hub has no such file"),
            ("owner/none:test.jsonl", "no such repository"),
            ("owner/sums@v9:data/test.jsonl", "the Hub has no revision 'v9'"),
            ("owner/sums:../secret.jsonl", "expected a file of a data set"),
        ],
    )
    def test_what_it_lacks(self, hub, text, message):
        with pytest.raises(DriftError) as error:
            read_questions(text)
        assert message in str(error.value)

    def test_a_file_that_is_too_large_is_not_downloaded(self, hub, monkeypatch):
        monkeypatch.setattr("mlx_drift.measure.acceptance.questions.MOST_BYTES", 10)
        with pytest.raises(DriftError, match="at most 10 are downloaded"):
            read_questions("owner/sums:data/test.jsonl")
        assert {request.method for request in hub.requests} == {"HEAD"}

    def test_no_hub(self, tmp_path, monkeypatch):
        settle(monkeypatch, tmp_path)
        with pytest.raises(DriftError, match="cannot be reached"):
            read_questions("owner/sums:data/test.jsonl")
