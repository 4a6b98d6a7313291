"""`train.py` in FP8: the conversion is shown and kept, the run goes on where it stopped, and can be evaluated."""

import json
from pathlib import Path

import pytest
from programs import SMALL, call, evaluate, metrics_without_time, refused, train

from fp8rl_torchrl.training.metrics import read_metrics

FP8 = (*SMALL, "--hidden", "32", "32", "--precision=fp8")


@pytest.mark.parametrize("name", ["fp8", "fp8-tensorwise", "fp8-rowwise-gw-hp"])
def test_the_conversion_is_shown_and_kept(name, capsys):
    assert call(train, *FP8, f"--precision={name}", "--total-frames=256", "--run-dir=run") == 0
    output = capsys.readouterr().out
    assert (
        f"{name}, emulated: 1 of 4 linear layers, 86% of their multiply-adds" in output
    )  # 1024 of 64 + 1024 + 64 + 32
    assert output.count("last layer of a network") == 2
    kept = json.loads(Path("run/conversion.json").read_text())
    assert [layer["reason"] is None for layer in kept["layers"]] == [False, True, False, False]
    assert kept["backend"] == "emulated"
    assert kept["fp8_share"] == pytest.approx(1024 / 1184)
    options = json.loads(Path("run/config.json").read_text())["config"]
    assert (options["precision"], options["rollout_precision"]) == (name, name)


def test_without_fp8_there_is_no_conversion(capsys):
    assert call(train, *SMALL, "--total-frames=64", "--run-dir=run") == 0
    assert not Path("run/conversion.json").exists()
    assert "linear layers" not in capsys.readouterr().out
    assert json.loads(Path("run/config.json").read_text())["config"]["rollout_precision"] == "fp32"


def test_the_gap_between_rollout_and_learner_is_logged():
    assert call(train, *FP8, "--total-frames=256", "--run-dir=same") == 0
    assert call(train, *FP8, "--total-frames=256", "--rollout-precision=fp32", "--run-dir=other") == 0
    same, other = (read_metrics(f"{run}/metrics.csv")[-1] for run in ("same", "other"))
    assert same["rollout_ratio_error"] < 1e-6 < other["rollout_ratio_error"] < 0.1
    assert same["rollout_kl"] < 1e-9 < other["rollout_kl"] < 1e-2


@pytest.mark.parametrize("rollout", ["fp8", "fp32"])
def test_a_resumed_run_is_the_same_run(rollout):
    options = (*FP8, f"--rollout-precision={rollout}", "--checkpoint-every=1")
    assert call(train, *options, "--total-frames=512", "--run-dir=whole") == 0
    assert call(train, *options, "--total-frames=256", "--run-dir=parts") == 0
    assert call(train, "--resume=parts", "--total-frames=512") == 0
    assert metrics_without_time("parts") == metrics_without_time("whole")
    whole, parts = (json.loads(Path(run, "summary.json").read_text()) for run in ("whole", "parts"))
    assert whole["eval_return_mean"] == parts["eval_return_mean"]


def test_it_can_be_evaluated(capsys):
    assert call(train, *FP8, "--total-frames=256", "--run-dir=run") == 0
    capsys.readouterr()
    assert call(evaluate, "run", "--episodes=3", "--json", "--device=cpu") == 0
    # The same evaluation as at the end of training, by a process that knows nothing but the run folder.
    mean = json.loads(capsys.readouterr().out)["eval_return_mean"]
    assert mean == json.loads(Path("run/summary.json").read_text())["eval_return_mean"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hidden=8",), "nothing to convert"),
        (("--hidden", "32", "32", "--fp8-skip", "nothing"), "skip='nothing' matches no linear layer; there are"),
        (("--hidden", "32", "32", "--rollout-precision=banana"), "unknown precision 'banana'; use one of"),
        (("--hidden", "32", "32", "--fp8-backend=fast"), "backend must be"),
    ],
)
def test_what_cannot_run_in_fp8_is_refused(options, message, capsys):
    assert message in refused(capsys, train, *SMALL, "--precision=fp8", *options, "--run-dir=run")
