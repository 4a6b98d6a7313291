"""The figures of a comparison of precisions. Each says what it shows and over how many seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median, median_high
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from mode_cell import PARTS
from page_style import SIZE
from precision_heatmaps import numbers
from precision_records import TaskResults, curve_of, interval, median_seconds, seconds_to
from scores import iqm, profile, profile_interval
from verdicts import WHEN, in_words, paired

MEMORY = ("parameters", "gradients", "optimizer", "activations", "replay")
MODES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb8866", "#999999")
"""Colours of the modes (Tol's bright scheme), told apart by most colour-blind eyes and on both backgrounds."""
LOWEST_SCALE = 2.0**-24
"""Of the loss, that is drawn."""
VERDICTS = {"equivalent": "#228833", "better": "#228833", "worse": "#cc3311", "cannot tell": "#b8860b"}
"""Colours of what is said of a mode."""
DIFFERENCE = "difference, % of the way from random to solved"
MARKS = tuple(zip("os", WHEN, strict=True))
SHADES = ("#4477aa", "#66ccee", "#ccbb44", "#ee6677", "#999999")


def _one(title: str, **labels: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, **labels)
    axes.grid(alpha=0.25)
    return figure, axes


def _colours(result: TaskResults) -> dict[str, str]:
    return {mode: MODES[place % len(MODES)] for place, mode in enumerate(result.runs)}


def _seeds(result: TaskResults) -> str:
    return in_words(len(next(iter(result.runs.values())).seeds))


def curves(result: TaskResults) -> Figure:
    """Learning curves: the interquartile mean of the score and its bootstrap interval, each mode on the reference's."""
    modes = _others(result)
    columns = min(len(modes), 3)
    rows = -(-len(modes) // columns)
    figure = Figure(figsize=(SIZE[0], 0.9 + 1.5 * rows), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    _panels(result, every)
    for axes, mode in zip(every, modes, strict=False):
        axes.set_title(mode, fontsize="small")
    for axes in every[len(modes) :]:
        axes.set_axis_off()
    said = f"{result.task}: learning, IQM of {_seeds(result)}, 95 % interval; black: {result.reference}"
    figure.suptitle(said, fontsize="medium")
    figure.supxlabel("environment steps (frames)", fontsize="medium")
    figure.supylabel("score (0 random, 1 solved)", fontsize="medium")
    return figure


def _others(result: TaskResults) -> list[str]:
    return [mode for mode in result.runs if mode != result.reference]


def _panels(result: TaskResults, every: Sequence[Axes]) -> None:
    """One axes for each mode but the reference, which stands behind each in black."""
    curve = {mode: _curve(result, mode) for mode in result.runs}
    colours = _colours(result)
    for axes, mode in zip(every, _others(result), strict=False):
        for name, colour in ((result.reference, "k"), (mode, colours[mode])):
            frames, middle, low, high = curve[name]
            axes.plot(frames, middle, color=colour, label=name, linewidth=1.2)
            axes.fill_between(frames, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.axhline(1, color="gray", linestyle=":", linewidth=1)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize="x-small")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _curve(result: TaskResults, mode: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Frames, and of the scores the interquartile mean and both ends of its interval."""
    found = [curve_of(result.task, record) for record in result.records[mode]]
    frames = [median(each) for each in zip(*(at for at, _ in found), strict=True)]
    scores = [list(each) for each in zip(*(values for _, values in found), strict=True)]
    low, high = zip(*(interval(each) for each in scores), strict=True)
    return frames, [iqm(each) for each in scores], list(low), list(high)


def time_to_return(result: TaskResults) -> Figure:
    """Seconds of training until an evaluation scores 1; runs that never do stand above the line."""
    figure, axes = _one(f"{result.task}: time to solved, {_seeds(result)}", ylabel="seconds of training")
    found = {mode: [seconds_to(result.task, each, 1.0) for each in own] for mode, own in result.records.items()}
    known = [each for own in found.values() for each in own if each is not None]
    never = 1.15 * max(known, default=1.0)
    for place, (mode, colour) in enumerate(_colours(result).items()):
        values = [never if each is None else each for each in found[mode]]
        axes.plot(_spread(place, len(values)), values, "o", color=colour, markersize=4)
        # The higher of two in the middle: half-way to never is nowhere.
        axes.hlines(median_high(values), place - 0.3, place + 0.3, color=colour)
    axes.axhline(1.07 * max(known, default=1.0), color="gray", linestyle=":", linewidth=1)
    axes.text(1.01, never, "never", transform=axes.get_yaxis_transform(), va="center", fontsize="small")
    axes.set_ylim(0, 1.25 * max(known, default=1.0))
    _mode_ticks(axes, result)
    return figure


def speed(result: TaskResults) -> Figure:
    """Where the time of a frame goes, the median over seeds."""
    figure, axes = _one(f"{result.task}: time of a frame, median of {_seeds(result)}", ylabel="µs a frame, one core")
    _stacked(axes, result, {part: [median_seconds(own, part) for own in result.records.values()] for part in PARTS})
    return figure


def memory(result: TaskResults) -> Figure:
    """Memory by category, the median over seeds."""
    figure, axes = _one(f"{result.task}: memory, median of {_seeds(result)}", ylabel="KiB")
    heights = {
        part: [median(each["memory"][part] / 1024 for each in own) for own in result.records.values()]
        for part in MEMORY
    }
    _stacked(axes, result, heights)
    return figure


def loss_scale(result: TaskResults) -> Figure | None:
    """The loss scale and the skipped updates of the modes that have either; None if none has."""
    colours = _colours(result)
    shown = [
        mode
        for mode, own in result.records.items()
        if any(each["skipped_steps"] for each in own) or any((s or 1) != 1 for e in own for _, s, _ in e["loss_scale"])
    ]
    if not shown:
        return None
    figure = Figure(figsize=SIZE, layout="constrained")
    scales, skips = figure.subplots(2, sharex=True)
    for mode in shown:
        for seed, each in enumerate(result.records[mode]):
            frames, scale, skipped = zip(*each["loss_scale"], strict=True)
            label = mode if seed == 0 else None
            scales.step(frames, [math.nan if s is None else s for s in scale], color=colours[mode], alpha=0.6, lw=1)
            skips.plot(frames, skipped, color=colours[mode], alpha=0.6, linewidth=1, label=label)
    scales.set(title=f"{result.task}: loss scale, skipped updates, {_seeds(result)}", ylabel="loss scale")
    scales.set_yscale("log", base=2)
    # One that is halved for ever is not followed to where it ends.
    scales.set_ylim(bottom=max(scales.get_ylim()[0], LOWEST_SCALE))
    skips.set(xlabel="environment steps (frames)", ylabel="skipped, in all")
    skips.xaxis.set_major_formatter(EngFormatter(places=1, sep=""))
    skips.legend(fontsize="x-small")
    for axes in (scales, skips):
        axes.grid(alpha=0.25)
    return figure


def profiles(results: Sequence[TaskResults]) -> Figure:
    """Performance profiles over all tasks: the part of the runs above each score."""
    seeds = sum(len(next(iter(result.runs.values())).seeds) for result in results)
    figure, axes = _one(
        f"all tasks: runs above a score, {seeds} a mode", xlabel="score (0 random, 1 solved)", ylabel="part of the runs"
    )
    levels = np.linspace(0, 1.3, 131)
    for mode, colour in _colours(results[0]).items():
        scores = [result.runs[mode].final for result in results if mode in result.runs]
        axes.step(levels, profile(np.concatenate(scores), levels), color=colour, label=mode, linewidth=1.4)
        low, high = profile_interval(scores, levels)
        axes.fill_between(levels, low, high, step="pre", color=colour, alpha=0.12, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize="x-small", loc="lower left")
    return figure


def differences(result: TaskResults) -> Figure:
    """How far each mode is from the reference, with the band in which it counts as equivalent."""
    figure, axes = _one(f"{result.task}: difference from {result.reference}, {_seeds(result)}")
    _differences(axes, result)
    axes.set_xlabel(DIFFERENCE)
    figure.legend(loc="outside lower right", ncols=2, fontsize="x-small")
    return figure


def headline(results: Sequence[TaskResults]) -> Figure:
    """The differences from the reference on all tasks, side by side."""
    figure = Figure(figsize=(1.6 + 2.6 * len(results), 3.8), layout="constrained")
    row = figure.subplots(1, len(results), squeeze=False)[0]
    for place, (axes, result) in enumerate(zip(row, results, strict=True)):
        _differences(axes, result)
        axes.set_title(f"{result.task} ({result.recipe})", fontsize="medium")
        axes.grid(alpha=0.25)
        if place and _others(result) == _others(results[0]):
            axes.tick_params(labelleft=False)
    note = "; FP8 emulated" if any(result.emulated for result in results) else ""
    said = f"Difference from {results[0].reference}, {_seeds(results[0])}; inside the band: equivalent{note}"
    figure.suptitle(said)
    figure.supxlabel(DIFFERENCE, fontsize="medium")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize="small")
    return figure


def _differences(axes: Axes, result: TaskResults) -> None:
    """A mark a mode for the score at the end and one for the area, with what the test of equivalence looks at."""
    modes, limit = _others(result), 400 * result.margin
    verdicts = {each.mode: each for each in result.verdict.verdicts}
    axes.axvspan(-100 * result.margin, 100 * result.margin, color="gray", alpha=0.18, linewidth=0)
    axes.axvline(0, color="gray", linewidth=0.8)
    for place, mode in enumerate(modes):
        colour = VERDICTS[verdicts[mode].kind]
        for pair, shift, (mark, name) in zip(
            paired(result.runs[mode], result.runs[result.reference]), (-0.15, 0.15), MARKS, strict=True
        ):
            tests, several = verdicts[mode].tests, len(pair.differences) > 1
            mean, reach = 100 * pair.mean, 100 * pair.reach(tests) if several else 0.0
            label = name if place == 0 else None
            if abs(mean) > limit:
                said, side = f"{mean:+.0f} %", math.copysign(1, mean)
                axes.plot(side * 0.94 * limit, place + shift, "<" if side < 0 else ">", color=colour, markersize=5)
                beside = "left" if side < 0 else "right"
                axes.text(side * 0.86 * limit, place + shift, said, fontsize=7, va="center", ha=beside)
                axes.plot([], [], mark, color="gray", fillstyle="none", label=label)
            else:
                axes.errorbar(
                    mean, place + shift, xerr=reach, fmt=mark, color=colour, markersize=4.5, capsize=2, label=label
                )
    axes.set_xlim(-limit, limit)
    axes.set_ylim(len(modes) - 0.4, -0.6)
    axes.set_yticks(range(len(modes)), modes, fontsize="small")


def _stacked(axes: Axes, result: TaskResults, heights: Mapping[str, Sequence[float]]) -> None:
    below = np.zeros(len(result.runs))
    for (part, values), colour in zip(heights.items(), SHADES, strict=True):
        axes.bar(range(len(values)), values, bottom=below, color=colour, label=part, width=0.7)
        below += np.asarray(values)
    axes.legend(fontsize="x-small", ncols=3)
    axes.set_ylim(0, 1.3 * below.max())
    _mode_ticks(axes, result)


def _mode_ticks(axes: Axes, result: TaskResults) -> None:
    axes.set_xticks(range(len(result.runs)), [mode.replace("-", "-\n", 1) for mode in result.runs], fontsize="small")
    axes.set_xlim(-0.6, len(result.runs) - 0.4)


def _spread(place: int, count: int) -> list[float]:
    return [place + 0.4 * ((each + 0.5) / count - 0.5) for each in range(count)]


def drawn(result: TaskResults) -> dict[str, Any]:
    """Every figure of a task, by what it is called; those that there are."""
    figures: dict[str, Any] = {
        "differences": differences(result),
        "learning curves": curves(result),
        "time to solved": time_to_return(result),
        "time of a frame": speed(result),
        "memory": memory(result),
        "loss scale and skipped updates": loss_scale(result),
    }
    for mode, own in result.records.items():
        if any(each["products"].keys() - {"fp32"} for each in own):
            for measure in ("underflow", "saturation"):
                figures[f"{measure} in {mode}"] = numbers(result, mode, measure)
    return {name: figure for name, figure in figures.items() if figure is not None}
