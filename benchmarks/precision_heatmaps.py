"""Heat maps of a comparison of precisions: what is lost in each layer, and where each precision pays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from mode_cell import MEASURES, ROLES
from page_style import SIZE
from precision_records import TaskResults


def numbers(result: TaskResults, mode: str, measure: str) -> Figure | None:
    """A heat map of a mode's ``underflow`` or ``saturation`` by layer and update, means over seeds; None if all 0."""
    table = _parts(result, mode, measure)
    if not np.nanmax(table, initial=0.0) > 0:
        return None
    largest = max(np.nanmax(_parts(result, each, measure), initial=0.0) for each in result.records)
    sample = result.records[mode][0]["numerics"]
    rows = [f"{place + 1} {role}" for place in range(len(sample["layers"])) for role in ROLES]
    figure = Figure(figsize=(SIZE[0], 1.6 + 0.16 * len(rows)), layout="constrained")
    axes = figure.subplots()
    # One scale for all modes of the task, on which small parts can be seen beside large ones.
    norm = PowerNorm(0.4, vmin=0, vmax=100 * largest)
    image = axes.imshow(100 * table, aspect="auto", cmap="magma_r", norm=norm)
    axes.set_yticks(range(len(rows)), rows, fontsize=6)
    # Several updates of a collection have the same frames: the first of them is marked.
    frames = sample["frames"][: table.shape[1]]
    firsts = [place for place, each in enumerate(frames) if place == 0 or each != frames[place - 1]]
    marked = firsts[:: -(-len(firsts) // 5)]
    axes.set_xticks(marked, [f"{frames[place] / 1000:.3g}k" if place else "0" for place in marked])
    axes.set(xlabel="environment steps (frames)", ylabel="layer", title=f"{result.task}, {mode}: {measure}")
    figure.colorbar(image, label="% of elements", shrink=0.8)
    return figure


def _parts(result: TaskResults, mode: str, measure: str) -> np.ndarray:
    """The part of the elements by layer and role, and by update: the mean over seeds; NaN where not finite."""
    samples = [each["numerics"] for each in result.records[mode] if each["numerics"]["values"]]
    count = min((len(own["frames"]) for own in samples), default=0)
    if not count:
        return np.zeros((0, 0))
    values = np.array([own["values"][:count] for own in samples], dtype=np.float64)[..., MEASURES.index(measure)]
    return values.mean(0).reshape(count, -1).T


def width_by_batch(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Where each precision pays: the speed of one linear layer over widths and batches, in units of FP32's.

    Args:
        records: Those of ``linear.py``, made on one machine.
    """
    eager = [each for each in records if each["execution"] == "eager" and each["failure"] is None]
    seconds = {(each["mode"], each["width"], each["batch"]): each["seconds_median"] for each in eager}
    modes = [mode for mode in dict.fromkeys(mode for mode, _, _ in seconds) if mode not in ("fp32", "tf32")]
    widths, batches = (sorted({key[place] for key in seconds}) for place in (1, 2))
    if not modes or ("fp32", widths[0], batches[0]) not in seconds:
        return None
    columns = 2
    rows = -(-len(modes) // columns)
    figure = Figure(figsize=(SIZE[0], 0.6 + 2.1 * rows), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, mode in zip(every, modes, strict=False):
        keys = [[(width, batch) for batch in batches] for width in widths]
        table = np.array(
            [[seconds.get(("fp32", *k), math.nan) / seconds.get((mode, *k), math.nan) for k in row] for row in keys]
        )
        axes.imshow(np.log2(table), aspect="auto", cmap="RdYlGn", vmin=-3, vmax=3, origin="lower")
        for row, column in np.ndindex(*table.shape):
            axes.annotate(f"{table[row, column]:.2g}", (column, row), ha="center", va="center", fontsize=7, color="k")
        axes.set_xticks(range(len(batches)), [str(each) for each in batches], fontsize="small")
        axes.set_yticks(range(len(widths)), [str(each) for each in widths], fontsize="small")
        axes.set_title(mode, fontsize="medium")
    for axes in every[len(modes) :]:
        axes.set_axis_off()
    figure.supxlabel("batch", fontsize="medium")
    figure.supylabel("width", fontsize="medium")
    return figure
