"""What the figures of a comparison show."""

from types import SimpleNamespace

import precision_figures
import precision_heatmaps
import pytest


def result_of(task="CustomEnv", modes=("fp32", "bf16", "fp8"), reference="fp32", numerics=None):
    """Two seeds of each mode, a curve of two evaluations each; returns are 0 in every other mode than the reference."""
    records = {
        mode: [
            {
                "curve": [[100, 220.0 * (mode == reference)], [200, 220.0 * (mode == reference)]],
                "conversion": None,
                "products": {"fp32": 1.0} if mode == reference else {"bf16": 1.0},
                "numerics": (numerics or {}).get(mode),
            }
            for _ in range(2)
        ]
        for mode in modes
    }
    runs = {mode: SimpleNamespace(seeds=(0, 1), final=(1.0, 1.0), areas=(1.0, 1.0)) for mode in modes}
    kinds = [
        SimpleNamespace(mode=mode, kind="reference" if mode == reference else "worse", tests=len(modes) - 1)
        for mode in modes
    ]
    return SimpleNamespace(
        task=task,
        recipe="ppo",
        records=records,
        runs=runs,
        reference=reference,
        verdict=SimpleNamespace(verdicts=kinds),
        margin=0.05,
        emulated=False,
    )


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_the_headline_has_a_panel_for_each_task_and_a_row_for_each_mode(tasks):
    names = ("CustomEnv", "CartPole-v1", "Acrobot-v1", "Pendulum-v1", "CustomEnv")[:tasks]
    every = precision_figures.headline([result_of(task) for task in names]).get_axes()
    assert [axes.get_title() for axes in every] == [f"{task} (ppo)" for task in names]
    assert [label.get_text() for label in every[0].get_yticklabels()] == ["bf16", "fp8"]
    # Its neighbours have the same rows, and no names of their own.
    assert all(len(axes.get_yticks()) == 2 and not axes.get_yticklabels() for axes in every[1:])


def test_differences_are_marked_where_they_lie():
    """Scores of bf16 are 0.02 and 0.04 above the reference's at the end, and its areas the same; fp8 loses all.

    The standard error is 0.01, and the t quantile with one degree of freedom that leaves 5 % / 2 is 12.706.
    """
    result = result_of()
    result.runs["bf16"].final = (1.02, 1.04)
    result.runs["fp8"].final = result.runs["fp8"].areas = (0.0, 0.0)
    figure = precision_figures.differences(result)
    (axes,) = figure.get_axes()
    end, area = (container for container in axes.containers)
    assert end.lines[0].get_xdata()[0] == pytest.approx(3.0)
    assert end.lines[2][0].get_segments()[0][:, 0].tolist() == pytest.approx([3 - 12.706, 3 + 12.706], abs=1e-2)
    assert area.lines[0].get_xdata()[0] == 0.0
    assert axes.get_xlim() == (-20.0, 20.0)  # four margins
    assert [text.get_text() for text in axes.texts] == ["-100 %", "-100 %"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["at the end", "over training"]


def test_each_mode_has_its_panel_with_the_reference_behind_it():
    """The reference is the second mode here; four others take two rows of three, and two places stay empty."""
    modes = ("bf16", "fp32", "fp16", "fp8", "fp8-tensorwise")
    every = precision_figures.curves(result_of(modes=modes)).get_axes()
    shown = [axes for axes in every if axes.axison]
    assert len(shown) == 4
    for axes, mode in zip(shown, ("bf16", "fp16", "fp8", "fp8-tensorwise"), strict=True):
        reference, own = axes.get_lines()[:2]
        assert (reference.get_label(), own.get_label()) == ("fp32", mode)
        assert reference.get_xdata().tolist() == [100, 200]
        assert reference.get_ydata()[0] > 1 > 0 > own.get_ydata()[0]


def numerics(parts, frames):
    """One layer, of which ``parts`` of each operand (of four) vanish at each look."""
    values = [[[[1.0, part, 0.0, 40.0] for _ in range(4)]] for part in parts]
    return {"layers": ["layer"], "formats": ["bf16"], "frames": frames, "values": values}


def test_heat_maps_of_a_task_have_one_scale_and_marks_that_differ():
    looked = {"bf16": numerics([0.0, 0.01, 0.02], [0, 0, 4096]), "fp8": numerics([0.0, 0.5, 0.25], [0, 0, 4096])}
    result = result_of(numerics={"fp32": numerics([0.0] * 3, [0, 0, 4096]), **looked})
    assert precision_heatmaps.numbers(result, "fp32", "underflow") is None
    assert precision_heatmaps.numbers(result, "fp8", "saturation") is None
    for mode, largest in (("bf16", 2.0), ("fp8", 50.0)):
        axes = precision_heatmaps.numbers(result, mode, "underflow").get_axes()[0]
        (image,) = axes.get_images()
        assert image.get_array().max() == pytest.approx(largest)
        assert (image.norm.vmin, image.norm.vmax) == (0.0, 50.0)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "4.1k"]
        assert axes.get_xticks().tolist() == [0, 2]


def test_what_was_never_looked_at_has_no_heat_map():
    empty = {"layers": [], "formats": [], "frames": [], "values": []}
    result = result_of(numerics=dict.fromkeys(("fp32", "bf16", "fp8"), empty))
    assert precision_heatmaps.numbers(result, "bf16", "underflow") is None
