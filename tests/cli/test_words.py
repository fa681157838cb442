"""Words of any kind through the command line: one clear line or an answer, never a traceback."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
from rich.console import Console

from checkpoints import specforge_tensors, write_checkpoint
from mlx_drift import load_demo
from mlx_drift.cli import main, show
from mlx_drift.demo import TARGET
from mlx_drift.errors import printable

# --- what comes in ----------------------------------------------------------------------------

NO_TEXT = os.fsdecode(b"caf\xe9")  # as Python decodes an argument that is not UTF-8
HALF = '{"key": "\\ud83d"}'
TEMPLATE = "{{ messages[0].content }}{{ key }}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", NO_TEXT),
        ("generate", "--prompt", NO_TEXT),
        ("generate", "Hello", "--system-prompt", NO_TEXT),
        ("generate", "Hello", "--prefill-response", NO_TEXT),
        ("generate", "Hello", "--extra-eos-token", NO_TEXT),
        ("generate", "Hello", "--no-draft", "--system-prompt", NO_TEXT),
        ("generate", "Hello", "--model", NO_TEXT, "--no-draft"),
        ("generate", "Hello", "--model", f"organisation/{NO_TEXT}", "--drafter", NO_TEXT),
        ("generate", "Hello", "--drafter", NO_TEXT),
        ("generate", "Hello", "--adapter-path", NO_TEXT),
        ("generate", "Hello", "--chat-template-config", NO_TEXT),
        ("generate", "Hello", "--chat-template-config", '{"a":' * 10_000),
        ("generate", "Hello", "--chat-template-config", "9" * 5000),
        ("generate", "Hello", "--num-draft-tokens", "9" * 5000),
        ("generate", "Hello", "--tree", "9" * 5000),
        ("generate", "Hello", "--drafter-sinks", "9" * 5000),
        ("generate", "Hello", "--extra-eos-token", "9" * 5000),
        ("generate", "--prompt-file", NO_TEXT),
        ("cache-prompt", NO_TEXT, "--prompt-cache-file", "OUT"),
        ("bench", "--prompt", NO_TEXT),
        ("drift", "--prompt", NO_TEXT),
        ("measure", "--questions", NO_TEXT),
        ("measure", "--questions", "TEXT", "--system-prompt", NO_TEXT),
        ("measure", "--questions", "TEXT", "--perturb", "--system-prompt", NO_TEXT),
        ("measure", "--questions", "TEXT", "--chat-template", "LATIN"),
        (
            *("measure", "--questions", "TEXT"),
            *("--chat-template", "TEMPLATE", "--chat-template-config", HALF),
        ),
        ("measure", "--questions", "TEXT", "--context", "1k", "--document", "LATIN"),
        ("measure", "--questions", "LATIN"),
        ("convert", "DRAFTER", "--mlx-path", "OUT", "--target", NO_TEXT),
        (
            *("convert", "DRAFTER", "--mlx-path", "OUT", "--target", TARGET),
            *("--probe-conventions", "--probe-on", "LATIN"),
        ),
        ("convert", NO_TEXT, "--mlx-path", "OUT"),
        ("inspect", NO_TEXT),
        ("doctor", NO_TEXT),
    ],
    ids=lambda arguments: " ".join(map(str, arguments))[:60].encode("ascii", "replace").decode(),
)
def test_what_is_no_text_is_one_line(arguments, refuses, tmp_path):
    files = {"TEXT": b"Why?\n", "LATIN": b"caf\xe9\n", "TEMPLATE": TEMPLATE.encode()}
    places = {"OUT": tmp_path / "out", "DRAFTER": TARGET.parent / "eagle3.1"}
    for name, data in files.items():
        places[name] = tmp_path / f"{name.lower()}.txt"
        places[name].write_bytes(data)
    refuses("", *(places.get(str(argument), argument) for argument in arguments))


def test_a_prompt_is_taken_as_it_is(cli, tmp_path):
    """mlx-lm makes a line break of `\\n` in --prompt; here a file and an argument are one text."""
    prompt = r"Print C:\new\n"
    (tmp_path / "prompt").write_text(prompt)
    report = json.loads(cli("generate", "-m", 4, "--json", "--prompt", prompt)[1])
    from_file = cli("generate", "-m", 4, "--json", "--prompt-file", tmp_path / "prompt")[1]
    broken = cli("generate", "-m", 4, "--json", "--prompt", prompt.replace(r"\n", "\n"))[1]
    assert json.loads(from_file)["prompt_tokens"] == report["prompt_tokens"]
    assert json.loads(broken)["prompt_tokens"] != report["prompt_tokens"]


@pytest.mark.parametrize("name", [NO_TEXT, "a\nb", "é ☃", "\x1b[31m", "[red]", "`$(x)`"])
def test_folders_of_odd_names(name, cli, tmp_path):
    source = write_checkpoint(tmp_path / f"{name} source", specforge_tensors())
    out = tmp_path / f"{name} out"
    assert cli("inspect", source)[0] == 0
    code, _, err = cli("convert", source, "--mlx-path", out)
    assert code == 0, err
    shown = printable(f"{name} source")
    assert json.loads((out / "config.json").read_text())["source"]["path"] == shown
    assert f"`{shown}`" in (out / "README.md").read_text(encoding="utf-8")


def test_a_path_that_mlx_cannot_take_is_named(refuses, tmp_path):
    target = tmp_path / NO_TEXT
    shutil.copytree(TARGET, target)
    for command in (["generate", "--no-draft", "Hello", "--model"], ["doctor"]):
        refuses("the path has the byte 0xe9", *command, target)


def random_bytes(seed):
    """Makes bytes of an argument, most of them no text: random, or text with a byte changed."""
    rng = random.Random(seed)
    data = bytearray("Words: naïve ☃ 🙂 <|user|> {{ x }} [red]\n\t\x1b[0m ‮".encode())
    if rng.random() < 0.5:
        return bytes(rng.randrange(1, 256) for _ in range(rng.randrange(1, 64)))
    for _ in range(rng.randrange(4)):
        data[rng.randrange(len(data))] = rng.randrange(1, 256)
    return bytes(data[rng.randrange(8) : rng.randrange(8, len(data) + 1)])


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.long)])
def test_random_bytes_as_prompts(count, cli, tmp_path, monkeypatch):
    """As an argument, in a file and on stdin: what is text is answered, what is not is refused."""
    pair = load_demo()
    command = import_module("mlx_drift.cli.generate")  # the name is the command's, too
    monkeypatch.setattr(command, "load_pair", lambda *args: pair)
    path = tmp_path / "prompt"
    refused = 0
    for seed in range(count):
        data = random_bytes(seed)
        path.write_bytes(data)
        stdin = io.TextIOWrapper(io.BytesIO(data), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stdin)
        ways = (os.fsdecode(data).removeprefix("-") or "x",), ("-",), ("--prompt-file", path)
        code, out, err = cli("generate", "-m", 1, *ways[seed % 3])
        assert code in (0, 1), (data, err)
        assert "Traceback" not in err
        if code == 1:
            refused += 1
            assert (out, len(err.splitlines())) == ("", 1), (data, err)
        else:
            data.removeprefix(b"-").decode()  # nothing was replaced without a word
    assert count / 4 < refused < count * 3 / 4


# --- what goes out ----------------------------------------------------------------------------


def narrow_stdout(encoding, monkeypatch):
    """Makes stdout a stream that raises at what it cannot encode; returns its bytes."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    return out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_answer_that_stdout_cannot_show_comes_through(encoding, monkeypatch):
    narrow = narrow_stdout(encoding, monkeypatch)
    generate = import_module("mlx_drift.cli.generate")  # the name is the command's, too
    real = generate.stream_generate

    def with_snow(*args, **keywords):
        return (replace(response, text="☃!") for response in real(*args, **keywords))

    monkeypatch.setattr(generate, "stream_generate", with_snow)
    with pytest.raises(SystemExit) as end:
        main(["generate", "-m", "3"])
    assert end.value.code == 0
    assert narrow.getvalue() == b"?!?!?!\n"
    with pytest.raises(SystemExit):
        main(["generate", "-m", "3", "--json"])
    assert json.loads(narrow.getvalue().splitlines()[1])["text"] == "☃!☃!☃!"


def test_a_table_that_stdout_cannot_show_comes_through(monkeypatch):
    narrow = narrow_stdout("ascii", monkeypatch)
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 0
    assert b"caches   8 ? keys and values" in narrow.getvalue()


@pytest.mark.parametrize("columns", ["0", "1", "20", "-5", "many", "1000000000"])
def test_no_width_hides_the_result(columns, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    for arguments in (["doctor"], ["generate", "--help"]):
        code, out, _ = cli(*arguments)
        assert code == 0
        assert "".join(out.split())[:200].isprintable()
        assert {"doctor": "target", "generate": "Usage:"}[arguments[0]] in out
        assert len(out) < 1_000_000


def run(command, **environment):
    """Runs a shell command in which `drift` is the command line: (exit code, stdout, stderr)."""
    itself = f"{sys.executable} -c 'from mlx_drift.cli import main; main()'"
    done = subprocess.run(
        ["bash", "-c", f'drift() {{ {itself} "$@"; }}; {command}'],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("drift generate -m 4 >/dev/full", 1, b"error: cannot go on: No space left on device\n"),
        ("drift pairs | true; exit ${PIPESTATUS[0]}", 1, b""),
        ("drift pairs >&-", 0, b""),
        ("drift generate $'caf\\xe9'", 1, b"error: the prompt has the byte 0xe9 at 3"),
    ],
)
def test_streams_of_real_processes(command, code, message):
    found, out, err = run(command)
    assert found == code, err
    assert out == b""
    assert err.startswith(message)
    assert len(err.splitlines()) == bool(message)


def test_without_a_terminal_a_long_measurement_tells_how_far_it_is(monkeypatch):
    """A line now and then, not for every one that is done; nothing where it is soon done."""
    monkeypatch.setattr(show, "time", SimpleNamespace(monotonic=iter(range(0, 900, 25)).__next__))
    told = io.StringIO()
    with show.count_bar(Console(file=told), "measuring [0]") as progress:
        for done in range(1, 7):
            progress(done, 6)
    assert told.getvalue() == "measuring [0]: 3 of 6\nmeasuring [0]: 6 of 6\n"


def test_a_locale_of_ascii_alone():
    """Without Python's UTF-8 mode, as `LANG=C` was; the table holds a `×`."""
    code, out, _ = run("drift doctor", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert code == 0
    assert b"caches   8 ? keys and values" in out
