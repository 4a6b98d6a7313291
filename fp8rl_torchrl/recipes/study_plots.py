"""Pictures of a study: how its best value came about, and which options it depends on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


def plot_history(study: optuna.Study, measure: str, path: str | Path) -> None:
    """Draw the value of each trial, and the best so far.

    Pruned trials stand at their last estimate; those that have none, such as refused ones, are left out.

    Args:
        study: The study.
        measure: What a value is.
        path: The picture to write; its ending chooses the format.
    """
    from matplotlib.ticker import MaxNLocator

    minimize = study.direction.name == "MINIMIZE"
    figure, axes = _figure()
    points: dict[str, list[tuple[int, float]]] = {"COMPLETE": [], "PRUNED": []}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name in points and trial.value is not None:
            points[trial.state.name].append((trial.number, trial.value))
    if points["PRUNED"]:
        axes.plot(*zip(*points["PRUNED"], strict=True), "x", color="0.6", label="pruned, at its last estimate")
    if points["COMPLETE"]:
        numbers, values = zip(*points["COMPLETE"], strict=True)
        best = [(min if minimize else max)(values[: place + 1]) for place in range(len(values))]
        axes.plot(numbers, values, "o", markersize=5, label="complete")
        axes.step(numbers, best, where="post", color="C1", label="best so far")
    if minimize:
        axes.set_yscale("log")
    axes.set(xlabel="trial", ylabel=measure, title=study.study_name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3)  # within the axes it would hide trials
    figure.savefig(path)


def plot_importance(study: optuna.Study, path: str | Path) -> None:
    """Draw how much each option decides whether a trial is among the best tenth (PED-ANOVA, arXiv:2304.10255).

    Args:
        study: The study, with at least two complete trials.
        path: The picture to write; its ending chooses the format.

    Raises:
        ValueError: If fewer trials are complete.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    complete = sum(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False))
    if complete < 2:
        raise ValueError(f"importance compares complete trials, and there are {complete}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes that few trials say little, which the picture's title says as well
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    figure, axes = _figure()
    bars = axes.barh(list(shares)[::-1], list(shares.values())[::-1])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.1 * (max(shares.values()) or 1))
    axes.set(xlabel="share of the importance", ylabel="option", title=f"{study.study_name}, {complete} complete trials")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    return figure, figure.subplots()
