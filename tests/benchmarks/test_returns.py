"""The table of returns: what it asks for, what it says, and that a benchmark that was stopped goes on."""

import dataclasses
import json
import re
from pathlib import Path

import imageio.v3 as imageio
import judged_run
import pytest
import returns
import returns_report
from ledger import digest, package_files
from returns import THRESHOLDS, Options, Run, chosen, plan
from returns_report import complaints, plot, table

from fp8rl_torchrl.recipes import RECIPES, PPOConfig

RESULT = {"failure": None, "frames": 1000, "seconds": 2.0, "compile_seconds": 30.0, "skipped_steps": 1}
TASK = "CartPole-v1"


def result(mean, **others):
    return RESULT | {"return_mean": mean, "return_std": 0.0, "return_min": mean} | others


def run_of(seed, recipe="ppo", task=TASK, precision="fp32", threshold=475.0):
    return Run(recipe, task, precision, seed, threshold, PPOConfig(env=task, precision=precision, seed=seed))


@pytest.fixture
def trained(monkeypatch):
    """No training: what each seed returns is put into a dict; the seeds are noted in the order of their training."""
    seeds = []

    def run(config, exam, core, limit):
        seeds.append(config.seed)
        value = trained_to.get(config.seed, 480.0)
        if isinstance(value, BaseException):
            raise value
        return value if isinstance(value, dict) else result(value)

    trained_to = {}
    monkeypatch.setattr(judged_run, "run", run)
    monkeypatch.setattr(returns, "pinned_core", lambda core: core)
    monkeypatch.setattr(returns_report, "plot", lambda records, path: None)
    return seeds, trained_to


ARGUMENTS = ("--recipes", "ppo", "--tasks", TASK, "--seeds", "3", "--first-seed", "7", "--out", "out/returns")


def recorded():
    return [json.loads(line) for line in Path("out/returns.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------- what is asked for


def test_the_table_is_that_of_the_recipes_and_their_tasks():
    rows = chosen(THRESHOLDS, (), ())
    assert len(rows) == 6 + 2 + 3 + 2 + 2
    assert ("actor-critic", TASK) in rows
    assert ("td3", "Pendulum-v1") in rows
    assert chosen(THRESHOLDS, ("ppo",), ()) == [(r, t) for r, t in rows if r == "ppo"]
    assert chosen(THRESHOLDS, (), (TASK, "Acrobot-v1")) == [(r, t) for r, t in rows if t in (TASK, "Acrobot-v1")]
    assert THRESHOLDS["Pendulum-v1"] == {"ppo": -250.0, "sac": -180.0, "td3": -180.0}


def test_a_run_is_the_preset_on_one_core():
    runs = plan(Options(recipes=("ppo",), tasks=(TASK,), precisions=("preset", "bf16"), seeds=2, first_seed=5))
    assert [(run.precision, run.seed) for run in runs] == [("fp32", 5), ("bf16", 5), ("fp32", 6), ("bf16", 6)]
    preset = RECIPES["ppo"][0].for_task(TASK, seed=5, device="cpu")
    assert runs[0].config == preset.resolved()
    assert runs[1].config == dataclasses.replace(preset, precision="bf16").resolved()
    assert (runs[0].config.device, runs[0].config.num_threads) == ("cpu", 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipes": ("reinforced",)}, "the table has no recipe reinforced; use some of a2c"),
        ({"tasks": ("Pong-v5",)}, "the table has no task Pong-v5"),
        ({"recipes": ("a2c",), "tasks": ("Acrobot-v1",)}, "no row for a2c on Acrobot-v1"),
        ({"recipes": ("ppo",), "tasks": (TASK,), "precisions": ("fp7",)}, "unknown precision 'fp7'"),
        ({"recipes": ("ppo",), "tasks": (TASK,), "precisions": ("preset", "fp32")}, "the same precision twice"),
        ({"seeds": 0}, "seeds must be >= 1"),
        ({"limit": 0.0}, "limit > 0; got 5 and 0"),
        ({"recipes": ("ppo",), "tasks": (TASK,), "episodes": 0}, "episodes must be >= 1; got 0"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        returns.jobs_of(Options(**options))


def test_bad_input_on_the_command_line_writes_nothing(tmp_path, capsys):
    assert returns.main(["--tasks", "Pong-v5", "--out", "out/returns"]) == 2
    assert "no task Pong-v5" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- what it says


def test_a_row_by_hand():
    records = {
        run_of(1): result(500.0, frames=900, seconds=1.0),
        run_of(2): result(480.0, frames=1000, seconds=2.0, skipped_steps=3),
        run_of(3): result(470.0, frames=1200, seconds=4.0),
    }
    header, row = table(records).splitlines()
    assert re.split(r"  +", header.strip())[4:7] == ["return: median (min to max)", "mean, 95 % interval", "frames"]
    cells = re.split(r"  +", row.strip())
    # The mean of three numbers; resamples of three reach both ends with probability 1/27 each.
    assert cells[:6] == ["ppo", TASK, "fp32", "475", "480.0 (470.0 to 500.0)", "483.3 (470.0 to 500.0)"]
    assert cells[6:] == ["1,000", "2.00", "500", "30.0", "5", "2 of 3"]
    markdown = table(records, as_markdown=True).splitlines()
    assert markdown[2] == "| " + " | ".join(cells) + " |"
    assert complaints(records) == [f"ppo on {TASK} in fp32, seed 3: 470.0 is below 475"]


def test_rows_are_apart_and_a_threshold_is_reached_by_equality():
    records = {run_of(1): result(475.0), run_of(1, precision="bf16"): result(474.9), run_of(1, "dqn"): None}
    passed = {tuple(line.split()[:3:2]): line.split()[-3:] for line in table(records).splitlines()[1:]}
    assert passed == {
        ("ppo", "fp32"): ["1", "of", "1"],
        ("ppo", "bf16"): ["0", "of", "1"],
        ("dqn", "fp32"): ["0", "of", "1"],
    }
    assert complaints(records)[1] == f"dqn on {TASK} in fp32, seed 1: not run"


def test_one_of_two_recipes_suffices_where_the_table_says_so():
    car = "MountainCarContinuous-v0"
    well, badly = run_of(1, "sac", car, threshold=90.0), run_of(1, "ppo", car, threshold=90.0)
    assert complaints({well: result(93.0), badly: result(0.0)}) == []
    assert len(complaints({well: result(89.0), badly: result(0.0)})) == 2
    both = {run_of(1, "ppo"): result(500.0), run_of(1, "dqn"): result(0.0)}
    assert len(complaints(both)) == 1, "elsewhere every one must pass"


def test_the_picture(tmp_path):
    records = {
        run_of(1): result(500.0),
        run_of(2): result(450.0),
        run_of(1, task="Acrobot-v1", threshold=-100.0): result(-80.0),
        run_of(1, "dqn"): {"failure": "out of memory"},
    }
    plot(records, tmp_path / "returns.png")
    assert imageio.imread(tmp_path / "returns.png").std() > 5
    plot({run_of(1): None}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists(), "nothing to show"


# ------------------------------------------------------------------------------------------------ training and resuming


def test_every_run_is_recorded_with_all_that_it_depends_on(trained, capsys):
    assert returns.main([*ARGUMENTS]) == 0
    assert "every seed reached its threshold" in capsys.readouterr().out
    first, *_ = records = recorded()
    assert [record["run"]["seed"] for record in records] == [7, 8, 9]
    assert {name: first["run"][name] for name in ("recipe", "task", "precision")} == {
        "recipe": "ppo", "task": TASK, "precision": "fp32",
    }  # fmt: skip
    assert first["run"]["config"]["lr"] == PPOConfig.for_task(TASK).lr
    assert first["run"]["exam"]["final_episodes"] == 100
    assert first["run"]["exam"]["seed"] == 1_000_003
    assert {"return_mean", "return_std", "return_min", "frames", "seconds", "skipped_steps"} <= set(first)
    assert {"code", "commit", "versions", "hardware"} <= set(first)


def test_a_benchmark_that_was_killed_goes_on_where_it_stopped(trained, capsys, monkeypatch):
    seeds, trained_to = trained
    trained_to[8] = KeyboardInterrupt()
    assert returns.main([*ARGUMENTS]) == 130
    output = capsys.readouterr().out
    assert "1 of 3" in output
    assert f"ppo on {TASK} in fp32, seed 9: not run" in output
    assert "the same command goes on from there" in output

    trained_to[8] = 490.0
    assert returns.main([*ARGUMENTS]) == 0
    assert seeds == [7, 8, 8, 9], "the seventh is not trained again"
    assert "3 of 3" in capsys.readouterr().out
    assert returns.main([*ARGUMENTS]) == 0
    assert returns.main([*ARGUMENTS, "--report"]) == 0
    assert len(seeds) == 4

    monkeypatch.setattr(returns, "digest", lambda files: "0ther")
    capsys.readouterr()
    assert returns.main([*ARGUMENTS, "--report"]) == 0
    assert "3 of 3 records are of other code or other settings than the present" in capsys.readouterr().out
    assert returns.main([*ARGUMENTS]) == 0
    assert seeds[4:] == [7, 8, 9], "with other code, everything is measured anew"


def test_a_report_of_nothing_is_refused(trained, capsys):
    seeds, _ = trained
    assert returns.main([*ARGUMENTS, "--report"]) == 2
    captured = capsys.readouterr()
    assert "does not exist, so there are none of the 3 runs asked for; leave out --report to make them" in captured.err
    assert (captured.out, seeds) == ("", [])
    assert not list(Path(ARGUMENTS[-1]).parent.glob("*.png"))


def test_a_run_below_the_threshold_fails_the_table(trained, capsys):
    _, trained_to = trained
    trained_to[8] = 474.9
    assert returns.main([*ARGUMENTS]) == 1
    output = capsys.readouterr().out
    assert f"ppo on {TASK} in fp32, seed 8: 474.9 is below 475" in output
    assert "every seed reached" not in output


def test_a_run_that_fails_is_told_and_tried_again(trained, capsys):
    seeds, trained_to = trained
    trained_to[8] = {"failure": "out of memory"}
    assert returns.main([*ARGUMENTS]) == 1
    assert "seed 8: failed: out of memory" in capsys.readouterr().out
    del trained_to[8]
    assert returns.main([*ARGUMENTS, "--report"]) == 1
    assert returns.main([*ARGUMENTS]) == 0
    assert seeds == [7, 8, 9, 8]


def test_the_whole_way_with_a_tiny_preset(monkeypatch, capsys):
    """Nothing replaced but the preset, which is far too short: it trains, and fails."""
    tiny = {"total_frames": 128, "frames_per_collection": 64, "batch_size": 64, "num_envs": 4, "hidden": (8,)}
    monkeypatch.setitem(PPOConfig.PRESETS, TASK, {**tiny, "precision": "fp32", "collector": "torchrl"})
    arguments = ("--recipes", "ppo", "--tasks", TASK, "--seeds", "1", "--episodes", "3", "--out", "out/returns")
    assert returns.main([*arguments, "--markdown"]) == 1
    (record,) = recorded()
    assert (record["failure"], record["frames"], record["run"]["exam"]["final_episodes"]) == (None, 128, 3)
    assert record["return_min"] <= record["return_mean"] < 475
    assert record["code"] == digest([*package_files(), Path(judged_run.__file__)])
    output = capsys.readouterr().out
    assert f"| ppo | {TASK} | fp32 | 475 | " in output
    assert "0 of 1" in output
    assert imageio.imread("out/returns.png").std() > 3
