"""What a run writes down: metrics.csv, TensorBoard events, the learning curve."""

import importlib.util
import math
import sys
import types

import imageio.v3 as imageio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fp8rl_torchrl.training import Report
from fp8rl_torchrl.training.metrics import (
    LEADING,
    Loggers,
    MetricsFile,
    plot_learning_curve,
    read_metrics,
    report_row,
    write_atomically,
)

NAN = math.nan


def row(frames, **more):
    return {**dict.fromkeys(LEADING, 0.5), "frames": frames, **more}


def same(left, right):
    """Rows equal, where a missing cell and NaN are the same."""
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        for name in {*ours, *theirs}:
            a, b = ours.get(name, NAN), theirs.get(name, NAN)
            assert a == b or (math.isnan(a) and math.isnan(b)), (name, a, b)


# ---------------------------------------------------------------------------------------------------------- metrics.csv

numbers = st.floats(width=64) | st.integers(-(2**53), 2**53)
rows = st.lists(
    st.fixed_dictionaries(dict.fromkeys(LEADING[1:], numbers), optional=dict.fromkeys(("loss", "grad_norm"), numbers)),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(rows=rows)
def test_what_is_written_can_be_read_back_exactly(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    written = [{"frames": number, **each} for number, each in enumerate(rows)]
    metrics = MetricsFile(path)
    for place, each in enumerate(written):
        metrics.append(each)
        same(read_metrics(path), written[: place + 1])
    same(metrics.rows, written)
    same(MetricsFile(path).rows, written)


def test_the_file_by_hand(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.append(row(1024, eval_return=NAN, loss=0.1, skipped_steps=0))
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "frames,seconds,episodes,updates,episode_return,episode_length,eval_return,loss,skipped_steps",
        "1024,0.5,0.5,0.5,0.5,0.5,,0.1,0",
    ]


def test_columns_that_appear_late_are_empty_before(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.append(row(1))
    metrics.append(row(2, loss=3.0))
    metrics.append(row(3))
    header, *lines = path.read_text().splitlines()
    assert header.endswith("eval_return,loss")
    assert [line.rpartition(",")[2] for line in lines] == ["", "3", ""]
    assert [each["loss"] for each in read_metrics(path)] == [pytest.approx(v, nan_ok=True) for v in (NAN, 3.0, NAN)]


def test_nan_cells_are_empty_and_infinities_are_not(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsFile(path).append(row(1, eval_return=NAN, loss=math.inf, other=-math.inf))
    assert path.read_text().splitlines()[1].endswith(",,inf,-inf")
    (read,) = read_metrics(path)
    assert math.isnan(read["eval_return"])
    assert (read["loss"], read["other"]) == (math.inf, -math.inf)


def test_every_row_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    for frames in range(5):
        metrics.append(row(frames))
        assert len(path.read_text().splitlines()) == frames + 2


def test_cut_back_removes_what_came_after(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    for frames in (10, 20, 30):
        metrics.append(row(frames, **({"loss": 1.0} if frames == 30 else {})))
    metrics.cut_back(20)
    assert [each["frames"] for each in metrics.rows] == [10, 20]
    assert [each["frames"] for each in read_metrics(path)] == [10, 20]
    assert "loss" not in path.read_text(), "as if the later row had never been"
    metrics.append(row(25))
    assert [each["frames"] for each in read_metrics(path)] == [10, 20, 25]
    metrics.cut_back(5)
    assert read_metrics(path) == metrics.rows == []


def test_a_file_cut_back_and_continued_has_the_same_bytes(tmp_path):
    def write(path, cut):
        metrics = MetricsFile(path)
        for frames in (10, 20, 30, 40):
            metrics.append(row(frames, **({"loss": 1.0 / frames} if frames > 10 else {})))
            if frames == 30 and cut:
                metrics = MetricsFile(path)
                metrics.cut_back(10)
                metrics.append(row(20, loss=1.0 / 20))
                metrics.append(row(30, loss=1.0 / 30))
        return path.read_bytes()

    assert write(tmp_path / "cut.csv", True) == write(tmp_path / "whole.csv", False)


@pytest.mark.parametrize("characters", range(1, 14))
def test_a_line_that_a_kill_cut_short_is_left_out(characters, tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.append(row(10, loss=0.25))
    metrics.append(row(20, loss=0.125))
    whole = path.read_bytes()
    path.write_bytes(whole[:-characters])  # the first takes the line end alone, later ones digits, then whole cells
    assert [each["frames"] for each in read_metrics(path)] == [10]
    continued = MetricsFile(path)
    continued.append(row(20, loss=0.125))
    same(read_metrics(path), [row(10, loss=0.25), row(20, loss=0.125)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", ["", "frames,seco", "frames,seconds\r\n"])
def test_a_file_without_rows_is_begun_again(content, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    assert read_metrics(path) == []
    MetricsFile(path).append(row(1))
    same(read_metrics(path), [row(1)])


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_the_row_of_a_report():
    report = Report(
        frames=1024,
        episodes=3,
        updates=31,
        seconds=2.5,
        episode_returns=(1.0, 2.0, 6.0),
        episode_return=3.0,
        episode_length=4.0,
        metrics={"loss_actor": 0.5, "grad_norm": 0.25, "loss_scale": 8.0, "skipped": 0.25, "skipped_loss_b": 1.0},
        skipped_steps=1,
    )
    assert report_row(report, eval_return=7.0) == {
        "frames": 1024,
        "seconds": 2.5,
        "episodes": 3,
        "updates": 31,
        "episode_return": 3.0,
        "episode_length": 4.0,
        "eval_return": 7.0,
        "loss_actor": 0.5,
        "grad_norm": 0.25,
        "loss_scale": 8.0,
        "skipped_steps": 1,
    }


# -------------------------------------------------------------------------------------------------- TensorBoard and W&B


def test_tensorboard_events_can_be_read_back(tmp_path):
    loggers = Loggers(tmp_path)
    loggers.log(row(1024, loss=0.25, eval_return=NAN))
    loggers.log(row(2048, loss=0.125, eval_return=7.0))
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {*LEADING, "loss"} - {"frames"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1024, 0.25), (2048, 0.125)]
    assert [(event.step, event.value) for event in events.Scalars("eval_return")] == [(2048, 7.0)], "NaN is left out"


def no_wandb(name, *args, find=importlib.util.find_spec):
    return None if name == "wandb" else find(name, *args)


def test_wandb_that_is_not_installed_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", no_wandb)
    with pytest.raises(ValueError, match="W&B is not installed; run: pip install wandb"):
        Loggers(tmp_path, wandb_project="project")
    assert list(tmp_path.iterdir()) == []


def test_wandb_gets_the_same_rows_and_the_configuration(tmp_path, monkeypatch):
    """With a stand-in for TorchRL's logger, which needs an account."""
    from torchrl.record.loggers import wandb

    calls = []

    class Logger:
        def __init__(self, name, *, project, save_dir):
            calls.append(("made", name, project, save_dir))
            self.experiment = types.SimpleNamespace(finish=lambda: calls.append(("finished",)))

        def log_hparams(self, config):
            calls.append(("config", config))

        def log_scalar(self, name, value, step):
            calls.append((name, value, step))

    monkeypatch.setattr(wandb, "WandbLogger", Logger)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    loggers = Loggers(tmp_path / "run", "project", {"seed": 3})
    loggers.log({"frames": 64, "loss": 0.5, "eval_return": NAN})
    loggers.close()
    assert calls == [
        ("made", "run", "project", str(tmp_path / "run")),
        ("config", {"seed": 3}),
        ("loss", 0.5, 64),
        ("finished",),
    ]


# --------------------------------------------------------------------------------------------------- the learning curve


def colours(path):
    red, green, blue = np.moveaxis(imageio.imread(path)[..., :3].astype(int), -1, 0)
    return {(each >> 16, each >> 8 & 255, each & 255) for each in np.unique(red << 16 | green << 8 | blue).tolist()}


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_the_learning_curve_is_drawn(tmp_path):
    rows = [row(frames, episode_return=frames / 10, eval_return=NAN) for frames in range(0, 1000, 100)]
    path = tmp_path / "learning_curve.png"
    plot_learning_curve(rows, "CustomEnv, bf16", path)
    picture = imageio.imread(path)
    assert picture.shape[:2] == (600, 1050)
    assert len(colours(path)) > 20
    assert BLUE in colours(path)
    assert ORANGE not in colours(path), "no evaluation took place"

    rows[4]["eval_return"], rows[9]["eval_return"] = 30.0, 90.0
    plot_learning_curve(rows, "CustomEnv, bf16", path)
    assert {BLUE, ORANGE} <= colours(path)


@pytest.mark.parametrize("rows", [[], [row(64, episode_return=NAN, eval_return=NAN)]], ids=["no rows", "no episode"])
def test_a_curve_without_points_is_an_empty_picture(rows, tmp_path):
    plot_learning_curve(rows, "nothing yet", tmp_path / "curve.png")
    assert imageio.imread(tmp_path / "curve.png").shape[:2] == (600, 1050)
    plot_learning_curve(rows, "nothing yet", tmp_path / "curve.svg")
    assert "no training episode has ended" in (tmp_path / "curve.svg").read_text()


def test_the_ending_chooses_the_format_and_the_same_rows_give_the_same_picture(tmp_path):
    for name in ("a.svg", "b.svg"):
        plot_learning_curve([row(1, episode_return=1.0), row(2, episode_return=2.0)], "title", tmp_path / name)
    a, b = (tmp_path / name for name in ("a.svg", "b.svg"))
    assert a.read_text().startswith("<?xml")
    without_date = [[line for line in each.read_text().splitlines() if "<dc:date>" not in line] for each in (a, b)]
    assert without_date[0] == without_date[1]


def test_drawing_needs_no_display():
    assert "matplotlib.pyplot" not in sys.modules, "pyplot would choose a window system"
