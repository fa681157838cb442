"""What most test modules use: the command line in this process."""

import pytest

from mlx_drift.cli import main


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
