"""`MountainCarEnv`: steps by hand, and step for step and return for return Gymnasium's MountainCar-v0."""

import math
from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
from episode_returns import CRITICAL, gymnasium_returns, native_returns, scaled_distance
from gymnasium_twin import Twin, anywhere, assert_agrees, assert_starts_agree, step_of, visited
from rollouts import assert_in_specs, push, run

from fp8rl_torchrl.envs import check_env
from fp8rl_torchrl.envs.classic_control import MountainCarDynamics, MountainCarEnv

RANDOM, SWINGING = 10, 12  # episodes
CAR = Twin(
    id="MountainCar-v0",
    env=MountainCarEnv,
    seen=(0, 1),
    near=lambda after, bound: np.abs(after[:, 0] - 0.5) <= bound[0],
)
states = CAR.states


# --- by hand ---


@pytest.mark.parametrize(
    ("physics", "action", "following", "terminated"),
    [
        # cos(-1.5) = 0.0707372: 0.001 - 0.0025 * 0.0707372 = 0.0008231570; the position moves by the new velocity.
        ([-0.5, 0.0], 2, [-0.4991768430, 0.0008231570], False),
        ([-0.5, 0.0], 1, [-0.5001768430, -0.0001768430], False),
        ([-0.5, 0.0], 0, [-0.5011768430, -0.0011768430], False),
        # Off the road on the left: a wall. On the right the car stands still, too, but keeps its velocity.
        ([-1.19, -0.05], 0, [-1.2, 0.0], False),
        ([0.59, 0.07], 2, [0.6, 0.07], True),  # 0.07 + 0.0025 * 0.198 + 0.001 is clipped to 0.07
        ([-0.2, -0.0695], 0, [-0.27, -0.07], False),  # and so it is on the other side
        # cos(1.47) = 0.1006: 0.49 + 0.02 - 0.0002515 is beyond 0.5; a hundredth slower it is not.
        ([0.49, 0.02], 1, [0.5097485, 0.0197485], True),
        ([0.49, 0.01], 1, [0.4997485, 0.0097485], False),
    ],
)
def test_one_step_by_hand(physics, action, following, terminated):
    after, observation, reward, ended, truncated = MountainCarDynamics().step(states([physics]), torch.tensor([action]))
    assert observation[0].tolist() == pytest.approx(following, abs=1e-7)
    assert torch.equal(MountainCarDynamics.observe(after), observation)
    assert (reward.item(), after.episode_reward.item(), after.step_count.item()) == (-1.0, -1.0, 1)
    assert ended.item() is terminated
    assert not truncated.item()


@pytest.mark.parametrize(("goal_velocity", "terminated"), [(0.019, True), (0.02, False)])
def test_a_goal_that_must_be_passed_fast(goal_velocity, terminated):
    dynamics = MountainCarDynamics(goal_velocity=goal_velocity)
    assert dynamics.step(states([[0.49, 0.02]]), torch.tensor([1]))[3].item() is terminated


def test_truncated_at_step_200_and_not_before():
    following = run(MountainCarEnv(2, seed=0), push(2), 210)["next"]  # too weak to climb
    assert following["truncated"].squeeze(-1).nonzero().tolist() == [[0, 199], [1, 199]]
    assert not following["terminated"].any()
    assert following["episode_reward"][:, 199].flatten().tolist() == [-200.0, -200.0]


# --- agreement with Gymnasium ---


def drive(episode, state, noise):
    """Random actions; then the way the car moves, up to the goal, and now and then another in every other episode."""
    if episode < RANDOM or (episode % 2 and noise.random() < 0.1):
        return int(noise.integers(3))
    return 2 if state[1] >= 0 else 0


@pytest.fixture(scope="module")
def steps():
    return visited(CAR, drive, RANDOM + SWINGING)


def test_the_episodes_show_all_that_there_is_to_agree_on(steps):
    assert steps.terminated.sum() >= SWINGING - 2
    assert steps.truncated.sum() >= RANDOM
    assert (steps.after[:, 0] == -1.2).any()
    assert not steps.after[steps.after[:, 0] == -1.2, 1].any()
    assert set(steps.action) == {0, 1, 2}


def test_a_step_from_every_state_agrees(steps):
    assert_agrees(CAR, MountainCarDynamics().step, steps)


def test_a_step_of_the_environment_agrees(steps):
    assert_agrees(CAR, step_of(MountainCarEnv(len(steps.action), seed=0)), steps)


@pytest.fixture(scope="module")
def everywhere():
    return anywhere(CAR, lambda noise, count: noise.integers(3, size=count))


def test_the_equations_are_gymnasiums_wherever_a_state_may_be(everywhere):
    """In float64 nothing but the last bits differs."""
    assert (np.abs(everywhere.after[:, 1]) == 0.07).any()
    assert (everywhere.after[:, 0] == 0.6).any()
    assert_agrees(CAR, MountainCarDynamics().step, everywhere, bound=1e-14, dtype=torch.float64)
    for wrong in ({"gravity": 0.0025000001}, {"max_speed": 0.0700001}, {"max_position": 0.6000001}):
        step = MountainCarDynamics(**wrong).step
        with pytest.raises(AssertionError):
            assert_agrees(CAR, step, everywhere, bound=1e-14, dtype=torch.float64)


@pytest.mark.slow
def test_a_step_agrees_when_inductor_generates_the_code(steps):
    torch.compiler.reset()
    assert_agrees(CAR, torch.compile(MountainCarDynamics().step, fullgraph=True), steps)


@dataclass(frozen=True, kw_only=True)
class Explicit(MountainCarDynamics):
    """The position moves by the old velocity."""

    def _move(self, state, push):
        position, velocity, _ = super()._move(state, push)
        position = (state.position + state.velocity).clamp(-1.2, 0.6)
        return position, velocity, position >= 0.5


@dataclass(frozen=True, kw_only=True)
class Bouncing(MountainCarDynamics):
    """The wall sends the car back."""

    def _move(self, state, push):
        position, velocity, terminated = super()._move(state, push)
        return position, torch.where(position <= -1.2, 0.01, velocity), terminated


WRONG = {
    "force": MountainCarDynamics(force=0.0010001),
    "gravity": MountainCarDynamics(gravity=0.0025001),
    "speed": MountainCarDynamics(max_speed=0.05),
    "wall": MountainCarDynamics(min_position=-1.1999),
    "goal": MountainCarDynamics(goal_position=0.51),
    "goal velocity": MountainCarDynamics(goal_velocity=0.05),
    "199 steps": MountainCarDynamics(max_steps=199),
    "explicit Euler": Explicit(),
    "a wall that bounces": Bouncing(),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_task_does_not_agree(name, steps):
    with pytest.raises(AssertionError):
        assert_agrees(CAR, WRONG[name].step, steps)


EPISODES = 300


def swing(observation, noise):
    """The way the car moves, in four steps of five; random pushes alone never reach the goal."""
    return np.where(noise < 0.8, 2 * (observation[:, 1] >= 0), 1).astype(np.int64)


@pytest.fixture(scope="module")
def expected():
    return gymnasium_returns("MountainCar-v0", swing, EPISODES)


def test_returns_have_the_same_distribution(expected):
    assert len(set(expected)) > 20
    assert scaled_distance(native_returns(MountainCarEnv(3 * EPISODES, seed=0), swing), expected) < CRITICAL


@pytest.mark.parametrize(
    "constants", [{"force": 0.0011}, {"gravity": 0.0024}, {"max_steps": 150}, {"min_position": -1.0}]
)
def test_returns_of_another_task_have_another_distribution(constants, expected):
    env = MountainCarEnv(3 * EPISODES, seed=0, **constants)
    assert scaled_distance(native_returns(env, swing), expected) > CRITICAL


class OtherStarts(MountainCarDynamics):
    @staticmethod
    def reset(seed, index, episode):
        start = MountainCarDynamics.reset(seed, index, episode)
        return start._replace(position=start.position + 0.02)


def test_starts_have_the_same_distribution_and_fill_their_interval():
    assert_starts_agree(CAR, MountainCarDynamics())
    with pytest.raises(AssertionError):
        assert_starts_agree(CAR, OtherStarts())
    index = torch.arange(4096)
    position = MountainCarDynamics.reset(torch.zeros_like(index), index, torch.zeros_like(index)).position
    assert np.float32(-0.6) <= position.min() < -0.5998
    assert -0.4002 < position.max() <= np.float32(-0.4)


# --- the environment ---


def test_it_passes_every_check():
    assert not check_env(lambda: MountainCarEnv(3, max_steps=20), max_steps=60).not_reached


@pytest.mark.slow
def test_it_passes_every_check_over_whole_episodes():
    assert not check_env(lambda: MountainCarEnv(3)).not_reached


def test_the_specs_are_gymnasiums():
    env, theirs = MountainCarEnv(), gymnasium.make("MountainCar-v0")
    seen = env.observation_spec["observation"].space
    assert env.action_spec.n == theirs.action_space.n
    assert np.array_equal(seen.low, theirs.observation_space.low)
    assert np.array_equal(seen.high, theirs.observation_space.high)


def test_values_stay_in_their_specs_even_where_the_constants_are_extreme():
    extreme = ({}, {"force": 1e4}, {"gravity": 1e3}, {"max_speed": 1e3}, {"min_position": -0.6}, {"max_position": 1e6})
    for constants in extreme:
        for policy in (push(0), push(2), None):
            assert_in_specs(MountainCarEnv(4, seed=0, max_steps=50, **constants), policy, 60)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"force": 0.0}, "force must be > 0"),
        ({"gravity": math.nan}, "gravity must be > 0"),
        ({"max_speed": -0.07}, "max_speed must be > 0"),
        ({"min_position": -0.5}, "min_position must be <= -0.6, the leftmost start"),
        ({"min_position": -math.inf}, "every constant must be a finite number"),
        ({"goal_position": -0.4}, "goal_position must be > -0.4, the rightmost start"),
        ({"goal_position": 0.7}, "goal_position must be at most max_position"),
        ({"goal_velocity": 0.08}, "goal_velocity must be at most max_speed"),
        ({"max_steps": 1.0}, "max_steps must be an integer >= 1"),
    ],
)
def test_bad_constants_are_refused_by_name(constants, message):
    with pytest.raises(ValueError, match=f"MountainCarEnv: {message}"):
        MountainCarEnv(**constants)
