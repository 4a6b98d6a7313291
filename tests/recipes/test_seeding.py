"""One seed for everything random, and the switch for algorithms that repeat bit for bit."""

import os
import random

import numpy as np
import pytest
import torch

from fp8rl_torchrl.recipes import A2CConfig, build
from fp8rl_torchrl.recipes.seeding import seed_everything


@pytest.fixture
def switches(monkeypatch):
    """Whatever a test switches on is off again after it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)  # remembered, and put back by monkeypatch
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    yield lambda: (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def draws():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002


def test_all_global_random_streams_are_seeded():
    seed_everything(3)
    first = draws()
    seed_everything(3)
    assert draws() == first
    seed_everything(4)
    second = draws()
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert draws() != second


def test_deterministic_allows_only_algorithms_that_repeat(switches):
    seed_everything(0, deterministic=True)
    assert switches() == (True, False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    # torch itself is asked: this function has no algorithm that repeats
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)


def test_otherwise_nothing_is_switched(switches):
    seed_everything(0)
    assert switches() == (False, True)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_workspace_that_was_chosen_is_kept(switches, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    seed_everything(0, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_both_draw_the_same_numbers(switches):
    seed_everything(5)
    first = draws()
    seed_everything(5, deterministic=True)
    assert draws() == first


def test_the_option_of_every_recipe_switches_it(switches):
    small = {"num_envs": 2, "frames_per_collection": 16, "total_frames": 32, "hidden": (32, 32), "device": "cpu"}
    list(build(A2CConfig(**small)))
    assert switches() == (False, True)
    *_, report = build(A2CConfig(deterministic=True, precision="fp8", **small))
    assert switches() == (True, False)
    assert report.updates == 2, "everything that a run needs on a CPU has an algorithm that repeats"
