"""What most test modules use: the command line in this process."""

import sys
from pathlib import Path

import pytest

from mlx_drift.cli import main

sys.path.insert(0, str(Path(__file__).parent / "reference"))


@pytest.fixture
def cli(capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return run


@pytest.fixture
def refuses(cli):
    """Asserts exit code 1 and one line on stderr that says what is wrong; returns the line."""

    def check(message, *arguments):
        code, out, err = cli(*arguments)
        assert code == 1, err
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
        assert message in err
        return err

    return check
