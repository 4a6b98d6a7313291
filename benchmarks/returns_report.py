"""The table and the picture of `returns`: what every row reached over its seeds, and which seeds did not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tables import interval, markdown, spread
from timing import aligned

if TYPE_CHECKING:
    from returns import Run

Records = Mapping["Run", "dict[str, Any] | None"]
Row = tuple[str, str, str, float]
"""Recipe, task, precision and threshold."""

ONE_SUFFICES = ("MountainCarContinuous-v0",)
"""Tasks on which it is enough that one of the recipes passes."""

RETURNS = "return: median (min to max)", "mean, 95 % interval"
COSTS = "frames", "seconds", "frames/s", "compile s", "skipped"
HEADER = ("recipe", "task", "precision", "threshold", *RETURNS, *COSTS, "passed")


def rows_of(records: Records) -> dict[Row, list[dict[str, Any] | None]]:
    """The records of each row of the table, a seed each; None where there is none."""
    rows: dict[Row, list[dict[str, Any] | None]] = {}
    for run, record in records.items():
        rows.setdefault((run.recipe, run.task, run.precision, run.threshold), []).append(record)
    return rows


def reached(record: dict[str, Any] | None, threshold: float) -> bool:
    """Whether a run was made and ended with at least the threshold."""
    return record is not None and record["failure"] is None and record["return_mean"] >= threshold


def table(records: Records, as_markdown: bool = False) -> str:
    """One row for each recipe, task and precision.

    Frames, seconds and frames/s are medians over seeds. Seconds are processor time on one core, without compilation,
    which stands apart.
    """
    rows = []
    for (recipe, task, precision, threshold), each in rows_of(records).items():
        made = [record for record in each if record is not None and record["failure"] is None]
        passed = f"{sum(reached(record, threshold) for record in each)} of {len(each)}"
        if not made:
            rows.append((recipe, task, precision, f"{threshold:g}", *["-"] * 7, passed))
            continue
        returns = [record["return_mean"] for record in made]
        low, high = interval(returns)
        rows.append(
            (
                *(recipe, task, precision, f"{threshold:g}", spread(returns)),
                f"{math.fsum(returns) / len(returns):.1f} ({low:.1f} to {high:.1f})",
                f"{median(record['frames'] for record in made):,.0f}",
                f"{median(record['seconds'] for record in made):.2f}",
                f"{median(record['frames'] / max(record['seconds'], 1e-9) for record in made):,.0f}",
                f"{median(record['compile_seconds'] for record in made):.1f}",
                f"{sum(record['skipped_steps'] for record in made):,}",
                passed,
            )
        )
    return markdown(HEADER, rows) if as_markdown else aligned(HEADER, rows)


def complaints(records: Records) -> list[str]:
    """In words, every run that is missing, has failed, or is below its threshold; none where all is well.

    Where it is enough that one recipe passes a task, the others are not complained of.
    """
    rows = rows_of(records)
    passed = {row for row, each in rows.items() if all(reached(record, row[3]) for record in each)}
    excused = {(task, precision) for _, task, precision, _ in passed if task in ONE_SUFFICES}
    said = []
    for run, record in records.items():
        if (run.task, run.precision) in excused or reached(record, run.threshold):
            continue
        if record is None:
            what = "not run"
        elif record["failure"] is not None:
            what = f"failed: {record['failure']}"
        else:
            what = f"{record['return_mean']:.1f} is below {run.threshold:g}"
        said.append(f"{run.recipe} on {run.task} in {run.precision}, seed {run.seed}: {what}")
    return said


def plot(records: Records, path: Path) -> None:
    """A panel for each task: a dot a seed in the column of its recipe and precision, and the threshold of each."""
    from matplotlib.figure import Figure

    shown = {
        row: [record["return_mean"] for record in each if record is not None and record["failure"] is None]
        for row, each in rows_of(records).items()
    }
    tasks = list(dict.fromkeys(row[1] for row, returns in shown.items() if returns))
    if not tasks:
        return
    columns = [[row for row in shown if row[1] == task and shown[row]] for task in tasks]
    widths = [max(3, 1 + len(each)) for each in columns]  # room for the longest name of a task
    figure = Figure(figsize=(max(4.0, 0.75 * sum(widths)), 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, width_ratios=widths)[0]
    for axes, task, rows in zip(panels, tasks, columns, strict=True):
        for place, row in enumerate(rows):
            returns = shown[row]
            offsets = [place + 0.08 * (seed - (len(returns) - 1) / 2) for seed in range(len(returns))]
            colors = ["C0" if value >= row[3] else "C3" for value in returns]
            axes.scatter(offsets, returns, s=14, c=colors, zorder=3)
            label = "threshold" if place == 0 else None
            axes.hlines(row[3], place - 0.4, place + 0.4, color="gray", linestyle=":", label=label)
        axes.set_xticks(range(len(rows)), [f"{recipe}\n{precision}" for recipe, _, precision, _ in rows], fontsize=7)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("recipe and precision", fontsize=8)
        axes.set_title(task, fontsize=9)
        axes.tick_params(axis="y", labelsize=7)
        axes.margins(y=0.15)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("mean return of the evaluation", fontsize=8)
    panels[0].legend(fontsize=7, loc="best")
    figure.suptitle("Every dot is a seed (red: below the threshold)", fontsize=9)
    figure.savefig(path)
