"""`Run`: what a run leaves in its folder, how it stops, and that a resumed one ends as if it had never stopped."""

import dataclasses
import functools
import json
import math
import os
import signal
import threading

import pytest
import torch
from small_runs import CONFIG, Killed, killed, rows_of, run_in, saved_frames, state_of, stop_at

from fp8rl_torchrl.training import run as run_module
from fp8rl_torchrl.training.checkpoint import CheckpointError
from fp8rl_torchrl.training.metrics import Loggers, read_metrics
from fp8rl_torchrl.training.run import RunSchedule


@pytest.fixture(autouse=True)
def _no_picture(request, monkeypatch):
    """The picture and TensorBoard take longer than the training here: they are made where a test asks for them."""
    if "everything" not in request.node.name:
        monkeypatch.setattr(run_module, "plot_learning_curve", lambda rows, title, path: path.write_text(title))


# ------------------------------------------------------------------------------------------------------ what is left


def test_everything_a_run_leaves_in_its_folder(tmp_path):
    seen = []
    run = run_in(tmp_path / "run", on_report=seen.append, loggers=Loggers)
    assert run.train() == "total_frames"
    summary = run.summarize("total_frames")

    assert sorted(path.name for path in run.folder.path.iterdir()) == [
        "best",
        "checkpoints",
        "config.json",
        "learning_curve.png",
        "metrics.csv",
        "summary.json",
        "tensorboard",
    ]
    rows = read_metrics(run.folder.metrics)
    assert [row["frames"] for row in rows] == [report.frames for report in seen] == list(range(64, 513, 64))
    # learning starts with the second collection; three updates each
    assert [row["updates"] for row in rows] == [0, 3, 6, 9, 12, 15, 18, 21]
    # the multiples of 150 are passed by the reports at 192, 320 and 512 (450 lies between 448 and 512)
    assert [row["frames"] for row in rows if not math.isnan(row["eval_return"])] == [192, 320, 512]
    for name in ("loss_actor", "loss_critic", "loss_entropy", "grad_norm", "loss_scale"):
        assert [math.isnan(row[name]) for row in rows] == [True] + [False] * 7, name
    assert run.folder.curve.stat().st_size > 5000

    assert json.loads(run.folder.summary.read_text()) == summary
    assert {key: summary[key] for key in ("eval_episodes", "frames", "updates", "skipped_steps", "stopped_by")} == {
        "eval_episodes": 3,
        "frames": 512,
        "updates": 21,
        "skipped_steps": 0,
        "stopped_by": "total_frames",
    }
    result = run.evaluate(3)
    assert (summary["eval_return_mean"], summary["eval_return_std"]) == (result.mean, result.std)
    assert summary["frames_per_second"] == pytest.approx(512 / summary["train_seconds"])
    assert summary["train_seconds"] == rows[-1]["seconds"] > 0


def test_it_is_saved_after_the_first_collection_then_on_schedule_and_at_the_end(tmp_path, monkeypatch):
    run, saved = run_in(tmp_path / "run"), []
    save = run.checkpoints.save
    monkeypatch.setattr(run.checkpoints, "save", lambda frames: saved.append(frames) or save(frames))
    run.train()
    # at 0 updates, then whenever six more were made (6, 12, 18), then at the end
    assert saved == [64, 192, 320, 448, 512]
    assert saved_frames(run) == [448, 512]


def test_without_evaluations_in_between(tmp_path):
    run = run_in(tmp_path / "run", dataclasses.replace(CONFIG, eval_every=0))
    run.train()
    assert all(math.isnan(row["eval_return"]) for row in read_metrics(run.folder.metrics))


def test_a_budget_in_episodes(tmp_path):
    run = run_in(tmp_path / "run", dataclasses.replace(CONFIG, total_frames=None, episodes=2))
    assert run.train() == "episodes"
    assert run.pipeline.episodes >= 2


def test_evaluations_do_not_change_the_run(tmp_path):
    often = run_in(tmp_path / "often", dataclasses.replace(CONFIG, eval_every=64))
    often.train()
    end = state_of(often)
    never = run_in(tmp_path / "never", dataclasses.replace(CONFIG, eval_every=0))
    never.train()
    assert state_of(never) == end
    without = [[{k: v for k, v in row.items() if k != "eval_return"} for row in rows_of(run)] for run in (often, never)]
    assert without[0] == without[1]


# ------------------------------------------------------------------------------------------------ stopping and resuming


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The end and the metrics of a whole run, by its configuration."""

    @functools.cache
    def end_of(config):
        whole = run_in(tmp_path_factory.mktemp("whole") / "run", config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "plot_learning_curve", lambda *args: None)
            whole.train()
        return state_of(whole), rows_of(whole)

    return end_of


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("frames", [64, 256, 384])
def test_a_killed_run_resumes_to_the_same_end(frames, precision, tmp_path, uninterrupted):
    config = dataclasses.replace(CONFIG, precision=precision, init_scale=64.0, growth_interval=5)
    expected, expected_rows = uninterrupted(config)

    stopped = run_in(tmp_path / "run", config, stop_at(frames + 64, killed))
    with pytest.raises(Killed):
        stopped.train()
    assert len(rows_of(stopped)) == frames // 64 + 1

    resumed = run_in(tmp_path / "run", config)
    torch.manual_seed(123)
    resumed.resume()
    at = resumed.pipeline.frames
    assert at == saved_frames(resumed)[-1] <= frames
    assert [int(row["frames"]) for row in rows_of(resumed)] == list(range(64, at + 1, 64)), "cut back to the checkpoint"
    assert resumed.train() == "total_frames"
    assert state_of(resumed) == expected
    assert rows_of(resumed) == expected_rows
    assert expected_rows[-1]["loss_scale"] != "64" or precision == "bf16"

    other, other_rows = uninterrupted(dataclasses.replace(config, seed=1))
    assert other != expected, "the comparison must be able to fail"
    assert other_rows != expected_rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_collection_with_a_checkpoint(number, tmp_path, uninterrupted):
    expected, expected_rows = uninterrupted(CONFIG)
    before = signal.getsignal(number)
    run = run_in(tmp_path / "run", on_report=stop_at(256, lambda: os.kill(os.getpid(), number)))
    assert run.train() == "signal"
    assert signal.getsignal(number) == before
    assert run.pipeline.frames == 256
    assert saved_frames(run)[-1] == 256
    assert run.folder.curve.exists()
    assert run.summarize("signal")["stopped_by"] == "signal"

    resumed = run_in(tmp_path / "run")
    resumed.resume()
    assert resumed.train() == "total_frames"
    assert state_of(resumed) == expected
    assert rows_of(resumed) == expected_rows


def test_the_second_signal_interrupts_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run = run_in(tmp_path / "run", on_report=stop_at(256, twice))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_run_need_not_be_in_the_main_thread(tmp_path):
    """Handlers can be set there alone; elsewhere signals are left to the program."""
    run, stopped_by = run_in(tmp_path / "run"), []
    thread = threading.Thread(target=lambda: stopped_by.append(run.train()))
    thread.start()
    thread.join()
    assert stopped_by == ["total_frames"]


def test_a_finished_run_resumes_to_nothing_more_and_a_larger_budget_extends_it(tmp_path, uninterrupted):
    run_in(tmp_path / "run").train()
    resumed = run_in(tmp_path / "run")
    before = rows_of(resumed)
    resumed.resume()
    assert resumed.train() == "total_frames"
    assert rows_of(resumed) == before

    longer = run_in(tmp_path / "run", dataclasses.replace(CONFIG, total_frames=64 * 10))
    longer.resume()
    longer.train()
    assert (state_of(longer), rows_of(longer)) == uninterrupted(dataclasses.replace(CONFIG, total_frames=64 * 10))


def test_there_is_nothing_to_resume_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        run_in(tmp_path / "run").resume()


@pytest.mark.parametrize(
    ("name", "value"),
    [("eval_every", -1), ("eval_episodes", 0), ("final_eval_episodes", 0), ("checkpoint_every", 0)],
)
def test_schedules_that_cannot_be_kept_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be >= {0 if name == 'eval_every' else 1}; got {value}"):
        RunSchedule(**{name: value})
