"""`chat`: turns in the caches, commands, Ctrl-C, lines through a pipe, and what is typed."""

import gc
import io
import json
import os
import signal
import sys
import weakref
from types import SimpleNamespace

import mlx_lm
import pytest
from rich.console import Console

from mlx_drift import DriftError, DriftWarning, load_demo
from mlx_drift.cli import chat as chat_module
from mlx_drift.cli import conversation as conversation_module
from mlx_drift.cli.chat import View
from mlx_drift.cli.chat_commands import Commands
from mlx_drift.cli.conversation import REASONING, TEXT, Conversation, Settings, Speaker
from mlx_drift.demo import QUESTION
from scripted import scripted_checkpoint

SECOND = "What does `shutil.copytree` do?"
SCRIPTS = {
    "[[think]]": "<think>\nFirst, second.\n</think>\n\nSo it is five.",
    "[[sunny]]": "It is sunny there.",
    "<think>": "Is five odd or even?</think>\n\nFive is odd.",
}


@pytest.fixture(scope="module")
def speaker():
    return Speaker("demo", *load_demo())


@pytest.fixture
def talk(speaker):
    return Conversation(speaker, Settings(max_tokens=12, num_draft_tokens=3))


@pytest.fixture(autouse=True)
def _no_warnings(recwarn):
    yield
    assert not [one for one in recwarn if issubclass(one.category, DriftWarning)]


def said(talk, text, **keywords):
    return "".join(one.text for _, one in talk.ask(text, **keywords))


def expected(speaker, messages, count=12):
    prompt = speaker.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return mlx_lm.generate(speaker.model, speaker.tokenizer, prompt, max_tokens=count)


def typed(monkeypatch, *lines):
    data = "".join(f"{line}\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# --- a conversation ---------------------------------------------------------------------------


def test_turns_say_what_mlx_lm_says_and_stay_in_the_caches(talk, speaker):
    for turn in (QUESTION, SECOND, QUESTION):
        asked = [*talk.messages, {"role": "user", "content": turn}]
        before = len(talk.messages)
        assert said(talk, turn) == expected(speaker, asked)
        assert talk.messages[: before + 1] == asked
        if before:
            assert talk.last.statistics.reuse == "extended"
            assert talk.last.statistics.reused_tokens > 12
    assert talk.statistics.rounds > talk.last.statistics.rounds
    assert talk.last.statistics.plain_step_seconds == talk.statistics.plain_step_seconds


def test_a_stopped_answer_stays_and_the_conversation_goes_on(talk, speaker):
    whole = expected(speaker, [{"role": "user", "content": QUESTION}])
    count = 0

    def is_stopped():
        nonlocal count
        count += 1
        return count > 6

    part = said(talk, QUESTION, is_stopped=is_stopped)
    assert part
    assert whole.startswith(part)
    assert part != whole
    assert talk.messages[-1] == {"role": "assistant", "content": part}
    asked = [*talk.messages, {"role": "user", "content": SECOND}]
    assert said(talk, SECOND) == expected(speaker, asked)
    assert talk.last.statistics.reused_tokens > 12
    assert said(talk, "Too late.", is_stopped=lambda: True) == ""  # before the prompt was read
    assert len(talk.messages) == 4
    assert talk.last is None


def test_a_full_context_is_told_with_what_to_do(talk, monkeypatch):
    said(talk, QUESTION)
    messages = list(talk.messages)
    tokens = len(talk._cache.tokens)
    monkeypatch.setattr(conversation_module, "longest_text", lambda *args: (tokens, "the test"))
    with pytest.raises(DriftError, match=rf"takes {tokens} .*the test.*/undo .*/reset .*/save"):
        said(talk, SECOND)
    assert talk.messages == messages
    talk.reset()
    monkeypatch.setattr(conversation_module, "longest_text", lambda *args: (tokens - 4, "the test"))
    said(talk, QUESTION)
    assert talk.is_full
    assert talk.last.generation_tokens < 12


def test_a_model_without_a_chat_template_is_refused(speaker):
    bare = SimpleNamespace(has_chat_template=False)
    with pytest.raises(DriftError, match="bare has no chat template"):
        Speaker("bare", speaker.model, bare, speaker.drafter)


@pytest.mark.parametrize(
    ("question", "template", "reasoning", "text"),
    [
        ("Hi [[think]]", "{}", "First, second.", "So it is five."),
        (
            "Hi",
            '{"open_thinking": true, "enable_thinking": true}',
            "Is five odd or even?",
            "Five is odd.",
        ),
        ("Hi [[sunny]]", "{}", None, "It is sunny there."),
    ],
)
def test_reasoning_is_told_from_the_answer(
    cli, monkeypatch, tmp_path, question, template, reasoning, text
):
    model = scripted_checkpoint(tmp_path / "scripted", SCRIPTS)
    given = ("chat", "--model", model, "--chat-template-config", template)
    typed(monkeypatch, question)
    code, out, err = cli(*given, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told.get("reasoning"), told["text"]) == (reasoning, text)
    typed(monkeypatch, question)
    assert cli(*given)[1] == f"{text}\n"  # without a terminal the answer alone


# --- commands ---------------------------------------------------------------------------------


@pytest.fixture
def commands(talk):
    def load(name, drafter):
        assert (name, drafter) == ("other", None)
        return Speaker(name, *load_demo("eagle3"))

    return Commands(talk, load, Console(file=io.StringIO(), width=120))


def shown(commands, line):
    commands.console.file = io.StringIO()
    assert commands.run(line)
    return commands.console.file.getvalue()


def test_help_lists_every_command(commands):
    listed = [line.split()[0] for line in shown(commands, "/help").splitlines()]
    assert listed == "/help /load /model /reset /save /stats /system /undo /quit".split()
    assert not commands.run("/quit")
    with pytest.raises(DriftError, match="there is no command /__init__; /help"):
        commands.run("/__init__")
    with pytest.raises(DriftError, match="there is no command /nothing; /help"):
        commands.run("/nothing else")


def test_undo_system_and_reset(commands, talk, speaker):
    with pytest.raises(DriftError, match="nothing to take back"):
        commands.run("/undo")
    with pytest.raises(DriftError, match="no answer yet"):
        commands.run("/stats")
    first = said(talk, QUESTION)
    assert "tokens_per_round" in shown(commands, "/stats")
    said(talk, SECOND)
    assert SECOND in shown(commands, "/undo")
    assert talk.messages[-1]["content"] == first
    assert "no system prompt" in shown(commands, "/system")
    assert "Be brief." in shown(commands, "/system Be brief.")
    shown(commands, "/reset")
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
    ]
    assert said(talk, QUESTION) == expected(speaker, asked)


def test_another_model_goes_on_with_the_conversation(commands, talk, speaker):
    said(talk, QUESTION)
    assert "model: demo" in shown(commands, "/model")
    assert "model: other" in shown(commands, "/model other")
    asked = [*talk.messages, {"role": "user", "content": SECOND}]
    assert said(talk, SECOND) == expected(speaker, asked)
    with pytest.raises(DriftError, match="not 3 names"):
        commands.run("/model a b c")
    with pytest.raises(DriftError, match="No closing quotation"):
        commands.run("/model 'a")


def test_save_and_load(commands, talk, speaker, tmp_path, cli):
    path = tmp_path / "a file.jsonl"
    talk.system_prompt = "Be brief."
    said(talk, QUESTION)
    messages = list(talk.messages)
    assert "wrote" in shown(commands, f"/save {path}")
    shown(commands, "/reset")
    talk.system_prompt = None
    assert "2 messages" in shown(commands, f"/load {path}")
    assert (talk.messages, talk.system_prompt) == (messages, "Be brief.")
    asked = [{"role": "system", "content": "Be brief."}, *messages]
    assert said(talk, SECOND) == expected(speaker, [*asked, {"role": "user", "content": SECOND}])
    with pytest.raises(DriftError, match="/save needs a file"):
        commands.run("/save")
    with pytest.raises(DriftError, match="cannot be written"):
        commands.run(f"/save {tmp_path}")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "line 1: Expecting value"),
        ("[]", "it is no object"),
        ('{"messages": [{"role": "user"}]}', "lacks its role or its content"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "'tool' is neither user nor"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "a message"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}',
            "system",
        ),
        ("[" * 100_000, "line 1"),
    ],
)
def test_what_is_no_conversation_is_refused_and_nothing_lost(
    commands, talk, tmp_path, content, told
):
    said(talk, QUESTION)
    messages = list(talk.messages)
    (tmp_path / "file").write_text(content)
    with pytest.raises(DriftError, match=told):
        commands.run(f"/load {tmp_path / 'file'}")
    assert talk.messages == messages


# --- through a pipe ---------------------------------------------------------------------------


def test_every_line_of_stdin_is_a_message(cli, speaker, monkeypatch):
    typed(monkeypatch, QUESTION, "", "/reset", SECOND, "/undo", "//help")
    code, out, err = cli("chat", "-m", 8)
    texts = [
        expected(speaker, [{"role": "user", "content": text}], 8)
        for text in (QUESTION, SECOND, "/help")
    ]
    assert (code, out) == (0, "".join(f"{text}\n" for text in texts))
    assert "taken back" in err


def test_a_line_of_json_a_turn(cli, monkeypatch):
    typed(monkeypatch, QUESTION, "/nothing", SECOND, "/quit", QUESTION)
    code, out, err = cli("chat", "-m", 8, "--json", "--show-drafts", "--tree", 5)
    first, error, second = map(json.loads, out.splitlines())
    assert code == 1
    assert "there is no command /nothing" in error["error"]
    assert error["error"] in err
    assert "".join(token["text"] for token in first["tokens"]) == first["text"]
    assert second["statistics"]["reuse"] == "extended"
    assert second["finish_reason"] == "length"
    assert all(turn["statistics"]["acceptance_by_rank"] for turn in (first, second))


def test_a_line_that_is_no_text_is_named(cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    code, out, err = cli("chat", "-m", 1)
    assert (code, out) == (1, "")
    assert "stdin, line 1" in err


# --- in a terminal ----------------------------------------------------------------------------


def test_ctrl_c_ends_the_answer_and_not_the_chat(talk, monkeypatch):
    """A real signal, while tokens come."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    view = View(Console(file=err, width=120), True, True, False, False)
    write = view._marks.write
    monkeypatch.setattr(
        view._marks, "write", lambda one: (write(one), os.kill(os.getpid(), signal.SIGINT))
    )
    before = signal.getsignal(signal.SIGINT)
    view.answer(talk, QUESTION)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped" in err.getvalue()
    assert "said by" in err.getvalue()
    assert len(talk.said) == 1
    monkeypatch.setattr(view._marks, "write", write)
    view.answer(talk, SECOND)
    assert "tokens cached; cut off at --max-tokens" in err.getvalue()


def test_another_model_takes_the_place_of_the_first(cli, monkeypatch):
    kept, there = [], []

    def load(*asked):
        pair = load_demo()
        kept.append(weakref.ref(pair[0]))
        return pair

    def count(self, argument):
        """Counts the models in memory."""
        gc.collect()
        there.append([model() is not None for model in kept])

    monkeypatch.setattr(chat_module, "load_pair", load)
    monkeypatch.setattr(Commands, "do_count", count, raising=False)
    typed(monkeypatch, QUESTION, "/model other prompt-lookup", "/count", SECOND)
    code, _, err = cli("chat", "-m", 2)
    assert code == 0, err
    assert there == [[False, True]]


def test_a_terminal_is_plain_again_when_reasoning_breaks_off(monkeypatch):
    def ask(text, is_stopped, progress):
        yield REASONING, conversation_module.Said("hm ", 0, conversation_module.Said)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    view = View(Console(file=io.StringIO()), True, False, False, False)
    view._dim, view._plain = chat_module.DIM, chat_module.PLAIN
    with pytest.raises(KeyboardInterrupt):
        view.answer(SimpleNamespace(ask=ask), "?")
    assert view.stdout.getvalue() == f"{chat_module.DIM}[reasoning] hm {chat_module.PLAIN}"


def test_reasoning_is_dimmed_or_hidden(monkeypatch):
    def ask(text, is_stopped, progress):
        for kind, part in ((REASONING, "hm "), (REASONING, "so"), (TEXT, "Yes.")):
            yield kind, conversation_module.Said(part, 0, conversation_module.Said)

    talk = SimpleNamespace(ask=ask, is_full=False, last=None)
    for hidden, text in ((False, "[reasoning] hm so\n[answer] Yes.\n"), (True, "Yes.\n")):
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        view = View(Console(file=io.StringIO()), True, False, hidden, False)
        view.answer(talk, "?")
        assert view.stdout.getvalue() == text


def test_what_is_typed(monkeypatch, tmp_path):
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from mlx_drift.cli.line_editor import LineEditor

    monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path / "cache"))
    pasted = "\n".join(f"line {i}" for i in range(200))
    with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
        editor = LineEditor()
        for sent, read in (
            ("one\r", "one"),
            ("one\\\rtwo\x1b\rthree\r", "one\ntwo\nthree"),
            (f"\x1b[200~{pasted}\x1b[201~\r", pasted),
            ("gone\x03kept\r", "kept"),
            ("\x1b[A\r", "kept"),
            ("\x04", None),
        ):
            keys.send_text(sent)
            assert editor.read() == read
    history = tmp_path / "cache" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "line 199" in history.read_text()
