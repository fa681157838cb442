"""Who said each token: marks and colours agree with the statistics, and the text stays itself."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from backend import ON_GPU
from demo_text import expected_text
from mlx_drift import CopyingDrafter, PromptLookupDrafter, load_demo, stream_generate
from mlx_drift.cli.drafts import COLOURS, COPIED, DraftsShown, Said, marked
from mlx_drift.decode.text import Origin

ROOT = Path(__file__).parents[2]
HELD_OUT = (ROOT / "examples" / "train_demo_pair" / "heldout.jsonl").read_text().splitlines()
ANSWERS, TOKENS = 50, 12
MARK = re.compile("␣?(ᶜ?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
SGR = re.compile(r"\x1b\[[0-9;]*m")
PLACE = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


@pytest.fixture(scope="module")
def answers():
    """Fifty answers, greedy and sampled, by heads, copies and both, K fixed and auto."""
    eagle3 = load_demo("eagle3")
    model, tokenizer, normalized = load_demo()
    ways = [
        (normalized, {"num_draft_tokens": 3}),
        (CopyingDrafter(normalized), {"num_draft_tokens": 6}),
        (normalized, {"num_draft_tokens": 5, "temp": 1.0, "seed": 7}),
        (CopyingDrafter(normalized), {"num_draft_tokens": "auto"}),
        (PromptLookupDrafter(model), {"num_draft_tokens": 4}),
        (eagle3[2], {"num_draft_tokens": 6}),
    ]
    found = []
    for number, line in enumerate(HELD_OUT[:ANSWERS]):
        drafter, keywords = ways[number % len(ways)]
        prompt = tokenizer.apply_chat_template(
            json.loads(line)["messages"], add_generation_prompt=True
        )
        responses = stream_generate(
            drafter.model, tokenizer, prompt, TOKENS, drafter=drafter, **keywords
        )
        found.append([*responses])
    assert len(found) == ANSWERS
    return found


def shown(responses, coloured):
    stream = io.StringIO()
    writer = DraftsShown(stream)
    writer.colours = coloured
    said = [Said(r.text, r.token, r.origin) for r in responses]
    for one in said:
        writer.write(one)
    return stream.getvalue(), said


def test_marks_and_colours_agree_with_the_statistics(answers):
    """Of every answer: drafts accepted by position, those copied, and the target's own."""
    met = Counter()
    for responses in answers:
        statistics = responses[-1].statistics
        text, said = shown(responses, coloured=False)
        assert MARK.sub("", text) == "".join(r.text for r in responses)
        colourful, _ = shown(responses, coloured=True)
        assert SGR.sub("", colourful) == text

        marks = MARK.findall(text)
        by_position = Counter(int(mark.removeprefix("ᶜ").translate(PLACE)) for mark in marks)
        assert [by_position[i + 1] for i in range(len(statistics.accepted))] == statistics.accepted
        assert by_position.total() == sum(statistics.accepted)
        assert sum(mark[0] == "ᶜ" for mark in marks) == sum(
            statistics.free_accepted.get("copy", ())
        )
        own = len(responses) - by_position.total()
        # A round that ends within its drafts has no token of the target's own: the last may.
        assert own - statistics.plain_tokens in (statistics.rounds, statistics.rounds - 1)
        assert [r.from_draft for r in responses] == [o.origin.position > 0 for o in said]
        met.update(str(one.origin) for one in said)
    assert {"target", "draft 1", "draft 3", "copy 1", "copy 2"} <= met.keys()


def test_a_colour_repeats_what_a_mark_says(answers):
    codes = dict(zip((*COLOURS, COPIED), ("32", "36", "34", "35", "33"), strict=True))
    for said in {Said("x ", 0, r.origin) for responses in answers for r in responses}:
        stream = io.StringIO()
        writer = DraftsShown(stream)
        writer.colours = True
        writer.write(said)
        by, position = said.origin.by, said.origin.position
        if by == "target":
            assert stream.getvalue() == "x "
            continue
        code = codes[COPIED if by == "copy" else COLOURS[min(position, 4) - 1]]
        assert stream.getvalue().startswith(f"\x1b[{code}mx\x1b[0m\x1b[2;{code}m")
        assert stream.getvalue().endswith(" ")


@pytest.mark.parametrize(
    ("text", "origin", "expected"),
    [
        (" the", Origin(), " the"),
        (" the", Origin("draft", 2), " the²"),
        ("):\n    ", Origin("draft", 1), "):¹\n    "),
        ("\n", Origin("copy", 12), "␣ᶜ¹²\n"),
        ("", Origin("draft", 3), "␣³"),
    ],
)
def test_a_mark_stands_behind_the_last_letter(text, origin, expected):
    assert "".join(marked(text, origin)) == expected


def test_generate_shows_drafts(cli, tmp_path, monkeypatch):
    code, out, err = cli("generate", "-m", 24, "--show-drafts")
    assert code == 0
    assert MARK.sub("", out) == expected_text(24) + "\n"
    assert MARK.search(out)
    assert "said by  target   draft 1 ¹" in err
    assert "\x1b" not in out
    code, out, _ = cli("generate", "-m", 24, "--show-drafts", "--json")
    told = json.loads(out)
    assert "".join(token["text"] for token in told["tokens"]) == told["text"] == expected_text(24)
    assert {token["by"] for token in told["tokens"]} == {"target", "draft"}
    assert "tokens" not in json.loads(cli("generate", "-m", 2, "--json")[1])
    code, out, _ = cli("generate", "-m", 8, "--show-drafts", "--no-draft")
    assert (code, out) == (0, expected_text(8) + "\n")


def test_a_stream_without_raised_letters_gets_brackets(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    DraftsShown(stream).write(Said(" the\n", 5, Origin("copy", 2)))
    assert stream.buffer.getvalue() == b" the[c2]\n"


def written_in(picture):
    nodes = (node for node in ElementTree.parse(picture).iter() if node.tag[-4:] == "text")
    return "".join("".join(node.itertext()) for node in nodes).replace("\xa0", " ")


@pytest.mark.skipif(ON_GPU, reason="near-ties may fall otherwise")
def test_the_picture_of_the_readme_is_what_its_command_draws(cli, tmp_path):
    assert "mlx-drift generate -m 60 --svg FILE" in (ROOT / "README.md").read_text()
    assert cli("generate", "-m", 60, "--svg", tmp_path / "drafts.svg")[0] == 0
    assert written_in(tmp_path / "drafts.svg") == written_in(ROOT / ".github" / "drafts.svg")


def test_the_picture(cli, refuses, tmp_path):
    path = tmp_path / "drafts.svg"
    code, out, _ = cli("generate", "-m", 24, "--svg", path)
    assert (code, out) == (0, expected_text(24) + "\n")
    text = written_in(path)
    assert "quote¹" in text
    assert "drafts accepted a round" in text
    for address in re.findall(r"https?://[^\"' )]+", path.read_text()):
        assert address.startswith(("http://www.w3.org", "https://www.textualize.io"))  # names only
    for place in (tmp_path, tmp_path / "none" / "a.svg"):
        refuses(f"{place}: a picture cannot be written there", "generate", "--svg", place)
