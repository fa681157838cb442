"""What most test modules use: a home that is nobody's, and the command line in this process."""

import pytest
from huggingface_hub import constants

import real  # remembers where its file is kept, before the caches move
from mlx_drift.cli import main

SETTINGS = "HF_TOKEN MLX_DRIFT_API_KEY MLX_HOSTFILE MLX_RANK XDG_CACHE_HOME".split()


@pytest.fixture(autouse=True, scope="session")
def home(tmp_path_factory):
    """Caches of the tests' own: they neither see nor change what a person keeps on the machine."""
    caches = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_DRIFT_CACHE", str(caches / "mlx-drift"))
        patch.setenv("HF_HUB_CACHE", str(caches / "hub"))
        patch.setattr(constants, "HF_HUB_CACHE", str(caches / "hub"))
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        assert not real.KEPT.is_relative_to(caches)
        yield caches


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
