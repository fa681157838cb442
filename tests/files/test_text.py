"""Text that comes in: UTF-8 however it is marked and its lines end, or one line that says why."""

import io
import re
import sys

import pytest

from mlx_drift.errors import DriftError
from mlx_drift.files.text import check_text, read_stdin, read_text

TEXT = "Ein Wort: é ☃ 🙂\nund noch eins\0\n"

GOOD = {
    "UTF-8": TEXT.encode(),
    "with a byte order mark": TEXT.encode("utf-8-sig"),
    "lines of Windows": TEXT.replace("\n", "\r\n").encode(),
    "lines of old Macs": TEXT.replace("\n", "\r").encode(),
}

BAD = {
    r"not UTF-8 text \(byte 0xe9 at 3\); save it as UTF-8": "café".encode("latin-1"),
    r"not UTF-8 text \(byte 0xed at 1\)": "a\ud800".encode("utf-8", "surrogatepass"),
    r"not UTF-8 text \(byte 0xc3 at 0\)": b"\xc3",
    r"not UTF-8 text \(UTF-16\); save it as UTF-8": TEXT.encode("utf-16"),
    r"not UTF-8 text \(UTF-32\); save it as UTF-8": TEXT.encode("utf-32"),
}


@pytest.fixture(params=["a file", "stdin"])
def read(request, tmp_path, monkeypatch):
    """Reads bytes as a text; messages begin with where it is."""

    def from_file(data):
        (tmp_path / "text").write_bytes(data)
        return read_text(tmp_path / "text")

    def from_stdin(data):
        stdin = io.TextIOWrapper(io.BytesIO(data), encoding="ascii")  # what a locale may say
        monkeypatch.setattr(sys, "stdin", stdin)
        return read_stdin()

    return from_file if request.param == "a file" else from_stdin


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
def test_text_is_utf_8(read, data):
    assert read(data) == TEXT


@pytest.mark.parametrize("message", BAD)
def test_what_is_not_utf_8_says_so(read, message):
    with pytest.raises(DriftError, match=rf"^(/.*/text|stdin): {message}"):
        read(BAD[message])


def test_a_file_of_no_end(tmp_path):
    (tmp_path / "text").write_bytes(b"x" * ((1 << 20) + 1))
    assert len(read_text(tmp_path / "text")) == (1 << 20) + 1
    with pytest.raises(DriftError, match=r"text: larger than 1 MiB; give a part of it"):
        read_text(tmp_path / "text", 1 << 20)


def test_what_cannot_be_read(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "none", tmp_path / "a\0b", tmp_path / ("long" * 99)):
        with pytest.raises(DriftError, match="cannot be read"):
            read_text(path)
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where a process has none
    with pytest.raises(DriftError, match="stdin is closed"):
        read_stdin()


@pytest.mark.parametrize(
    ("text", "half"),
    [
        ("half an emoji \ud83d", r"'\ud83d' at 14, which is half a character"),
        ("\ude42", r"'\ude42' at 0, which is half a character"),
        ("caf\udce9", "the byte 0xe9 at 3, which could not be decoded"),
    ],
)
def test_half_a_surrogate_pair_is_no_text(text, half):
    with pytest.raises(DriftError, match=f"^the prompt has {re.escape(half)}; expected UTF-8"):
        check_text(text, "the prompt")


def test_what_is_text():
    for text in ("", TEXT, "\U0010ffff￿‮", "퟿"):
        assert check_text(text, "it") is text
