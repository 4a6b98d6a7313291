"""What the figures of a comparison show."""

from types import SimpleNamespace

import precision_figures
import pytest


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5])
def test_the_headline_has_axes_for_its_tasks_and_no_others(monkeypatch, tasks):
    monkeypatch.setattr(precision_figures, "curves", lambda result, axes: None)
    runs = {"fp32": SimpleNamespace(seeds=(0,))}
    results = [SimpleNamespace(task=f"task {each}", recipe="ppo", records={}, runs=runs) for each in range(tasks)]
    shown = [axes for axes in precision_figures.headline(results).get_axes() if axes.axison]
    assert [axes.get_title() for axes in shown] == [f"task {each} (ppo)" for each in range(tasks)]
