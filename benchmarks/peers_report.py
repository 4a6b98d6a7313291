"""The table and the picture of `peers`: rates with their spread, and how ours compares."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, floor, log10
from pathlib import Path
from statistics import median
from typing import Any

from timing import aligned, ratios

Key = tuple[str, str]
"""Peer and precision."""


def comparisons(records: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], dict[Key, dict[int, dict[str, Any]]]]:
    """The results by (task, algorithm, setting), then by peer and precision, then by turn."""
    found: dict[tuple[str, str, str], dict[Key, dict[int, dict[str, Any]]]] = {}
    for record in records:
        where = record["task"], record["algo"], record["setting"]
        peers = found.setdefault(where, {})
        peers.setdefault((record["peer"], record["precision"]), {})[record["repeat"]] = record["result"]
    return found


def unit_of(algo: str) -> str:
    """What is counted: updates where they are of one size for all, frames otherwise."""
    return "updates" if algo == "replay" else "frames"


def rates(turns: dict[int, dict[str, Any]], unit: str) -> dict[int, float]:
    """Frames or updates per second of processor time, of each turn that did not fail."""
    return {turn: result[unit] / result["cpu_seconds"] for turn, result in turns.items() if "failure" not in result}


def ratio(ours: dict[int, float], other: dict[int, float]) -> dict[str, float] | None:
    """Ours over another, turn by turn: median, min and max; None without a common turn."""
    common = sorted(set(ours) & set(other))
    return ratios([ours[turn] for turn in common], [other[turn] for turn in common]) if common else None


def table(records: list[dict[str, Any]]) -> str:
    """A table for each task, algorithm and setting; a peer without a number is listed with its reason."""
    blocks = []
    for (task, algo, setting), peers in comparisons(records).items():
        unit = unit_of(algo)
        measured = {key: rates(turns, unit) for key, turns in peers.items()}
        ours = [key for key in measured if key[0] == "ours" and measured[key]]
        rows, reasons = [], []
        for (peer, precision), each in measured.items():
            failures = [r["failure"] for r in peers[peer, precision].values() if "failure" in r]
            reasons += [f"  {peer} {precision}: {reason}" for reason in dict.fromkeys(failures)]
            against = [ratio(measured[key], each) for key in ours]
            spread = _spread(median(each.values()), min(each.values()), max(each.values()), "{:,.0f}") if each else "-"
            cells = [_spread(r["median"], r["min"], r["max"], "{:.2f}") if r else "-" for r in against]
            rows.append((peer, precision, spread, *cells))
        header = ("peer", "precision", f"{unit}/s (min–max)", *(f"ours {precision} / it" for _, precision in ours))
        notes = [f"  {note}" for note in notes_of(peers)]
        blocks.append("\n".join((f"\n{task}, {algo}, {setting}", aligned(header, rows), *reasons, *notes)))
    return "\n".join(blocks)


def notes_of(peers: dict[Key, dict[int, dict[str, Any]]]) -> list[str]:
    """In what each peer says that it differs from the others."""
    results = [(peer, result) for (peer, _), turns in peers.items() for result in turns.values()]
    return list(dict.fromkeys(f"{peer}: {note}" for peer, result in results for note in result.get("notes", ())))


def _spread(middle: float, low: float, high: float, form: str) -> str:
    return f"{form.format(middle)} ({form.format(low)}–{form.format(high)})"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Bars of the median rates on a log axis, whiskers at min and max; a panel for each task, algorithm and setting."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    panels = [
        (where, {key: each for key, turns in peers.items() if (each := rates(turns, unit_of(where[1])))})
        for where, peers in comparisons(records).items()
    ]
    panels = [(where, measured) for where, measured in panels if measured]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 4 * columns, 0.8 + 2.6 * rows), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, ((task, algo, setting), measured) in zip(grid.flat, panels, strict=False):
        names = [f"{peer} {precision}" for peer, precision in measured]
        middle = [median(each.values()) for each in measured.values()]
        below = [m - min(each.values()) for m, each in zip(middle, measured.values(), strict=True)]
        above = [max(each.values()) - m for m, each in zip(middle, measured.values(), strict=True)]
        colors = ["tab:orange" if peer == "ours" else "tab:blue" for peer, _ in measured]
        axes.barh(names, middle, xerr=[below, above], color=colors, height=0.7, error_kw={"elinewidth": 0.8})
        for place, (value, error) in enumerate(zip(middle, below, strict=True)):  # clear of the whisker
            axes.annotate(f"{value:,.0f} ", (value - error, place), ha="right", va="center", fontsize=7, color="white")
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(10 ** floor(log10(min(middle) / 2)), 10 ** ceil(log10(max(middle) * 1.2)))
        axes.set_title(f"{task}, {algo}, {setting.replace('x', ' envs x ')} steps", fontsize=9)
        axes.set_xlabel(f"{'trained frames' if unit_of(algo) == 'frames' else 'updates'} per second", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"One core and thread of {records[0]['hardware']['cpu']}", fontsize=10)
    figure.savefig(path)
