"""`MountainCarContinuousEnv`: what it does otherwise than `MountainCarEnv`, and the agreement with Gymnasium's own."""

from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
from episode_returns import CRITICAL, gymnasium_returns, native_returns, scaled_distance
from gymnasium_twin import Twin, anywhere, assert_agrees, assert_starts_agree, step_of, visited
from rollouts import always, assert_in_specs, run

from fp8rl_torchrl.envs import check_env
from fp8rl_torchrl.envs.classic_control import MountainCarContinuousDynamics, MountainCarContinuousEnv

RANDOM, SWINGING = 4, 18  # episodes
CAR = Twin(
    id="MountainCarContinuous-v0",
    env=MountainCarContinuousEnv,
    seen=(0, 1),
    near=lambda after, bound: np.abs(after[:, 0] - 0.45) <= bound[0],
)
states = CAR.states


# --- by hand ---


@pytest.mark.parametrize(
    ("physics", "push", "following", "reward", "terminated"),
    [
        # cos(-1.5) = 0.0707372: 0.5 * 0.0015 - 0.0025 * 0.0707372 = 0.0005731570, at a cost of 0.1 * 0.25.
        ([-0.5, 0.0], 0.5, [-0.4994268430, 0.0005731570], -0.025, False),
        # The force of 2 is that of 1, its cost is that of 2.
        ([-0.5, 0.0], 2.0, [-0.4986768430, 0.0013231570], -0.4, False),
        ([-0.5, 0.0], -3.0, [-0.5016768430, -0.0016768430], -0.9, False),
        ([-1.19, -0.05], 0.0, [-1.2, 0.0], 0.0, False),
        # cos(1.32) = 0.2482: 0.44 + 0.02 - 0.0006205 + 0.0015 is beyond 0.45.
        ([0.44, 0.02], 1.0, [0.4608795, 0.0208795], 99.9, True),
        ([0.44, 0.02], 0.0, [0.4593795, 0.0193795], 100.0, True),
    ],
)
def test_one_step_by_hand(physics, push, following, reward, terminated):
    after, observation, paid, ended, truncated = MountainCarContinuousDynamics().step(
        states([physics]), torch.tensor([[push]])
    )
    assert observation[0].tolist() == pytest.approx(following, abs=1e-7)
    assert paid.item() == pytest.approx(reward, rel=1e-6)
    assert after.episode_reward.item() == paid.item()
    assert ended.item() is terminated
    assert not truncated.item()


def test_truncated_at_step_999_and_not_before():
    following = run(MountainCarContinuousEnv(2, seed=0), always(0.5), 1010)["next"]  # too weak to climb
    assert following["truncated"].squeeze(-1).nonzero().tolist() == [[0, 998], [1, 998]]
    assert not following["terminated"].any()
    assert following["episode_reward"][:, 998].flatten().tolist() == pytest.approx([-24.975, -24.975], rel=1e-5)


# --- agreement with Gymnasium, which keeps this state as float32 itself ---


def drive(episode, state, noise):
    """Random pushes beyond the bounds; then the way the car moves, with more or less force, up to the goal."""
    push = noise.uniform(-1.5, 1.5) if episode < RANDOM else np.sign(state[1] + 1e-9) * noise.uniform(0.4, 1.2)
    return np.array([push], dtype=np.float32)


@pytest.fixture(scope="module")
def steps():
    return visited(CAR, drive, RANDOM + SWINGING)


def test_the_episodes_show_all_that_there_is_to_agree_on(steps):
    assert steps.terminated.sum() >= SWINGING - 2
    assert steps.truncated.sum() >= RANDOM - 1
    assert (steps.reward > 98).sum() == steps.terminated.sum()
    assert (steps.after[:, 0] == np.float32(-1.2)).any()
    assert (np.abs(steps.action) > 1).any()


def test_a_step_from_every_state_agrees(steps):
    assert_agrees(CAR, MountainCarContinuousDynamics().step, steps)


def test_a_step_of_the_environment_agrees(steps):
    assert_agrees(CAR, step_of(MountainCarContinuousEnv(len(steps.action), seed=0)), steps)


def test_the_equations_are_gymnasiums_wherever_a_state_may_be():
    """In float64 the difference is Gymnasium's rounding: half an ulp, at most 2^-24 of the scale."""
    everywhere = anywhere(CAR, lambda noise, count: noise.uniform(-1.5, 1.5, (count, 1)).astype(np.float32))
    assert_agrees(CAR, MountainCarContinuousDynamics().step, everywhere, bound=2.0**-23, dtype=torch.float64)
    wrong = MountainCarContinuousDynamics(gravity=0.0025001)
    with pytest.raises(AssertionError):
        assert_agrees(CAR, wrong.step, everywhere, bound=2.0**-23, dtype=torch.float64)


@pytest.mark.slow
def test_a_step_agrees_when_inductor_generates_the_code(steps):
    torch.compiler.reset()
    assert_agrees(CAR, torch.compile(MountainCarContinuousDynamics().step, fullgraph=True), steps)


@dataclass(frozen=True, kw_only=True)
class ClippedCost(MountainCarContinuousDynamics):
    """Pays for the force that was applied."""

    def step(self, state, action):
        return super().step(state, action.clamp(-1, 1))


@dataclass(frozen=True, kw_only=True)
class Unclipped(MountainCarContinuousDynamics):
    """Applies the force that was asked for."""

    def _move(self, state, push):
        return super()._move(state, push * 1.2)


WRONG = {
    "force": MountainCarContinuousDynamics(force=0.0015001),
    "gravity": MountainCarContinuousDynamics(gravity=0.0025001),
    "wall": MountainCarContinuousDynamics(min_position=-1.1999),
    "goal": MountainCarContinuousDynamics(goal_position=0.5),
    "goal velocity": MountainCarContinuousDynamics(goal_velocity=0.05),
    "goal reward": MountainCarContinuousDynamics(goal_reward=100.001),
    "action cost": MountainCarContinuousDynamics(action_cost=0.101),
    "998 steps": MountainCarContinuousDynamics(max_steps=998),
    "cost of the clipped push": ClippedCost(),
    "stronger pushes": Unclipped(),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_task_does_not_agree(name, steps):
    with pytest.raises(AssertionError):
        assert_agrees(CAR, WRONG[name].step, steps)


EPISODES = 250


def swing(observation, noise):
    """The way the car moves, with more or less force; random pushes alone never reach the goal."""
    return (np.sign(observation[:, 1:] + 1e-9) * noise[:, None]).astype(np.float32)


@pytest.fixture(scope="module")
def expected():
    return gymnasium_returns("MountainCarContinuous-v0", swing, EPISODES)


def test_returns_have_the_same_distribution(expected):
    assert expected.min() > 80  # the goal is reached
    env = MountainCarContinuousEnv(3 * EPISODES, seed=0)
    assert scaled_distance(native_returns(env, swing), expected) < CRITICAL


@pytest.mark.parametrize(
    "constants", [{"force": 0.0017}, {"gravity": 0.0023}, {"goal_reward": 99.5}, {"action_cost": 0.12}]
)
def test_returns_of_another_task_have_another_distribution(constants, expected):
    env = MountainCarContinuousEnv(3 * EPISODES, seed=0, **constants)
    assert scaled_distance(native_returns(env, swing), expected) > CRITICAL


def test_starts_have_the_same_distribution():
    assert_starts_agree(CAR, MountainCarContinuousDynamics())


# --- the environment ---


def test_it_passes_every_check():
    assert not check_env(lambda: MountainCarContinuousEnv(3, max_steps=20), max_steps=60).not_reached


@pytest.mark.slow
def test_it_passes_every_check_over_whole_episodes():
    assert not check_env(lambda: MountainCarContinuousEnv(3), max_steps=2000).not_reached


def test_the_specs_are_gymnasiums():
    env, theirs = MountainCarContinuousEnv(), gymnasium.make("MountainCarContinuous-v0")
    seen = env.observation_spec["observation"].space
    assert env.action_spec.shape == theirs.action_space.shape
    assert np.array_equal(env.action_spec.space.low, theirs.action_space.low)
    assert np.array_equal(env.action_spec.space.high, theirs.action_space.high)
    assert np.array_equal(seen.low, theirs.observation_space.low)
    assert np.array_equal(seen.high, theirs.observation_space.high)


def test_values_stay_in_their_specs_even_where_the_constants_are_extreme():
    extreme = ({}, {"force": 1e4}, {"max_speed": 1e3}, {"goal_reward": 0.0}, {"action_cost": 1e3}, {"action_cost": 0.0})
    for constants in extreme:
        env = MountainCarContinuousEnv(4, seed=0, max_steps=50, **constants)
        for policy in (always(-1.0), always(1.0), None):
            assert_in_specs(env, policy, 60)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"force": 0.0}, "force must be > 0"),
        ({"goal_reward": -1.0}, "goal_reward must be >= 0"),
        ({"action_cost": float("nan")}, "every constant must be a finite number"),
        ({"action_cost": -0.1}, "action_cost must be >= 0"),
        ({"goal_velocity": 0.08}, "goal_velocity must be at most max_speed"),
        ({"max_steps": 0}, "max_steps must be an integer >= 1"),
    ],
)
def test_bad_constants_are_refused_by_name(constants, message):
    with pytest.raises(ValueError, match=f"MountainCarContinuousEnv: {message}"):
        MountainCarContinuousEnv(**constants)
