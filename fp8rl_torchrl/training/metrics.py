"""What a run writes down: metrics.csv, TensorBoard or W&B, and the picture of the learning curve."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp8rl_torchrl.training.loop import Report

LEADING = ("frames", "seconds", "episodes", "updates", "episode_return", "episode_length", "eval_return")


def report_row(report: Report, eval_return: float) -> dict[str, float]:
    """One report as numbers by column name; ``eval_return`` is NaN where no evaluation took place."""
    row = {name: getattr(report, name) for name in LEADING if name != "eval_return"}
    metrics = {name: value for name, value in report.metrics.items() if not name.startswith("skipped")}
    return {**row, "eval_return": eval_return, **metrics, "skipped_steps": report.skipped_steps}


class MetricsFile:
    """A CSV file with a row a report; empty cells where a number is missing.

    Columns appear with the first report that has them, at which point the file is rewritten. Every write goes
    straight to the file, and a resumed run cuts the file back to its checkpoint.

    Args:
        path: The file; an existing one is continued.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows = read_metrics(self.path) if self.path.exists() else []
        self.columns: list[str] = []
        if self.rows:
            self._rewrite()  # so that the next row does not go on in a line that a kill cut short

    def append(self, row: Mapping[str, float]) -> None:
        """Add one row."""
        self.rows.append(dict(row))
        if set(row) <= set(self.columns):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(_cells(row))
        else:
            self._rewrite()

    def cut_back(self, frames: int) -> None:
        """Remove the rows that were written after ``frames`` environment steps."""
        self.rows = [row for row in self.rows if row["frames"] <= frames]
        self._rewrite()

    def _rewrite(self) -> None:
        others = {name for row in self.rows for name in row} - set(LEADING)
        self.columns = [*LEADING, *sorted(others)] if self.rows else []
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if self.rows:
            writer.writeheader()
        writer.writerows(_cells(row) for row in self.rows)
        write_atomically(self.path, text.getvalue())


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read a metrics file; empty cells become NaN. A line that a kill cut short is left out."""
    with Path(path).open(newline="") as file:
        header, *rows = csv.reader([line for line in file if line.endswith("\n")] or [""])
    return [{name: float(cell) if cell else math.nan for name, cell in zip(header, row, strict=True)} for row in rows]


def _cells(row: Mapping[str, float]) -> dict[str, object]:
    cells: dict[str, object] = {}
    for name, value in row.items():
        number = float(value)
        cells[name] = "" if math.isnan(number) else int(number) if number.is_integer() else repr(number)
    return cells


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file, or leave the old one as it was."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text)
    os.replace(aside, path)


class Loggers:
    """TorchRL's TensorBoard logger and, if asked for, its W&B logger, fed the same rows.

    Args:
        run_dir: The run folder; events go to its ``tensorboard`` subfolder.
        wandb_project: The W&B project; None does not use W&B.
        config: Saved with the W&B run.

    Raises:
        ValueError: If W&B is asked for and not installed.
    """

    def __init__(
        self, run_dir: Path, wandb_project: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        from torchrl.record.loggers.tensorboard import TensorboardLogger

        if wandb_project is not None:
            require_wandb()
        self.loggers: list[Any] = [TensorboardLogger("tensorboard", log_dir=str(run_dir))]
        if wandb_project is not None:
            from torchrl.record.loggers.wandb import WandbLogger

            logger = WandbLogger(run_dir.name, project=wandb_project, save_dir=str(run_dir))
            logger.log_hparams(dict(config or {}))
            self.loggers.append(logger)

    def log(self, row: Mapping[str, float]) -> None:
        """Log one row at its number of frames."""
        for logger in self.loggers:
            for name, value in _finite(row):
                logger.log_scalar(name, value, step=int(row["frames"]))

    def close(self) -> None:
        """Write out what is buffered."""
        self.loggers[0].experiment.close()
        for logger in self.loggers[1:]:
            logger.experiment.finish()


def require_wandb() -> None:
    """Make sure that W&B can be used, before anything is written.

    Raises:
        ValueError: If it is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("W&B is not installed; run: pip install wandb")


def _finite(row: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in row.items() if name != "frames" and math.isfinite(value))


def plot_learning_curve(rows: list[dict[str, float]], title: str, path: str | Path) -> None:
    """Draw the training return and the evaluation return over frames.

    Args:
        rows: The rows of a metrics file.
        title: What ran.
        path: The picture to write; its ending chooses the format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    frames = [row["frames"] for row in rows]
    returns = [row["episode_return"] for row in rows]
    if any(map(math.isfinite, returns)):
        axes.plot(frames, returns, label="training, mean of the last 100 episodes")
    else:
        axes.set_xlim(0, 1.05 * max(frames, default=1))
        axes.text(0.5, 0.9, "no training episode has ended", ha="center", transform=axes.transAxes)
    evaluated = [(row["frames"], row["eval_return"]) for row in rows if math.isfinite(row["eval_return"])]
    if evaluated:
        axes.plot(
            *zip(*evaluated, strict=True), "o--", color="C1", markersize=4, label="evaluation, deterministic policy"
        )
    axes.set(xlabel="environment steps (frames)", ylabel="return per episode", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    with rc_context({"svg.hashsalt": "fp8rl_torchrl"}):  # the same rows give the same file
        figure.savefig(path)
