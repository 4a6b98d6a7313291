"""Frames to a threshold, ours beside Stable-Baselines3's: what is compared, and what the table says."""

import json
import math
import re
from pathlib import Path

import imageio.v3 as imageio
import judged_run
import pytest
import sample_efficiency
import sb3_tuned
from sample_efficiency import EVERY, Options, Run, jobs_of
from sample_efficiency_report import complaints, frames_to_threshold, plot, rate, table

from fp8rl_torchrl.recipes import PPOConfig

TASK = "CartPole-v1"


def solved(frames, rate=1000.0):
    evaluations = [[frames // 2, 10.0, 0.5], [frames, 500.0, 1.0]]
    return {"failure": None, "evaluations": evaluations, "passed": True, "frames": frames, "seconds": frames / rate}


def unsolved(frames=100_000):
    return solved(frames) | {"passed": False}


def records_of(ours, sb3, recipe="ppo"):
    return {
        Run(recipe, TASK, library, seed, 475.0): record
        for library, each in (("ours", ours), ("sb3", sb3))
        for seed, record in enumerate(each)
    }


# ---------------------------------------------------------------------------------------------------- what is compared


def test_every_pair_that_is_compared_and_how():
    assert set(sb3_tuned.SETTINGS) == {
        *((recipe, TASK) for recipe in ("ppo", "a2c", "dqn")),
        *((recipe, "Acrobot-v1") for recipe in ("ppo", "dqn")),
        *((recipe, "Pendulum-v1") for recipe in ("ppo", "sac", "td3")),
        *((recipe, "MountainCarContinuous-v0") for recipe in ("ppo", "sac")),
        *((recipe, "LunarLander-v3") for recipe in ("ppo", "dqn")),
    }
    assert all(task in EVERY and "n_timesteps" in settings for (_, task), settings in sb3_tuned.SETTINGS.items())
    jobs = jobs_of(Options(recipes=("ppo",), tasks=(TASK,), seeds=2, first_seed=3))
    assert [(run.library, run.seed, run.threshold) for run in jobs] == [
        ("ours", 3, 475.0), ("sb3", 3, 475.0), ("ours", 4, 475.0), ("sb3", 4, 475.0),
    ]  # fmt: skip
    ours, theirs = (job.run for job in list(jobs.values())[:2])
    assert ours["exam"] == theirs["exam"] == {
        "every": 1000, "episodes": 20, "threshold": 475.0, "final_episodes": 0, "seed": 1_000_003,
    }  # fmt: skip
    assert ours["config"] == PPOConfig.for_task(TASK, seed=3, device="cpu").resolved().to_dict()
    assert theirs["settings"]["n_steps"] == 32
    assert theirs["stable_baselines3"]


def test_theirs_is_not_trained_again_where_only_ours_has_changed(monkeypatch):
    def codes():
        return [job.code for job in jobs_of(Options(recipes=("ppo",), tasks=(TASK,), seeds=1)).values()]

    before = codes()
    files = [file for file in sample_efficiency.package_files() if file.name != "ppo.py"]
    monkeypatch.setattr(sample_efficiency, "package_files", lambda: files)
    ours, theirs = codes()
    assert ours != before[0]
    assert theirs == before[1]
    judges = [file for file in files if file.parts[-2:] != ("training", "evaluate.py")]
    monkeypatch.setattr(sample_efficiency, "package_files", lambda: judges)
    assert codes()[1] != theirs, "it is, where the judge has"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"libraries": ("rllib",)}, "libraries takes some of ours, sb3; got rllib"),
        ({"libraries": ()}, "got none"),
        ({"recipes": ("reinforce",)}, "the table has no recipe reinforce"),
        ({"every": 0}, "episodes and every must be >= 1"),
        ({"episodes": 0}, "episodes and every must be >= 1"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        jobs_of(Options(**options))


def test_without_the_other_library_it_says_what_to_install(monkeypatch, capsys):
    def version(name):
        raise sample_efficiency.PackageNotFoundError(name)

    monkeypatch.setattr(sample_efficiency, "version", version)
    assert sample_efficiency.main(["--recipes", "ppo", "--tasks", TASK]) == 2
    assert "pip install stable-baselines3" in capsys.readouterr().err
    assert jobs_of(Options(recipes=("ppo",), tasks=(TASK,), libraries=("ours",))), "ours alone needs it not"


# ------------------------------------------------------------------------------------------------------- what it says


def test_frames_are_those_of_the_first_evaluation_that_reached_the_threshold():
    assert frames_to_threshold(solved(4000)) == 4000
    assert math.isinf(frames_to_threshold(unsolved()))
    assert rate([solved(100, 50.0), solved(100, 10.0), solved(100, 30.0)]) == pytest.approx(30.0)


def test_rows_by_hand():
    records = records_of(
        [solved(4000, 2000.0), solved(6000, 3000.0), unsolved()],
        [solved(9000), unsolved(), unsolved()],
    )
    _, ours, theirs = (re.split(r"  +", line.strip()) for line in table(records).splitlines())
    assert ours == ["ppo", TASK, "475", "ours", "6,000 (4,000 to never)", "2 of 3", "2,000", "2.0"]
    assert theirs == ["ppo", TASK, "475", "sb3", "never (9,000 to never)", "1 of 3", "1,000", "100.0"]
    assert table(records, as_markdown=True).splitlines()[2] == "| " + " | ".join(ours) + " |"
    assert complaints(records) == []


def test_what_is_worse_is_told():
    slower = records_of([solved(4000, 900.0)], [solved(9000)])
    assert complaints(slower) == [f"ppo on {TASK}: ours trains 900 frames/s, Stable-Baselines3 1,000"]
    less_efficient = records_of([solved(9001, 2000.0)], [solved(9000)])
    assert complaints(less_efficient) == [
        f"ppo on {TASK}: ours needs 9,001 frames, Stable-Baselines3 9,000 frames",
    ]
    assert complaints(records_of([solved(9000, 2000.0)], [solved(9000)])) == [], "no worse"
    neither = records_of([solved(9000, 2000.0) | {"passed": False}], [unsolved()])
    (said,) = complaints(neither)
    assert "ours needs more frames than it was given" in said
    gone = records_of([None, {"failure": "out of memory"}], [solved(1), solved(1)])
    assert complaints(gone) == [
        f"ours ppo on {TASK}, seed 0: not run",
        f"ours ppo on {TASK}, seed 1: failed: out of memory",
    ]
    assert "0 of 2" in table(gone)


def test_the_picture(tmp_path):
    records = records_of([solved(4000), solved(5000)], [solved(9000), unsolved()])
    records |= {Run("dqn", "Acrobot-v1", "ours", 0, -100.0): solved(100)}
    plot(records, tmp_path / "frames.png")
    assert imageio.imread(tmp_path / "frames.png").std() > 5
    plot(records_of([None], [None]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_comparison_goes_on_where_it_stopped(monkeypatch, capsys):
    made = []

    def ours(config, exam, core, limit):
        made.append(("ours", config.seed))
        return solved(3000, 5000.0)

    def theirs(words, core, limit):
        job = json.loads(words[2])
        made.append(("sb3", job["seed"]))
        if made.count(("sb3", 1)) == 1 and job["seed"] == 1:
            raise KeyboardInterrupt
        return solved(4000)

    monkeypatch.setattr(judged_run, "run", ours)
    monkeypatch.setattr(sample_efficiency, "take_turn", theirs)
    arguments = ["--recipes", "ppo", "--tasks", TASK, "--seeds", "2", "--first-seed", "0", "--out", "out/frames"]
    assert sample_efficiency.main(arguments) == 130
    assert "sb3 ppo on CartPole-v1, seed 1: not run" in capsys.readouterr().out
    assert sample_efficiency.main(arguments) == 0
    assert made == [("ours", 0), ("sb3", 0), ("ours", 1), ("sb3", 1), ("sb3", 1)]
    assert "ours needs no more frames" in capsys.readouterr().out
    assert len(Path("out/frames.jsonl").read_text().splitlines()) == 4
    assert sample_efficiency.main([*arguments, "--report", "--markdown"]) == 0
    assert len(made) == 5
    assert "| ppo | CartPole-v1 | 475 | ours | 3,000 (3,000 to 3,000) | 2 of 2 |" in capsys.readouterr().out
