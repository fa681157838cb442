"""A picture of an adaptation. It needs the `plot` extra, as those of acceptance do."""

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_drift.measure.acceptance.plot import draw_positions, new_figure, write_figure

if TYPE_CHECKING:
    from mlx_drift.train.adapt import Adapted


def plot_adapted(done: "Adapted", path: Path) -> None:
    """Draws acceptance step by step, and by position before and after.

    Args:
        done: What came of the adaptation.
        path: Where the picture goes.

    Raises:
        DriftError: If matplotlib is missing or the file cannot be written.
    """
    figure = new_figure()
    learned, positions = figure.subplots(1, 2)
    history = done.progress.history
    steps, lengths = ([one[key] for one in history] for key in ("step", "acceptance_length"))
    learned.plot(steps, lengths, "o-", color="C0", markersize=5, linewidth=1.4)
    learned.axvline(done.progress.best_step, color="C0", alpha=0.4, linewidth=1, linestyle=":")
    learned.set_ylim(bottom=0)
    learned.set_xlabel("step (dotted: the one that is kept)")
    learned.set_ylabel("acceptance_length (drafts a round)")
    draw_positions(positions, done.measured[0])
    write_figure(figure, learned, "Acceptance on what was held out", done.measured[0], path)
