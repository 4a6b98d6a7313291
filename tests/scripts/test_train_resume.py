"""`train.py --resume`: a run that was stopped, or killed, goes on to the same end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import SCRIPTS, SMALL, call, metrics_without_time, newest, train

from fp8rl_torchrl.data import CollectorState
from fp8rl_torchrl.recipes import ActorCriticConfig, build
from fp8rl_torchrl.training.checkpoint import PipelineCheckpoints
from fp8rl_torchrl.training.metrics import read_metrics
from fp8rl_torchrl.training.run_folder import RunFolder


def test_resume_extends_a_run_exactly(capsys):
    assert call(train, *SMALL, "--total-frames=192", "--run-dir=run", "--precision=fp16") == 0
    assert call(train, "--resume", "run", "--total-frames", "384") == 0
    assert "fresh episodes" not in capsys.readouterr().out
    assert call(train, *SMALL, "--total-frames=384", "--run-dir=whole", "--precision=fp16") == 0
    assert metrics_without_time("run") == metrics_without_time("whole")
    same_end("run", "whole")
    assert RunFolder("run").read_config() == RunFolder("whole").read_config()
    ends = [json.loads(Path(name, "summary.json").read_text()) for name in ("run", "whole")]
    timed = ("train_seconds", "frames_per_second")
    ends = [{key: value for key, value in end.items() if key not in timed} for end in ends]
    assert ends[0] == ends[1]


def test_resume_may_repeat_the_options_of_the_run():
    assert call(train, *SMALL, "--total-frames=128", "--run-dir=run") == 0
    assert call(train, *SMALL, "--total-frames=192", "--resume=run") == 0
    assert len(read_metrics("run/metrics.csv")) == 3


def end_of(folder):
    """All tensors of a run's newest checkpoint, and the counters; how long it took aside."""
    config = ActorCriticConfig.from_dict(RunFolder(folder).read_config())
    pipeline = build(config)
    PipelineCheckpoints(pipeline, CollectorState(pipeline.collector), RunFolder(folder).checkpoints).load_latest()
    step = pipeline.step.state_dict()
    tensors = {
        **pipeline.agent.state_dict(),
        **{f"replay.{k}": v for k, v in pipeline.replay[:].flatten_keys(".").items()},
        **{f"live step.{k}": v for k, v in pipeline.collector._carrier.flatten_keys(".").items()},
        **{f"moments.{i}.{k}": v for i, s in step["optimizers"]["loss"]["state"].items() for k, v in s.items()},
        "random stream": torch.get_rng_state(),
        "recent": pipeline.state_dict()["recent"],
    }
    counters = (pipeline.frames, pipeline.episodes, int(step["updates"]), int(step["skipped_steps"]), step["scalers"])
    return {name: tensor.tolist() for name, tensor in tensors.items()}, counters


def same_end(left, right):
    (left_tensors, left_counters), (right_tensors, right_counters) = end_of(left), end_of(right)
    assert left_counters == right_counters
    assert left_tensors.keys() == right_tensors.keys()
    assert [name for name in left_tensors if left_tensors[name] != right_tensors[name]] == []


def start_training(*argv):
    """A real process in the current folder."""
    return subprocess.Popen(
        # A run without an end would choose to compile, and then round differently from a short one.
        [sys.executable, str(SCRIPTS / "train.py"), *SMALL, "--compile=off", "--collector=torchrl", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_checkpoint(process, folder, frames=1):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        saved = [int(path.name[-12:]) for path in Path(folder).glob("checkpoints/checkpoint-*")]
        if saved and max(saved) >= frames:
            return
        time.sleep(0.01)
    pytest.fail(f"no checkpoint: {process.communicate()[0]}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_with_a_checkpoint_and_exit_code_130(number):
    process = start_training("--total-frames=1000000", "--run-dir=run", "--checkpoint-every=1000000")
    wait_for_checkpoint(process, "run")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "stopped early; continue with: python scripts/train.py --resume run" in output
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["stopped_by"] == "signal"
    frames = summary["frames"]
    assert newest("run").name == f"checkpoint-{frames:012d}"
    assert read_metrics("run/metrics.csv")[-1]["frames"] == frames

    assert call(train, "--resume=run", f"--total-frames={frames + 128}") == 0
    assert call(train, *SMALL, f"--total-frames={frames + 128}", "--run-dir=whole") == 0
    assert metrics_without_time("run") == metrics_without_time("whole")
    same_end("run", "whole")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_end(precision):
    seed = random.SystemRandom().randrange(10**6)
    print(f"moments of death drawn with seed {seed}")
    moments = random.Random(seed)
    options = ["--total-frames=6400", "--checkpoint-every=6", f"--precision={precision}", "--growth-interval=50"]
    process = start_training(*options, "--run-dir=run")
    for _ in range(3):
        saved = [int(path.name[-12:]) for path in Path("run").glob("checkpoints/checkpoint-*")]
        wait_for_checkpoint(process, "run", frames=max(saved, default=0) + 1)
        time.sleep(moments.uniform(0.0, 1.0))
        process.kill()
        if process.wait() == 0:
            break  # it was faster
        left = sorted(path.name for path in Path("run/checkpoints").iterdir())
        print(f"killed with {left} and {len(read_metrics('run/metrics.csv'))} rows")
        process.stdout.close()
        process = start_training(*options, "--resume=run")
    assert process.wait(timeout=300) == 0
    process.stdout.close()

    whole = start_training(*options, "--run-dir=whole")
    assert whole.wait(timeout=300) == 0
    whole.stdout.close()
    assert len(read_metrics("run/metrics.csv")) == 100
    assert metrics_without_time("run") == metrics_without_time("whole")
    same_end("run", "whole")
    assert not [path for path in Path("run/checkpoints").iterdir() if path.name.startswith(".")]
