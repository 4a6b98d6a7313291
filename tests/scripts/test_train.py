"""`train.py`: what it writes and what it prints."""

import json
import math
import re
from pathlib import Path

import imageio.v3 as imageio
from programs import SMALL, call, metrics_without_time, newest, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchrl.checkpoint import Checkpoint

from fp8rl_torchrl.recipes import ActorCriticConfig
from fp8rl_torchrl.training.loop import Report
from fp8rl_torchrl.training.metrics import read_metrics


def test_train_writes_the_run_folder(capsys):
    assert call(train, *SMALL, "--episodes=4", "--report-every=2", "--run-dir=run", "--precision=fp16") == 0
    run = Path("run")
    assert sorted(path.name for path in run.iterdir()) == [
        "best",
        "checkpoints",
        "config.json",
        "learning_curve.png",
        "metrics.csv",
        "summary.json",
        "tensorboard",
    ]

    written = json.loads((run / "config.json").read_text())
    options = written["config"]
    assert (options["algo"], options["env"], options["precision"]) == ("actor-critic", "CustomEnv", "fp16")
    assert (options["seed"], options["device"], options["num_envs"], options["hidden"]) == (0, "cpu", 4, [8])
    assert {"fp8rl_torchrl", "torch", "torchrl", "tensordict"} <= set(written["made_with"]["versions"])
    assert {"cpu", "cores", "gpus"} <= set(written["made_with"]["hardware"])

    rows = read_metrics(run / "metrics.csv")
    assert {
        "frames",
        "seconds",
        "episode_return",
        "episode_length",
        "eval_return",
        "loss_actor",
        "loss_critic",
        "loss_entropy",
        "grad_norm",
        "skipped_steps",
        "loss_scale",
    } <= set(rows[0])
    assert [row["frames"] for row in rows] == list(range(64, 64 * len(rows) + 1, 64))
    assert rows[-1]["loss_scale"] > 1
    assert math.isfinite(rows[-1]["loss_actor"])

    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= {
        "eval_return_mean",
        "eval_return_std",
        "eval_episodes",
        "frames",
        "updates",
        "train_seconds",
        "frames_per_second",
        "skipped_steps",
        "stopped_by",
    }
    assert (summary["stopped_by"], summary["eval_episodes"]) == ("episodes", 3)
    assert summary["frames"] == rows[-1]["frames"]
    assert summary["updates"] == rows[-1]["updates"]

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss_actor")] == [row["frames"] for row in rows]
    assert imageio.imread(run / "learning_curve.png").std() > 5
    checkpoints = [path.name for path in (run / "checkpoints").iterdir()]
    assert f"checkpoint-{int(rows[-1]['frames']):012d}" in checkpoints

    output = capsys.readouterr()
    assert "CustomEnv, fp16, seed 0 on cpu, run folder run" in output.out
    assert (
        f"{summary['eval_return_mean']:.1f} ± {summary['eval_return_std']:.1f} (mean ± std of 3 episodes)" in output.out
    )
    assert "Traceback" not in output.err


def test_the_average_return_is_printed_every_so_many_episodes(capsys):
    assert call(train, *SMALL, "--episodes=12", "--report-every=4", "--run-dir=run") == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(place for place, line in enumerate(lines) if line.split()[:1] == ["episodes"])
    assert lines[header].split() == ["episodes", "average", "return", "frames", "updates", "skipped"]
    printed = [line.split() for line in lines[header + 1 :] if re.match(r" *\d+ +[\d.]+ +", line)]
    rows = {row["frames"]: row for row in read_metrics("run/metrics.csv")}
    assert [int(line[0]) for line in printed] == [4, 8, 12]
    for _, average, frames, updates, skipped in printed:
        assert 0 < float(average) < 220
        row = rows[int(frames.replace(",", ""))]
        assert int(updates.replace(",", "")) == row["updates"]
        assert int(skipped) == row["skipped_steps"] == 0


def test_each_printed_average_is_that_of_its_own_episodes(capsys):
    config = ActorCriticConfig(episodes=6, report_every=2)
    progress = train.Progress(config)
    # The last episode before the stop returned 5: with the first one after it, 7, it makes the block that ends at 4.
    progress.start_at(frames=30, episodes=3, recent_returns=(1.0, 3.0, 5.0))
    report = Report(
        frames=60, episodes=6, updates=2, seconds=1.0, episode_returns=(7.0, 10.0, 20.0), episode_return=0.0,
        episode_length=0.0, metrics={}, skipped_steps=1,
    )  # fmt: skip
    progress(report)
    progress.bar.close()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert printed == [["4", "6.0", "60", "2", "1"], ["6", "15.0", "60", "2", "1"]]


def test_a_run_of_too_few_episodes_for_a_row_prints_one_all_the_same(capsys):
    assert call(train, *SMALL, "--episodes=3", "--report-every=4", "--run-dir=run") == 0
    output = capsys.readouterr()
    rows = [line.split() for line in output.out.splitlines() if re.match(r" *\d+ +[\d.]+ +", line)]
    assert [row[0] for row in rows] == [str(json.loads(Path("run/summary.json").read_text())["episodes"])]
    assert output.err == "", "no bar where nobody sees it move"


def test_a_budget_is_rounded_up_to_whole_collections_and_says_so(capsys):
    assert call(train, *SMALL, "--total-frames=10", "--frames-per-collection=8", "--run-dir=run") == 0
    assert "trains to 16 frames: in whole collections of 8" in capsys.readouterr().out
    assert json.loads(Path("run/summary.json").read_text())["frames"] == 16


def test_the_default_prints_every_100_episodes():
    config, _ = train.parse([])
    assert config.report_every == 100
    assert config.episodes == 2000
    assert config.precision == "bf16"


def test_without_a_name_the_folder_is_named_by_what_runs():
    assert call(train, *SMALL, "--total-frames=64", "--seed=3", "--precision=fp32", "--env=fp8rl/CustomEnv-v0") == 0
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"actor-critic-fp8rl-CustomEnv-v0-fp32-s3-\d{8}-\d{6}", folder.name)


def test_the_seed_repeats_a_run_from_the_command_line():
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call(train, *SMALL, "--total-frames=192", f"--seed={seed}", f"--run-dir={name}") == 0
    a, b, c = (metrics_without_time(name) for name in "abc")
    assert a == b != c


def test_a_run_stops_at_its_target_and_goes_on_with_a_higher_one(capsys):
    assert call(train, *SMALL, "--total-frames=1024", "--target-return=0", "--run-dir=run") == 0
    output = capsys.readouterr().out
    assert "stopped at the target return: an evaluation has reached 0" in output
    summary = json.loads(Path("run/summary.json").read_text())
    # An evaluation every 200 frames: the first report at or after 200 is at 256.
    assert (summary["stopped_by"], summary["frames"], summary["best_frames"]) == ("target_return", 256, 256)
    assert f"{summary['best_eval_return']:.1f} at 256 frames, kept in run/best" in output

    assert call(train, "--resume=run") == 0
    assert "its target return 0 is reached: go on with a higher --target-return, or None" in capsys.readouterr().out
    assert len(read_metrics("run/metrics.csv")) == 4
    assert call(train, "--resume=run", "--target-return=None", "--total-frames=320") == 0
    assert len(read_metrics("run/metrics.csv")) == 5
    assert "target" not in capsys.readouterr().out


def test_a_gymnasium_environment_trains_and_resumes_at_fresh_episodes_and_says_so(capsys):
    assert call(train, *SMALL, "--env=gymnasium:CartPole-v1", "--total-frames=128", "--run-dir=run") == 0
    assert "fresh episodes" not in capsys.readouterr().out
    assert call(train, "--resume=run", "--total-frames=256") == 0
    expected = "gymnasium:CartPole-v1 keeps state that cannot be restored: training resumes at fresh episodes"
    assert expected in capsys.readouterr().out
    assert [row["frames"] for row in read_metrics("run/metrics.csv")] == [64, 128, 192, 256]


def test_checkpoints_are_torchrls():
    """Anyone can read them with TorchRL alone."""
    assert call(train, *SMALL, "--total-frames=64", "--run-dir=run") == 0
    assert set(Checkpoint.manifest(newest("run"))["components"]) == {
        "agent",
        "loss",
        "step",
        "replay",
        "collector",
        "progress",
        "random_streams",
    }
