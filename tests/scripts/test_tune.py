"""`tune.py`: real searches of small runs, killed ones, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as imageio
import optuna
import pytest
from programs import SCRIPTS, SMALL, call, refused, train, tree, tune

from fp8rl_torchrl.training.run_folder import RunFolder

SEARCH = (
    *SMALL,
    "--total-frames=128",
    "--eval-every=100",
    "--final-eval-episodes=1",
    "--seeds=1",
    "--out=found",
    "--heartbeat=1",
    "--sampler-seed=0",
)
SPACE = ("--space", "lr=log:1e-4:1e-1", "hidden=8,8x4")


def trials(folder="found", name="actor-critic-CustomEnv-return"):
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/study.db").trials


def test_a_search_leaves_the_best_configuration_and_pictures(capsys):
    argv = (*SEARCH, *SPACE, "--trials=3", "--start", "lr=0.1", "hidden=8x4")
    assert call(tune, *argv) == 0
    output = capsys.readouterr().out
    assert "study actor-critic-CustomEnv-return in found: 3 trials of 1 seeds, mean return after training" in output
    done = trials()
    assert [trial.state.name for trial in done] == ["COMPLETE"] * 3
    assert done[0].params == {"lr": 0.1, "hidden": "8x4"}

    best = max(done, key=lambda trial: trial.value)
    written = json.loads(Path("found/best.json").read_text())
    assert written["config"]["lr"] == best.params["lr"]
    assert written["config"]["hidden"] == [int(width) for width in best.params["hidden"].split("x")]
    assert written["config"]["total_frames"] == 128
    found = written["search"]
    assert (found["trial"], found["value"], found["returns"]) == (best.number, best.value, [best.value])
    assert "versions" in written["made_with"]
    assert f"{best.number:>5}  complete  {best.value:>10.6g}  lr={best.params['lr']:.4g}" in output
    assert "3 trials complete, 0 pruned, 0 refused" in output
    for name in ("history", "importance"):
        assert imageio.imread(f"found/{name}.png").std() > 0

    # The same command once more finds nothing left to do.
    assert call(tune, *argv) == 0
    assert [trial.params for trial in trials()] == [trial.params for trial in done]
    assert call(tune, *SEARCH, *SPACE, "--trials=4") == 0
    assert len(trials()) == 4


def test_training_the_best_configuration_gives_its_value():
    assert call(tune, *SEARCH, *SPACE, "--trials=1") == 0
    assert call(train, "--config=found/best.json", "--run-dir=run") == 0
    value = json.loads(Path("found/best.json").read_text())["search"]["value"]
    assert json.loads(Path("run/summary.json").read_text())["eval_return_mean"] == value


def test_a_grid_is_the_product_of_its_choices(capsys):
    assert call(tune, *SEARCH, "--sampler=grid", "--space", "lr=1e-3,1e-2", "hidden=8,4") == 0
    points = sorted((trial.params["lr"], trial.params["hidden"]) for trial in trials())
    assert points == [(1e-3, "4"), (1e-3, "8"), (1e-2, "4"), (1e-2, "8")]


def test_frames_to_a_target_are_minimised():
    # A policy that does anything survives for a step: the target is reached by the first evaluation.
    argv = ("--objective=frames", "--target-return=0.01", "--space", "lr=1e-3,1e-2", "--trials=2")
    assert call(tune, *SEARCH, *argv) == 0
    done = trials(name="actor-critic-CustomEnv-frames")
    assert [trial.value for trial in done] == [128.0, 128.0]  # evaluated every 100 frames, in collections of 64
    written = json.loads(Path("found/best.json").read_text())
    assert written["config"]["target_return"] == 0.01


def test_a_trial_that_misses_the_target_says_so(capsys):
    argv = ("--objective=frames", "--target-return=1e9", "--space", "lr=1e-3,1e-2", "--trials=1", "--seeds=2")
    assert call(tune, *SEARCH, *argv) == 0
    out = capsys.readouterr().out
    assert re.search(r"complete .* lr=\S+  \(2 of 2 seeds missed the target\)", out)
    assert "none reached the target with every seed: the best missed it with 2 of 2" in out


@pytest.mark.parametrize(("missed", "said"), [([1, 2], True), ([1, 0], False)])
def test_that_none_reached_the_target_is_said_only_where_none_did(missed, said, capsys):
    """The best by the mean may have missed it with a seed while a slower one did not."""
    complete = [SimpleNamespace(value=float(place), missed=each) for place, each in enumerate(missed)]
    study = SimpleNamespace(direction=SimpleNamespace(name="MINIMIZE"))
    shared: Any = SimpleNamespace(study=study, trials=lambda state: complete if state == "COMPLETE" else [])
    progress: Any = SimpleNamespace(seeds=3, row=str, missed=lambda trial: trial.missed)
    tune.summarize(shared, progress, Path("found"))
    assert ("none reached the target" in capsys.readouterr().out) == said


def test_a_combination_that_the_recipe_refuses_is_passed_over(capsys):
    # 64 frames cannot be divided among 6 environments, but 96 can.
    space = ("--space", "num-envs=4,6", "frames-per-collection=64,96")
    assert call(tune, *SEARCH, "--replay-size=96", "--sampler=grid", *space) == 0
    done = {(trial.params["num_envs"], trial.params["frames_per_collection"]): trial for trial in trials()}
    assert {point: trial.state.name for point, trial in done.items()} == {
        (4, 64): "COMPLETE",
        (4, 96): "COMPLETE",
        (6, 64): "PRUNED",
        (6, 96): "COMPLETE",
    }
    assert done[6, 64].user_attrs["refused"].startswith("frames_per_collection must be a multiple of num_envs")
    output = capsys.readouterr().out
    assert re.search(r"refused .* num_envs=6  frames_per_collection=64  \(frames_per_collection must be", output)
    assert "3 trials complete, 0 pruned, 1 refused" in output


def test_a_search_without_any_result_says_why(capsys, monkeypatch):
    monkeypatch.setattr(tune, "run_trial", lambda *arguments: 1 / 0)
    assert call(tune, *SEARCH, *SPACE, "--trials=2") == 2
    assert "error: no trial came to its end; the last one: division by zero" in capsys.readouterr().err
    assert not Path("found/best.json").exists()


def test_a_mistake_in_the_code_is_not_taken_for_a_bad_trial(monkeypatch):
    monkeypatch.setattr(tune, "run_trial", lambda *arguments: None.value)
    with pytest.raises(AttributeError):
        call(tune, *SEARCH, *SPACE, "--trials=2")


# --- stopped and killed ---


def start_tuning(*argv):
    return subprocess.Popen(
        [sys.executable, str(SCRIPTS / "tune.py"), *SEARCH, *SPACE, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_trial(process, number):
    """Until a trial runs."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if any(trial.number >= number and trial.params for trial in trials()):
                return
        except Exception:  # noqa: BLE001, S110, RUF100 (the study is being made)
            pass
        time.sleep(0.05)
    pytest.fail(process.communicate()[0])


@pytest.mark.slow
def test_sigterm_ends_with_exit_code_130_and_gives_the_trial_back():
    process = start_tuning("--trials=4", "--total-frames=3200")
    wait_for_trial(process, 1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "stopped early; the same command goes on" in output
    assert json.loads(Path("found/best.json").read_text())["search"]["trial"] == 0
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "FAIL"]
    assert call(tune, *SEARCH, *SPACE, "--trials=3", "--total-frames=3200") == 0
    assert sorted(trial.state.name for trial in trials()) == ["COMPLETE"] * 3 + ["FAIL"]


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_finish_the_study():
    processes = [start_tuning("--trials=5", "--total-frames=1600", f"--sampler-seed={seed}") for seed in (1, 2)]
    wait_for_trial(processes[0], 2)
    processes[0].kill()
    processes[0].communicate()
    output, _ = processes[1].communicate(timeout=240)
    assert processes[1].returncode == 0, output
    done = trials()
    assert sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in done) == 5
    killed = [trial for trial in done if trial.state.name == "FAIL"]
    for trial in killed:
        # Killed before it drew all of its options, it is repeated with those that it had, and others drawn anew.
        repeats = [other.params for other in done if other.user_attrs.get("repeats") == trial.number]
        assert any(trial.params.items() <= params.items() for params in repeats)
    assert not [trial for trial in done if trial.state.name == "RUNNING"]
    assert imageio.imread("found/history.png").std() > 0


# --- what is refused ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to search: name options and their values"),
        (["--space", "lrr=1,2"], "actor-critic has no option 'lrr'; did you mean lr?"),
        (["--space", "lr=1:0.1"], "lr=1:0.1 is no range"),
        (["--space", "hidden=64,0"], "hidden=0 cannot be tried"),
        ([*SPACE, "--start", "lr=1"], "lr=1.0 is not between 0.0001 and 0.1"),
        ([*SPACE, "--start", "gamma=1"], "gamma is not searched"),
        ([*SPACE, "--sampler=grid"], "a grid needs the points of lr"),
        (
            ["--space", "lr=1e-3,1e-2", "--sampler=grid", "--start", "lr=1e-3"],
            "--start does not go with --sampler grid",
        ),
        ([*SPACE, "--sampler=magic"], "invalid choice 'magic'"),
        ([*SPACE, "--trials=0"], "--trials must be >= 1; got 0"),
        ([*SPACE, "--seeds=0"], "--seeds must be >= 1; got 0"),
        ([*SPACE, "--heartbeat=0"], "--heartbeat must be >= 1; got 0"),
        ([*SPACE, "--total-frames=None"], "give --total-frames"),
        ([*SPACE, "--objective=frames"], "give that, too"),
        ([*SPACE, "--env=NoSuchEnv-v0"], "there is no environment 'NoSuchEnv-v0'"),
        ([*SPACE, "--algo=ppo2"], "unknown algo 'ppo2'"),
        ([*SPACE, "--gamma=7"], "gamma must lie in [0, 1]; got 7.0"),
        ([*SPACE, "--storage=study.db"], "--storage takes a database URL"),
        ([*SPACE, "--storage=sqlite:///nowhere/study.db"], "the database sqlite:///nowhere/study.db cannot be opened"),
        ([*SPACE, "--colour=red"], "Unrecognized options: --colour"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_tune_refuses(argv, message, capsys):
    assert message in refused(capsys, tune, *SEARCH, *argv)


def test_tune_refuses_a_folder_of_other_things(capsys):
    Path("found").mkdir()
    Path("found/chapter.txt").write_text("years of work")
    assert "found is not empty, and holds no study" in refused(capsys, tune, *SEARCH, *SPACE)
    assert "found/chapter.txt is a file" in refused(capsys, tune, *SEARCH, *SPACE, "--out=found/chapter.txt")


def test_tune_refuses_to_go_on_with_another_search(capsys):
    assert call(tune, *SEARCH, *SPACE, "--trials=1") == 0
    capsys.readouterr()
    before = tree()
    for argv, names in {
        (*SPACE, "--seeds=2"): "seeds",
        ("--space", "lr=log:1e-5:1e-1", "hidden=8,8x4"): "space",
        (*SPACE, "--gamma=0.5"): "gamma",
    }.items():
        assert call(tune, *SEARCH, *argv, "--trials=2") == 2
        assert f"was started with other values of {names}, so its trials" in capsys.readouterr().err
    assert tree() == before


# --- train.py --config ---


def test_train_starts_from_a_configuration_file():
    assert call(train, *SMALL, "--algo=a2c", "--num-envs=8", "--min-replay=1", "--run-dir=no") != 0  # not its options
    Path("best.json").write_text(json.dumps({"config": {"algo": "a2c", "env": "CartPole-v1", "gamma": 0.5}}))
    config, _ = train.parse(["--config=best.json", "--lr=0.25", "--hidden", "8"])
    assert (config.algo, config.env, config.gamma, config.lr, config.hidden) == ("a2c", "CartPole-v1", 0.5, 0.25, (8,))
    config, _ = train.parse(["--config", "best.json", "--gamma=0.75", "--algo=a2c", "--env=CartPole-v1"])
    assert (config.gamma, config.total_frames) == (0.75, 3_000_000)


def test_a_run_can_be_repeated_from_its_own_configuration(run):
    assert call(train, "--config=run/config.json", "--run-dir=again") == 0
    assert RunFolder("again").read_config() == RunFolder("run").read_config()


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        (None, [], "there is no file best.json to take the configuration from"),
        ("{", [], "best.json cannot be read as a configuration"),
        ("{}", [], "best.json cannot be read as a configuration: 'config'"),
        ("[1]", [], "best.json cannot be read as a configuration"),
        ('{"config": {"algo": "alchemy"}}', [], "unknown algo 'alchemy'"),
        ('{"config": {"learning_rate": 1}}', [], "unknown options learning_rate"),
        ('{"config": {"lr": -1}}', [], "lr must be > 0; got -1"),
        (
            '{"config": {"algo": "a2c"}}',
            ["--algo=ppo"],
            "best.json is a configuration for --algo a2c: leave out --algo",
        ),
        ('{"config": {"env": "CartPole-v1"}}', ["--env=CustomEnv"], "is a configuration for --env CartPole-v1: leave"),
        ('{"config": {}}', ["--resume=run"], "--config does not go with --resume"),
        ('{"config": {}}', ["--gamma=7"], "gamma must lie in [0, 1]"),
    ],
)
def test_train_refuses_a_configuration_file(text, argv, message, capsys):
    if text is not None:
        Path("best.json").write_text(text)
    assert message in refused(capsys, train, "--config=best.json", *argv)
