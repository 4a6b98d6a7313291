"""The table and the picture of `sample_efficiency`: frames to the threshold, ours beside Stable-Baselines3's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tables import markdown
from timing import aligned

if TYPE_CHECKING:
    from sample_efficiency import Run

Records = Mapping["Run", "dict[str, Any] | None"]
Pair = tuple[str, str, float]
"""Recipe, task and threshold."""

HEADER = (
    "recipe",
    "task",
    "threshold",
    "library",
    "frames to it: median (min to max)",
    "solved",
    "frames/s",
    "seconds",
)


def comparisons(records: Records) -> dict[Pair, dict[str, list[dict[str, Any] | None]]]:
    """The records of each recipe and task by library, a seed each."""
    found: dict[Pair, dict[str, list[dict[str, Any] | None]]] = {}
    for run, record in records.items():
        libraries = found.setdefault((run.recipe, run.task, run.threshold), {})
        libraries.setdefault(run.library, []).append(record)
    return found


def frames_to_threshold(record: dict[str, Any]) -> float:
    """Frames at the first evaluation that reached the threshold; infinite where none did."""
    return record["evaluations"][-1][0] if record["passed"] else math.inf


def made(records: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """The runs that came to an end."""
    return [record for record in records if record is not None and record["failure"] is None]


def rate(records: list[dict[str, Any]]) -> float:
    """The median of trained frames a second of processor time."""
    return median(record["frames"] / max(record["seconds"], 1e-9) for record in records)


def table(records: Records, as_markdown: bool = False) -> str:
    """A row for each recipe, task and library; seconds are processor time until the threshold or the budget's end."""
    rows = []
    for (recipe, task, threshold), libraries in comparisons(records).items():
        for library, every in libraries.items():
            runs, named = made(every), (recipe, task, f"{threshold:g}", library)
            if not runs:
                rows.append((*named, "-", f"0 of {len(every)}", "-", "-"))
                continue
            frames = [frames_to_threshold(run) for run in runs]
            spread = "{} ({} to {})".format(*map(_frames, (median(frames), min(frames), max(frames))))
            solved = f"{sum(map(math.isfinite, frames))} of {len(every)}"
            seconds = median(run["seconds"] for run in runs)
            rows.append((*named, spread, solved, f"{rate(runs):,.0f}", f"{seconds:.1f}"))
    return markdown(HEADER, rows) if as_markdown else aligned(HEADER, rows)


def _frames(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "never"


def complaints(records: Records) -> list[str]:
    """In words, where ours needs more frames or trains fewer a second, and every run that is missing or has failed.

    A median that is infinite is worse than any, also than another infinite one: ours has to solve the task.
    """
    said = []
    for run, record in records.items():
        if record is None or record["failure"] is not None:
            what = "not run" if record is None else f"failed: {record['failure']}"
            said.append(f"{run.library} {run.recipe} on {run.task}, seed {run.seed}: {what}")
    for (recipe, task, _), libraries in comparisons(records).items():
        ours, theirs = (made(libraries.get(library, [])) for library in ("ours", "sb3"))
        if not ours or not theirs:
            continue
        mine, other = (median(map(frames_to_threshold, each)) for each in (ours, theirs))
        if not mine <= other or math.isinf(mine):
            said.append(f"{recipe} on {task}: ours needs {_words(mine)}, Stable-Baselines3 {_words(other)}")
        if rate(ours) <= rate(theirs):
            said.append(
                f"{recipe} on {task}: ours trains {rate(ours):,.0f} frames/s, Stable-Baselines3 {rate(theirs):,.0f}"
            )
    return said


def _words(frames: float) -> str:
    return f"{frames:,.0f} frames" if math.isfinite(frames) else "more frames than it was given"


def plot(records: Records, path: Path) -> None:
    """A panel for each task: a dot a seed for each recipe and library, and a triangle where the budget ended first."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    pairs = {pair: each for pair, each in comparisons(records).items() if any(map(made, each.values()))}
    tasks = list(dict.fromkeys(task for _, task, _ in pairs))
    if not tasks:
        return
    columns = [[pair for pair in pairs if pair[1] == task] for task in tasks]
    widths = [1.5 + len(each) for each in columns]
    figure = Figure(figsize=(max(4.5, 1.0 * sum(widths)), 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, width_ratios=widths)[0]
    styles = {"ours": ("C1", -0.18), "sb3": ("C0", 0.18)}
    for axes, task, rows in zip(panels, tasks, columns, strict=True):
        for place, pair in enumerate(rows):
            for library, every in pairs[pair].items():
                color, shift = styles[library]
                for index, run in enumerate(made(every)):
                    offset = place + shift + 0.05 * (index - (len(every) - 1) / 2)
                    value, marker = (frames_to_threshold(run), "o") if run["passed"] else (run["frames"], "^")
                    axes.plot(
                        offset, value, marker, color=color, markersize=4, fillstyle="full" if run["passed"] else "none"
                    )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(range(len(rows)), [recipe for recipe, *_ in rows], fontsize=8)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("recipe", fontsize=8)
        axes.set_title(task, fontsize=9)
        axes.tick_params(axis="y", which="both", labelsize=7)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("frames to the threshold", fontsize=8)
    names = {"ours": "this package's preset", "sb3": "Stable-Baselines3, tuned"}
    marks = [Line2D([], [], color=styles[name][0], marker="o", linestyle="", label=names[name]) for name in names]
    marks.append(
        Line2D([], [], color="gray", marker="^", linestyle="", fillstyle="none", label="not reached at its end")
    )
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle("Every mark is a seed", fontsize=9)
    figure.savefig(path)
