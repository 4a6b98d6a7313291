"""The conformance checks: each catches its own broken environment, and correct ones raise no alarm."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import broken
import gymnasium
import numpy as np
import pytest
import torch
import walk
from gymnasium.vector import AutoresetMode
from torchrl.envs import (
    ActionMask,
    Compose,
    EnvBase,
    GymEnv,
    GymWrapper,
    PendulumEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.testing.mocking_classes import CountingBatchedEnv, CountingEnv, NestedCountingEnv

from fp8rl_torchrl.envs import ConformanceReport, CustomEnv, EnvConformanceError, check_env
from fp8rl_torchrl.envs._conformance.findings import ADVICE, CHECKS
from fp8rl_torchrl.envs.conformance import main

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parent

STEPS = 40

# What each broken environment fails. Where there is more than one name, the others follow from the first:
# an episode that does not end walks out of its bounds, and a key written into the input is one too many.
FAILS = {
    "WrongSpecBounds": {"specs", "bounds"},
    "CrashesDeep": {"no_crash"},
    "LateKey": {"keys"},
    "MissingKey": {"keys"},
    "MissingReward": {"keys"},
    "WrongShape": {"shape"},
    "LateDtype": {"dtype"},
    "WrongDevice": {"device"},
    "OutOfBounds": {"bounds"},
    "BelowCount": {"bounds"},
    "NanReward": {"finite"},
    "InfiniteReward": {"finite"},
    "CarriesGraph": {"detached"},
    "TerminatedNotDone": {"done_flags", "bounds"},
    "DoneWithoutCause": {"done_flags"},
    "StillDone": {"reset_clears_done"},
    "KeepsCount": {"fresh_episode"},
    "KeepsHiddenCount": {"fresh_episode"},
    "KeepsPosition": {"fresh_episode"},
    "KeepsVelocity": {"fresh_episode"},
    "IgnoresSeed": {"reset_seed"},
    "CountsEpisodes": {"reset_seed"},
    "ConstantSeed": {"seeds_differ"},
    "ConstantNoiseSeed": {"seeds_differ"},
    "UnseededNoise": {"repeatable"},
    "OwnUnseededNoise": {"repeatable"},
    "AliasedObservation": {"aliasing"},
    "AliasedReward": {"aliasing"},
    "InPlace": {"aliasing"},
    "WritesInput": {"input_unchanged", "keys"},
    "WritesAction": {"action_unchanged"},
    "RejectsAction": {"action_accepted"},
    "NeedsMoreThanMask": {"reset_mask_only"},
    "ResetsAll": {"partial_reset_isolated"},
    "ResetsNone": {"partial_reset_applied", "bounds"},
    "ResetsForShow": {"partial_reset_applied", "bounds"},
    "HiddenState": {"stateless"},
    "SharedState": {"instances"},
}


def failures(env: object, **options: int) -> dict[str, tuple[str, ...]]:
    try:
        check_env(env, **{"max_steps": STEPS, **options})  # pyright: ignore[reportArgumentType]
    except EnvConformanceError as error:
        return error.report.failed
    return {}


def vector(name: str, num_envs: int) -> EnvBase:
    envs = gymnasium.make_vec(
        name,
        num_envs=num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED},
    )
    return GymWrapper(envs, categorical_action_encoding=True)


@pytest.mark.parametrize("name", FAILS)
def test_a_broken_environment_fails_its_check(name: str) -> None:
    found = failures(getattr(broken, name))
    assert set(found) == FAILS[name], found


def test_every_check_has_a_broken_environment_of_its_own_and_advice() -> None:
    caught = {name for names in FAILS.values() for name in names}
    assert caught == set(CHECKS) == set(ADVICE)


@pytest.mark.parametrize("rows", [3, None])
@pytest.mark.parametrize("name", ["Walk", "NoisyWalk", "GlobalWalk", "FixedWalk", "CarriedWalk", "CountingWalk"])
def test_the_correct_twins_pass(name: str, rows: int | None) -> None:
    report = check_env(lambda: getattr(walk, name)(rows), max_steps=STEPS)
    expected = set()
    if name == "FixedWalk":
        expected.add("seeds_differ")
    if name != "CarriedWalk":
        expected.add("stateless")
    if rows is None:
        expected |= {"partial_reset_isolated", "partial_reset_applied"}
    assert set(report.not_reached) == expected


@pytest.mark.parametrize(
    "name", ["WrongShape", "OutOfBounds", "KeepsVelocity", "IgnoresSeed", "UnseededNoise", "InPlace", "RejectsAction"]
)
def test_an_instance_without_a_batch_is_checked_as_well(name: str) -> None:
    assert set(failures(getattr(broken, name)(None))) == FAILS[name]


def test_all_failures_are_listed_with_what_was_seen_and_what_to_do() -> None:
    with pytest.raises(EnvConformanceError) as caught:
        check_env(broken.BrokenInThreeWays(), max_steps=STEPS)
    text = str(caught.value)
    assert isinstance(caught.value, AssertionError)
    assert set(caught.value.report.failed) == {"dtype", "finite", "no_crash"}
    assert "ZeroDivisionError: float division by zero at step 11 of a run with seed 0" in text
    assert "'reward' (next) element [" in text
    assert "'position' (root), after reset() with seed 0, is torch.float64; its spec says torch.float32" in text
    assert all(ADVICE[name] in text for name in ("dtype", "finite", "no_crash"))


def test_the_report_prints_an_aligned_table() -> None:
    report = check_env(walk.Walk(), max_steps=STEPS)
    assert isinstance(report, ConformanceReport)
    assert report.ok
    lines = str(report).splitlines()
    assert len(lines) == len(CHECKS) + 2
    assert len({line.index(status) for line, status in zip(lines[1:-1], _statuses(report), strict=True)}) == 1
    assert lines[-1] == f"{len(CHECKS) - 2} passed, 0 failed, 2 not reached"
    assert report["instances"].status == "not reached"
    with pytest.raises(KeyError, match="there is no check 'spelling'"):
        report["spelling"]


def _statuses(report: ConformanceReport) -> list[str]:
    return [result.status for result in report.results]


def test_no_episode_end_is_said_not_hidden() -> None:
    report = check_env(PendulumEnv(), max_steps=20)
    assert report.episodes == 0
    assert "no episode ended" in report.not_reached["fresh_episode"]


def test_the_callers_random_streams_and_modes_are_left_alone() -> None:
    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002

    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    expected = draws()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    with torch.no_grad():
        check_env(walk.GlobalWalk, max_steps=20)
        assert not torch.is_grad_enabled()
    assert draws() == expected


def test_the_environment_is_left_reset_under_the_seed() -> None:
    env, fresh = walk.Walk(), walk.Walk()
    check_env(env, seed=3, max_steps=20)
    fresh.set_seed(3)
    fresh.reset()
    assert torch.equal(env.position, fresh.position)
    assert not env._allow_done_after_reset


def test_the_same_seed_gives_the_same_report() -> None:
    first, second = (str(check_env(walk.NoisyWalk, seed=1, max_steps=30)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("env", [3, lambda: 3])
def test_what_is_no_environment_is_refused(env: object) -> None:
    with pytest.raises(TypeError, match="int"):
        check_env(env)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_steps"):
        check_env(walk.Walk, max_steps=0)


FAST_CONFORMING = {
    "PendulumEnv": PendulumEnv,
    "CartPole, one-hot": lambda: GymEnv("CartPole-v1"),
    "CartPole, vector": lambda: vector("CartPole-v1", 3),
    "CustomEnv": CustomEnv,
    "CustomEnv, 8": lambda: CustomEnv(8),
    "FrozenLake": lambda: GymEnv("FrozenLake-v1"),
    "masked actions": lambda: TransformedEnv(walk.MaskedWalk(), ActionMask()),
    "CountingEnv": lambda: CountingEnv(max_steps=5),
}
CONFORMING = {
    "CustomEnv, 1": lambda: CustomEnv(1),
    "CustomEnv, 64": lambda: CustomEnv(64),
    "CartPole, transformed": lambda: TransformedEnv(
        GymEnv("CartPole-v1", categorical_action_encoding=True), Compose(RewardSum(), StepCounter())
    ),
    "CartPole, transformed vector": lambda: TransformedEnv(
        vector("CartPole-v1", 4), Compose(RewardSum(), StepCounter(max_steps=20))
    ),
    "Pendulum": lambda: GymEnv("Pendulum-v1"),
    "PendulumEnv, limited": lambda: TransformedEnv(PendulumEnv(), StepCounter(max_steps=50)),
    "MountainCarContinuous": lambda: GymEnv("MountainCarContinuous-v0"),
    "Acrobot": lambda: GymEnv("Acrobot-v1"),
    "Taxi": lambda: GymEnv("Taxi-v4"),
    "FrozenLake, vector": lambda: vector("FrozenLake-v1", 3),
    "FrozenLake, not slippery": lambda: GymEnv("FrozenLake-v1", is_slippery=False),
    "SerialEnv": lambda: SerialEnv(2, lambda: GymEnv("CartPole-v1")),
    "SerialEnv, transformed": lambda: TransformedEnv(
        SerialEnv(3, lambda: GymEnv("Pendulum-v1")), Compose(StepCounter(max_steps=30), RewardSum())
    ),
    "CountingEnv, batched": lambda: CountingEnv(max_steps=5, batch_size=[4]),
    "CountingBatchedEnv": lambda: CountingBatchedEnv(max_steps=torch.tensor([4, 5]), batch_size=[2]),
    "NestedCountingEnv": NestedCountingEnv,
}


@pytest.mark.parametrize("name", FAST_CONFORMING)
def test_a_conforming_environment_raises_no_alarm(name: str) -> None:
    assert failures(FAST_CONFORMING[name], max_steps=100) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST_CONFORMING, *CONFORMING])
@pytest.mark.parametrize("seed", [0, 1])
def test_conforming_environments_raise_no_alarm_in_long_rollouts(name: str, seed: int) -> None:
    assert failures({**FAST_CONFORMING, **CONFORMING}[name], max_steps=1000, seed=seed) == {}


# --- command line ----------------------------------------------------------------------------------------------------
def test_the_command_line_passes_a_gymnasium_id(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["FrozenLake-v1", "--num-envs", "2", "--max-steps", "50"]) == 0
    out = capsys.readouterr().out
    assert "0 failed" in out
    assert "partial_reset_isolated" in out


def test_the_command_line_fails_a_broken_environment_from_the_current_directory(tmp_path: Path) -> None:
    for name, copy in (("walk", "walk"), ("broken", "mine")):
        (tmp_path / f"{copy}.py").write_text((HERE / f"{name}.py").read_text())
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "check_env.py"), "mine:NanReward", "--max-steps", "40"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert "finite" in result.stdout
    assert "1 failed" in result.stdout
    assert "NanReward fails 1 of" in result.stderr


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:make", "cannot import 'no_such_module'"),
        ("math:no_such_name", "'math' has no attribute 'no_such_name'"),
        ("math:pi", "is a float"),
        ("builtins:dict", "it returned dict"),
        ("math:sqrt", "cannot be built"),
        ("NoSuchEnv-v0", "NoSuchEnv"),
    ],
)
def test_bad_input_gives_one_message_and_exit_code_2(
    target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([target]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.slow
def test_python_m_runs_the_same_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fp8rl_torchrl.envs.conformance", "fp8rl/CustomEnv-v0", "--max-steps", "50"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "0 failed" in result.stdout
    assert result.stderr == ""
