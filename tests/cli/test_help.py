"""`mlx-drift --help`: every command, at once."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import pytest

import mlx_drift
from mlx_drift.cli import COMMANDS


def printed(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_listed_with_what_it_says_of_itself(cli, name):
    assert f" {name} [OPTIONS]" in cli(name, "--help")[1]
    module = name.replace("-", "_")
    members = vars(import_module(f"mlx_drift.cli.{module}"))
    function = members.get(f"{module}_command") or members[module]
    assert function.__doc__.splitlines()[0] == COMMANDS[name]


def test_help_does_not_wait_for_mlx_lm():
    heavy = "from mlx_drift.cli import app; import sys\n" + (
        "try: app(['--help'])\n"
        "finally: print([m for m in ('mlx', 'mlx_lm', 'transformers') if m in sys.modules])"
    )
    shown = printed(heavy)
    assert shown.splitlines()[-1] == "[]"
    assert all(name in shown for name in COMMANDS)


def test_versions_are_told(cli):
    code, said, _ = cli("--version")
    assert code == 0
    for name in ("mlx-drift", "mlx", "mlx-lm"):
        assert f"{name} {version(name)}" in said


def test_ctrl_c_while_it_is_still_imported_ends_without_a_traceback():
    code = (
        "import sys\n"
        "class Stopped:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'mlx_drift.cli.streams': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stopped())\n"
        "from mlx_drift.__main__ import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"")


def test_public_names_are_imported_when_they_are_asked_for():
    shown = printed(
        "import sys, mlx_drift\n"
        "print('mlx_lm' in sys.modules)\n"
        "from mlx_drift import *\n"
        "import mlx_drift.generate, mlx_drift.doctor.examine\n"
        "print(all(name in dir(mlx_drift) for name in mlx_drift.__all__), generate.__module__)\n"
        "print(mlx_drift.generate is generate, mlx_drift.doctor is doctor)\n"
    )
    assert shown.splitlines() == ["False", "True mlx_drift.generate", "True True"]


def test_a_name_that_is_not_public_is_told():

    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        mlx_drift.lode  # noqa: B018


def test_options_of_generating_say_what_stream_generate_says():
    from mlx_drift.cli.options import described

    assert described("temp") == "Temperature; 0 for greedy decoding."
    assert described("min_tokens_to_keep") == "Tokens that --min-p cannot remove."
    assert described("kv_bits") == "As in mlx-lm: bits to quantize keys and values to."


def test_every_option_has_help():
    from mlx_drift.cli import options

    for name, option in vars(options).items():
        for told in getattr(option, "__metadata__", ()):
            assert told.help, name
