"""``gpu.sh``: it refuses where there is no GPU, and tries itself on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"


def call(*argv, **environment):
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", str(SCRIPT), *argv], capture_output=True, text=True, env=env)


def test_it_says_how_it_is_called():
    process = call()
    assert process.returncode == 2
    assert process.stderr == "usage: bash benchmarks/gpu.sh OUT\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_it_refuses_where_there_is_no_gpu(tmp_path):
    process = call("out")
    assert process.returncode == 2
    assert "sees no CUDA device" in process.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_it_leaves_its_records_also_when_something_fails(tmp_path, fails):
    small = "--widths 16 --batches 16 --repeats 2"
    linear = f"{small} --modes bf16 {'banana' if fails else 'fp8'} --profile 16 16"
    others = {
        "WIDE": "--width 16 --layers 1 --batch 32 --repeats 1 --seconds 0.01 --modes fp32 --no-compile",
        "ENVS": "--num-envs 8 --ways rollout --repeats 1 --seconds 0.01",
        "TRAIN": "--num-envs 8 --widths 16 --precisions fp32 --no-compile --repeats 1 --seconds 0.01",
    }
    process = call("out", DEVICE="cpu", LINEAR=linear, ENSEMBLE=f"{small} --sizes 2 --modes fp8", **others)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    always = {"log.txt", "junit.xml", "ensemble.jsonl", "ensemble.png", "wide_update.jsonl", "env_throughput.jsonl"}
    always |= {"train_throughput.jsonl", "train_throughput.png"}
    of_linear = {"linear.jsonl", "linear.png", "linear_profile.txt"}
    assert left == always | (set() if fails else of_linear)
    assert process.returncode == fails, process.stdout + process.stderr
    assert process.stdout.strip().endswith("failed: linear (exit code 2)" if fails else "all passed")
    assert json.loads((tmp_path / "out/ensemble.jsonl").read_text())["mode"] == "fp8"
