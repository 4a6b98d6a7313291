"""`Run`: the best evaluated policy is kept, and a run stops where an evaluation reaches its target."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch
from small_runs import CONFIG, Killed, killed, rows_of, run_in, saved_frames, state_of, stop_at
from torchrl.checkpoint import Checkpoint

from fp8rl_torchrl.recipes import build
from fp8rl_torchrl.training import run as run_module
from fp8rl_torchrl.training.checkpoint import BestPolicy, CheckpointError, best_checkpoint, load_agent
from fp8rl_torchrl.training.evaluate import EvalResult
from fp8rl_torchrl.training.run import RunSchedule

EVERY = dataclasses.replace(CONFIG, eval_every=64)
"""Eight collections of 64 frames, and an evaluation after each."""


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr(run_module, "plot_learning_curve", lambda rows, title, path: path.write_text(title))


def scripted(run, returns, networks=None):
    """Let the periodic evaluations find these returns, and note the networks that each of them saw."""
    following = iter(returns)

    def evaluate(episodes):
        if networks is not None:
            networks[run.pipeline.frames] = numbers(run.pipeline.agent)
        return EvalResult(returns=(next(following),), lengths=(1,))

    run.evaluate = evaluate
    return run


def numbers(agent):
    return {name: value.tolist() for name, value in agent.state_dict().items()}


def kept(run):
    return [int(path.name.removeprefix("checkpoint-")) for path in sorted(run.folder.best.iterdir())]


def test_the_best_policy_is_kept_and_a_tie_is_no_improvement(tmp_path):
    networks = {}
    run = scripted(run_in(tmp_path / "run", EVERY), [1.0, 5.0, 5.0, 3.0, 7.0, 7.0, 2.0, math.nan, 4.0], networks)
    assert run.train() == "total_frames"
    # The best is from the fifth evaluation, at 320 frames; the one that it replaced, at 128, stays beside it.
    assert kept(run) == [128, 320]
    best = best_checkpoint(run.folder.best)
    assert Checkpoint.manifest(best)["metadata"] == {"eval_return": 7.0, "frames": 320}
    assert list(Checkpoint.manifest(best)["components"]) == ["agent"]

    agent = build(dataclasses.replace(EVERY, seed=9)).agent
    load_agent(agent, best, "cpu")
    assert numbers(agent) == networks[320]
    assert numbers(run.pipeline.agent) == networks[512] != networks[320], "the run itself goes on from its own"

    summary = run.summarize("total_frames")
    assert (summary["best_eval_return"], summary["best_frames"]) == (7.0, 320)
    assert summary["eval_return_mean"] == 4.0, "the final policy is another, and is what the summary is about"
    assert json.loads(run.folder.summary.read_text()) == summary


@pytest.mark.parametrize("never", [math.nan, math.inf, -math.inf])
def test_a_return_that_is_not_finite_is_never_the_best(never, tmp_path):
    best = BestPolicy(torch.nn.Linear(1, 1), tmp_path / "best")
    assert not best.offer(never, 64)
    assert (best.eval_return, best.frames) == (None, None)
    assert best.offer(-1e9, 128), "the first one beats nothing but is the best so far"
    assert not best.offer(never, 192)
    assert (best.eval_return, best.frames) == (-1e9, 128)


def test_without_periodic_evaluations_there_is_no_best(tmp_path):
    run = run_in(tmp_path / "run", dataclasses.replace(CONFIG, eval_every=0))
    summary = run.summarize(run.train())
    assert (summary["best_eval_return"], summary["best_frames"]) == (None, None)
    assert not run.folder.best.exists()
    with pytest.raises(CheckpointError, match=r"there is no best policy in .*best: one is kept at the first periodic"):
        best_checkpoint(run.folder.best)


def test_a_run_is_the_same_whether_or_not_its_best_is_kept(tmp_path):
    keeping = scripted(run_in(tmp_path / "keeping", EVERY), range(8))
    keeping.train()
    end = state_of(keeping)
    assert keeping.best.frames == 512, "each was kept"

    not_keeping = scripted(run_in(tmp_path / "not", EVERY), range(8))
    not_keeping.best.offer = lambda eval_return, frames: False
    not_keeping.train()
    assert state_of(not_keeping) == end
    assert rows_of(not_keeping) == rows_of(keeping)

    drawing = scripted(run_in(tmp_path / "drawing", EVERY), range(8))
    drawing.best.offer = lambda eval_return, frames: bool(torch.rand(()) > 2)
    drawing.train()
    assert state_of(drawing) != end, "the comparison must be able to fail"


# ------------------------------------------------------------------------------------------------------------ resuming


def test_what_is_kept_is_never_ahead_of_the_newest_checkpoint(tmp_path):
    """Neither a kill nor a resumed run that takes another course can lose it."""
    rarely = dataclasses.replace(EVERY, checkpoint_every=10**6)
    run = scripted(run_in(tmp_path / "run", rarely, stop_at(384, killed)), [0.0, 1.0, 5.0, 4.0, 3.0, 2.0])
    with pytest.raises(Killed):
        run.train()
    assert saved_frames(run) == [128, 192], "after the first collection, and with each improvement"

    resumed = scripted(run_in(tmp_path / "run", rarely), [4.5] * 5)
    resumed.resume()
    assert (resumed.pipeline.frames, resumed.best.eval_return, resumed.best.frames) == (192, 5.0, 192)
    resumed.train()
    assert (resumed.best.eval_return, resumed.best.frames) == (5.0, 192), "4.5 is worse, so it stays"


def test_a_run_killed_between_its_best_and_its_checkpoint_goes_back_to_the_one_before(tmp_path):
    returns = [0.0, 1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0]
    run = scripted(run_in(tmp_path / "run", EVERY, stop_at(320, killed)), returns)
    with pytest.raises(Killed):
        run.train()
    assert (kept(run)[-1], saved_frames(run)[-1]) == (320, 256), "the best is on disk, its checkpoint is not"
    (run.folder.best / ".checkpoint-000000000320.stage-0").mkdir()

    networks = {}
    resumed = scripted(run_in(tmp_path / "run", EVERY), returns[4:], networks)
    assert resumed.best.frames == 320
    resumed.resume()
    assert (resumed.best.eval_return, resumed.best.frames) == (3.0, 256), "as it was when the checkpoint was saved"
    assert kept(resumed) == [256], "nothing of the future is left, nor of a save that was killed"
    resumed.train()
    assert (resumed.best.eval_return, resumed.best.frames) == (9.0, 320), "found again"

    elsewhere = scripted(run_in(tmp_path / "other", EVERY, stop_at(320, killed)), returns)
    with pytest.raises(Killed):
        elsewhere.train()
    again = scripted(run_in(tmp_path / "other", EVERY), [3.5, 4.0, 3.0, 3.0])
    again.resume()
    again.train()
    assert (again.best.eval_return, again.best.frames) == (4.0, 384), "not the 9 of a course that was not taken"


def test_a_resumed_run_ends_with_the_same_best_as_one_that_was_not_stopped(tmp_path):
    whole = run_in(tmp_path / "whole", CONFIG)
    whole.train()
    stopped = run_in(tmp_path / "run", CONFIG, stop_at(320, killed))
    with pytest.raises(Killed):
        stopped.train()
    resumed = run_in(tmp_path / "run", CONFIG)
    resumed.resume()
    resumed.train()
    assert (resumed.best.eval_return, resumed.best.frames) == (whole.best.eval_return, whole.best.frames)
    agents = [build(CONFIG).agent for _ in range(2)]
    for agent, run in zip(agents, (whole, resumed), strict=True):
        load_agent(agent, best_checkpoint(run.folder.best), "cpu")
    assert numbers(agents[0]) == numbers(agents[1])


def test_a_best_without_its_evaluation_is_an_error_that_names_it(tmp_path):
    agent = torch.nn.Linear(1, 1)
    Checkpoint(agent=agent).save(tmp_path / "checkpoint-000000000064")
    with pytest.raises(CheckpointError, match=r"checkpoint-000000000064 says nothing of its evaluation"):
        BestPolicy(agent, tmp_path)


# -------------------------------------------------------------------------------------------------------------- targets


def target(value, config=EVERY):
    return dataclasses.replace(config, target_return=value)


def test_a_run_stops_at_its_target_with_a_checkpoint(tmp_path):
    run = scripted(run_in(tmp_path / "run", target(5.0)), [1.0, 4.99, 5.0, 3.0])
    assert run.train() == "target_return"
    assert run.pipeline.frames == 192
    assert saved_frames(run)[-1] == 192
    assert kept(run)[-1] == 192
    summary = run.summarize("target_return")
    assert (summary["stopped_by"], summary["best_eval_return"], summary["best_frames"]) == ("target_return", 5.0, 192)


def test_a_target_that_is_not_reached_changes_nothing(tmp_path):
    with_target = run_in(tmp_path / "with", target(1e6, CONFIG))
    assert with_target.train() == "total_frames"
    end, rows = state_of(with_target), rows_of(with_target)
    without = run_in(tmp_path / "without", CONFIG)
    assert without.train() == "total_frames"
    assert (state_of(without), rows_of(without)) == (end, rows)


def test_the_target_counts_also_where_the_budget_is_spent(tmp_path):
    run = scripted(run_in(tmp_path / "run", target(5.0)), [0.0] * 7 + [5.0])
    assert run.train() == "target_return"
    assert run.pipeline.finished


def test_a_signal_is_told_before_the_target(tmp_path):
    """So that a program that was stopped by Ctrl-C ends as one."""
    interrupt = stop_at(192, lambda: os.kill(os.getpid(), signal.SIGINT))
    run = scripted(run_in(tmp_path / "run", target(5.0), interrupt), [1.0, 2.0, 6.0])
    assert run.train() == "signal"


def test_a_run_that_has_reached_its_target_goes_on_only_with_a_higher_one(tmp_path):
    run = scripted(run_in(tmp_path / "run", target(5.0)), [1.0, 6.0])
    run.train()
    rows, longer = rows_of(run), dataclasses.replace(EVERY, total_frames=64 * 20)
    resumed = run_in(tmp_path / "run", target(5.0, longer))
    resumed.resume()
    assert resumed.target_reached
    assert resumed.train() == "target_return"
    assert rows_of(resumed) == rows, "also with frames left: its target is what it was for"

    higher = scripted(run_in(tmp_path / "run", target(6.5)), [6.2, 7.0])
    higher.resume()
    assert not higher.target_reached
    assert higher.train() == "target_return"
    assert higher.pipeline.frames == 256

    without = scripted(run_in(tmp_path / "run", EVERY), [0.0] * 4)
    without.resume()
    assert without.train() == "total_frames"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_return": 5.0, "eval_every": 0}, "periodic evaluations, and eval_every=0 makes none"),
        ({"target_return": math.nan}, "target_return must be a finite number; got nan"),
        ({"target_return": math.inf}, "target_return must be a finite number; got inf"),
    ],
)
def test_targets_that_nothing_can_reach_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RunSchedule(**options)
    assert RunSchedule(target_return=-100.0).target_return == -100.0
