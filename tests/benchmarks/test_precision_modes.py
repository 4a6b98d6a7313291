"""The comparison of precisions as a whole: what is planned, resumed, reported and refused."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import recorder_cost
import torch
from ledger import ROOT, Ledger
from mode_cell import Watch, train
from negative_controls import configured
from precision_modes import Options, cores_of, jobs_of, main, plan
from precision_records import curve_of, seconds_to
from resumable import complete

from fp8rl_torchrl.precision import quantize
from fp8rl_torchrl.recipes import DQNConfig, PPOConfig

SMALL = [
    *("--tasks", "CartPole-v1", "--modes", "fp32", "bf16", "fp16-naive", "--seeds", "2", "--total-frames", "1024"),
    *("--watch.evaluations", "2", "--watch.episodes", "5", "--watch.final-episodes", "5", "--watch.record-every", "8"),
]


@pytest.fixture
def _restored(monkeypatch):
    monkeypatch.setattr(quantize, "scale_for", quantize.scale_for)


def cell(mode, frames=2048):
    config = PPOConfig.for_task("CartPole-v1", seed=1, device="cpu", total_frames=frames, compile="off")
    watch = Watch(evaluations=2, episodes=5, final_episodes=5, record_every=8)
    return train(configured(mode, config).resolved(), mode, watch)


def test_modes_are_interleaved_within_each_seed():
    cells = list(plan(Options(tasks=("CartPole-v1",), modes=("fp32", "fp8", "fp16-naive"), seeds=2)))
    assert [(each.seed, each.mode) for each in cells] == [
        (1000, "fp32"),
        (1000, "fp8"),
        (1000, "fp16-naive"),
        (1001, "fp32"),
        (1001, "fp8"),
        (1001, "fp16-naive"),
    ]


def test_a_width_gives_two_layers_that_are_wide_on_both_sides():
    (config,) = [
        each
        for key, each in plan(Options(tasks=("CartPole-v1",), modes=("fp32", "fp8"), seeds=1, width=256)).items()
        if key.mode == "fp8"
    ]
    assert config.hidden == (256, 256, 256)
    assert config.lr == pytest.approx(1e-3 / 4)


def test_settings_are_those_of_the_usual_recipe():
    """DQN's preset for CartPole-v1 knows nothing of how PPO is trained there, and frames that are asked for win."""
    modes = ("fp32", "fp8")
    (ppo, *_) = plan(Options(tasks=("CartPole-v1",), modes=modes, seeds=1)).values()
    assert (ppo.total_frames, ppo.normalize_observation) == (65_536, False)
    (dqn, *_) = plan(Options(tasks=("CartPole-v1",), recipes=("dqn",), modes=modes, seeds=1)).values()
    preset = DQNConfig.for_task("CartPole-v1")
    assert (dqn.total_frames, dqn.num_envs) == (preset.total_frames, preset.num_envs)
    for width, frames in ((None, 40_960), (256, 24_576)):
        (config, *_) = plan(Options(tasks=("Pendulum-v1",), modes=modes, seeds=1, width=width)).values()
        assert config.total_frames == frames
    (short, *_) = plan(Options(tasks=("Pendulum-v1",), modes=modes, seeds=1, width=256, total_frames=2048)).values()
    assert short.total_frames == 2048


def test_a_record_says_all_about_a_cell():
    record = cell("fp32")
    assert [frames for frames, _ in record["curve"]] == [1024, 2048]
    assert record["diverged"] is None
    assert set(record["seconds"]) == {"env", "policy", "replay", "update", "other", "recorder"}
    # Weights and biases of 4-64-64 and of the heads 64-2 and 64-1, in FP32, and the statistics of 4 observations.
    weights = 4 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2 + 64 + 1
    assert record["memory"]["gradients"] == 4 * weights
    assert record["memory"]["optimizer"] == 2 * 4 * weights + 4  # two moments, and Adam's count
    assert record["memory"]["parameters"] >= 4 * weights
    assert record["memory"]["activations"] > 2 * 256 * 64 * 4  # two layers' outputs of a batch of 256
    assert record["products"] == {"fp32": 1.0}
    assert record["nonfinite"] == []
    assert len(record["numerics"]["values"][0]) == len(record["numerics"]["layers"]) == 4
    json.dumps(record, allow_nan=False)


def test_products_of_fp8_are_told_by_format():
    # 64 · 64 of the 4 · 64 + 64 · 64 + 64 · 2 + 64 · 1 = 4544 multiply-adds a frame, in three products each.
    shares = cell("fp8-tensorwise", 512)["products"]
    assert shares["e4m3"] == pytest.approx(4096 / 4544 / 3)
    assert shares["e5m2×e4m3"] == pytest.approx(2 * 4096 / 4544 / 3)
    assert shares["fp32"] == pytest.approx(192 / 4544)
    assert sum(shares.values()) == pytest.approx(1)


def test_a_naive_fp16_run_goes_wrong():
    record = cell("fp16-naive")
    assert record["skipped_steps"] > 5 or record["diverged"] is not None
    assert record["diagnosis"].startswith("the precision went wrong")
    assert record["nonfinite"]
    assert {event["role"] for event in record["nonfinite"]} <= {"activation", "weight", "output", "gradient"}


@pytest.mark.usefixtures("_restored")
def test_unscaled_fp8_loses_its_gradients():
    record = cell("fp8-unscaled", 1024)
    assert "vanish" in record["diagnosis"]
    assert quantize.scale_for(torch.tensor([3.0, float("inf")]), "e4m3").tolist()[0] == 1.0


def test_the_same_seed_gives_the_same_returns():
    one, other = cell("bf16", 1024), cell("bf16", 1024)
    assert (one["curve"], one["final"]) == (other["curve"], other["final"])


def comparison(out, *words):
    return [sys.executable, str(ROOT / "benchmarks/precision_modes.py"), *SMALL, "--out", str(out), *words]


def results(path):
    """What a comparison found, without what depends on the clock."""
    records = map(json.loads, Path(path).read_text().splitlines())
    kept = ("run", "curve", "final", "diverged", "updates", "skipped_steps", "loss_scale", "numerics", "failure")
    return sorted(json.dumps({name: record[name] for name in kept}) for record in records)


@pytest.mark.slow
def test_a_killed_comparison_equals_an_uninterrupted_one(tmp_path):
    whole = subprocess.run(comparison(tmp_path / "whole"), capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    killed = subprocess.Popen(comparison(tmp_path / "killed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    records = tmp_path / "killed.jsonl"
    while killed.poll() is None and not (records.exists() and records.read_text().count("\n") >= 2):
        pass
    assert killed.poll() is None, "it was done before it could be killed"
    killed.kill()
    killed.communicate()
    before = records.read_text()
    again = comparison(tmp_path / "killed", "--figures", str(tmp_path / "figures"))
    assert subprocess.run(again, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "figures/CartPole-v1_learning_curves.svg").exists()
    assert (tmp_path / "figures/all_tasks_profiles.png").exists()
    assert records.read_text().startswith(before)  # nothing was made twice
    assert results(records) == results(tmp_path / "whole.jsonl")
    drawn = (tmp_path / "killed.svg").read_bytes()
    redrawn = comparison(tmp_path / "killed", "--report")
    assert subprocess.run(redrawn, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "killed.svg").read_bytes() == drawn
    check_page((tmp_path / "whole.html").read_text(), modes=("fp32", "bf16", "fp16-naive"))


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]


def check_page(page, modes):
    seen = Seen()
    seen.feed(page)
    # Self-contained: nothing is loaded from anywhere.
    assert not {"script", "link", "iframe", "img"} & set(seen.tags)
    assert all(link.startswith(("#", "data:")) for link in seen.links)
    assert not re.search(r"@import|url\(\s*['\"]?http", page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    for mode in modes:
        assert f"<b>{mode}</b>" in page
    # The verdict comes before any figure.
    assert page.index("No advice: 2 seeds, and a claim needs 10.") < page.index("<svg")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == seen.tags.count("figure") > 3
    identifiers = [each for each in re.findall(r' id="([^"]+)"', page) if each.startswith(("p", "m"))]
    assert identifiers


def record(curve, **others):
    return {"curve": curve, "frames": 100, "seconds": {"update": 8.0, "env": 2.0, "recorder": 5.0}, **others}


def test_time_to_a_score_is_training_alone():
    """475 is reached at frame 50 of 100, of which all take 10 s."""
    assert seconds_to("CartPole-v1", record([[25, 22.0], [50, 475.0], [100, 475.0]]), 1.0) == 5.0
    assert seconds_to("CartPole-v1", record([[25, 22.0], [50, None]]), 1.0) is None
    assert curve_of("CartPole-v1", record([[25, 475.0], [50, None]])) == ([25, 50], [1.0, 0.0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modes", "fp32"], "at least two different ones"),
        (["--modes", "fp32", "fp32"], "at least two different ones"),
        (["--modes", "fp16-naive", "fp32"], "the first of --modes is the reference"),
        (["--modes", "fp32", "banana"], "unknown precision 'banana'"),
        (["--modes", "fp9"], "unknown precision 'fp9'"),
        (["--tasks", "Humanoid-v5"], "it is not known what Humanoid-v5 scores"),
        (["--recipes", "ppo", "dqn", "sac"], "--recipes takes one"),
        (["--recipes", "a2c", "--batch", "64"], "has no --batch"),
        (["--margin", "0"], "margin must be > 0"),
        (["--seeds", "0"], "seeds must be >= 1"),
        (["--watch.record-every", "0"], "record_every must be >= 1; got 0"),
        (["--cores", "4711"], "cores \\[4711\\] cannot be used here"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(words, message, tmp_path, capsys):
    options = words if words[0] == "--tasks" else ["--tasks", "CartPole-v1", *words]
    code = 0
    try:
        code = main([*options, "--out", str(tmp_path / "out")])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    said = capsys.readouterr()
    assert re.search(message, re.sub(r"[│\s]+", " ", said.err + said.out))
    assert list(tmp_path.iterdir()) == []


def test_runs_of_other_settings_are_no_seeds(tmp_path, capsys):
    """What is recorded is a run of 1,024 frames: a report of 2,048 has nothing of it."""
    words = ["--tasks", "CartPole-v1", "--modes", "fp32", "bf16", "--seeds", "1", "--out", str(tmp_path / "out")]
    made = [*jobs_of(Options(tasks=("CartPole-v1",), modes=("fp32", "bf16"), seeds=1, total_frames=1024)).values()]
    ledger = Ledger(tmp_path / "out.jsonl")
    ledger.add(made[0].run, "other code", {"failure": "it was switched off"})
    assert main([*words, "--total-frames", "2048", "--report"]) == 2
    assert "has none of the 2 runs asked for" in capsys.readouterr().err
    assert main([*words, "--total-frames", "1024", "--report"]) == 1
    said = capsys.readouterr().out
    assert "ppo on CartPole-v1: no record of 1 of 2 runs" in said
    assert "ppo on CartPole-v1 in fp32, seed 1000: failed: it was switched off" in said
    assert "the answer on one page" not in said
    assert [each.name for each in tmp_path.iterdir()] == ["out.jsonl"]
    jobs = {place: replace(job, make=lambda: {"failure": None}) for place, job in enumerate(made)}
    complete(jobs, ledger, {})
    assert "1 of 2 runs are made again: those that are recorded are of other code" in capsys.readouterr().out
    complete(jobs, ledger, {})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("program", [main, recorder_cost.main])
def test_a_folder_that_cannot_be_made_is_refused_by_name(program, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "out"
    assert program(["--out", str(out)]) == 2
    assert f"error: --out {out}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot pin processes")
def test_every_core_is_used_but_a_gpu_is_not_shared():
    usable = sorted(os.sched_getaffinity(0))
    assert cores_of(()) == usable
    assert cores_of((), "cuda") == usable[-1:]
    assert cores_of(usable[:1], "cuda") == usable[:1]
