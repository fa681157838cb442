"""Convert every finished drafter of the study into a folder that `load_drafter` reads."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from attention_drift.arms import MTP_ARMS, Run, runs
from mlx_drift import convert_drafter
from mlx_drift.demo import TARGET


def finished(study: Path) -> Iterator[Run]:
    """The drafters that are trained, in the order of training."""
    return (run for run in runs() if (study / run.name / "train.json").exists())


def convert_finished(study: Path, target: Path = TARGET) -> Iterator[Path]:
    """Yields the folder of each finished drafter, converted unless it was already.

    Only those that are missing are written, so that it may run again while training goes on.
    """
    for run in finished(study):
        folder = study / "mlx" / run.name
        if not folder.exists():
            mtp = run.arm in MTP_ARMS
            convert_drafter(str(study / run.name), folder, target=str(target), strict=True, mtp=mtp)
        yield folder


def main() -> None:
    """Prints the folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("study"), help="where drafters are")
    for folder in convert_finished(parser.parse_args().study):
        print(folder)


if __name__ == "__main__":
    main()
