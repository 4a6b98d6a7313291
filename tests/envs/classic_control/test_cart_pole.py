"""`CartPoleEnv`: steps by hand, and step for step and return for return Gymnasium's CartPole-v1."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from episode_returns import CRITICAL, gymnasium_returns, native_returns, scaled_distance
from gymnasium_twin import Twin, anywhere, assert_agrees, assert_starts_agree, step_of, visited
from rollouts import assert_in_specs, push, run

from fp8rl_torchrl.envs.classic_control import CartPoleDynamics, CartPoleEnv

RANDOM, BALANCING, LEAVING = 20, 4, 4  # episodes
THRESHOLDS = np.array([2.4, 12 * math.pi / 180])


def near(after, bound):
    return (np.abs(np.abs(after[:, [0, 2]]) - THRESHOLDS) <= bound[[0, 2]]).any(-1)


CART_POLE = Twin(id="CartPole-v1", env=CartPoleEnv, seen=(0, 1, 2, 3), near=near)
states = CART_POLE.states


# --- by hand ---


def test_one_step_by_hand_upright():
    # θ = 0: temp = 10/1.1 = 9.0909091; θacc = -temp / (0.5 * (4/3 - 0.1/1.1)) = -9.0909091/0.62121212 = -14.634146;
    # xacc = temp + 0.05 * 14.634146 / 1.1 = 9.7560976. Positions move by the velocities before the step.
    following, observation, reward, terminated, truncated = CartPoleDynamics().step(
        states([[0.0, 1.0, 0.0, -0.5]]), torch.tensor([1])
    )
    by_hand = [0.02, 1 + 0.02 * 9.7560976, -0.01, -0.5 - 0.02 * 14.634146]
    assert observation[0].tolist() == pytest.approx(by_hand, abs=2e-7)
    assert (reward.item(), following.step_count.item(), following.episode_reward.item()) == (1.0, 1, 1.0)
    assert not terminated.item()
    assert not truncated.item()


def test_left_is_the_mirror_image_of_right():
    physics = np.array([[0.3, -0.4, 0.05, 0.7]])
    right = CartPoleDynamics().step(states(physics), torch.tensor([1]))[1]
    left = CartPoleDynamics().step(states(-physics), torch.tensor([0]))[1]
    assert torch.equal(left, -right)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize(
    ("physics", "step_count", "ends"),
    [
        ([2.39, 0.49, 0, 0], 0, (False, False)),  # 2.39 + 0.02 * 0.49 = 2.3998
        ([2.39, 0.51, 0, 0], 0, (True, False)),  # 2.4002
        ([0, 0, 0.2, 0.46], 0, (False, False)),  # 0.2092; 12 degrees are 0.20944
        ([0, 0, 0.2, 0.48], 0, (True, False)),  # 0.2096
        ([0, 0, 0, 0], 498, (False, False)),
        ([0, 0, 0, 0], 499, (False, True)),
        ([2.39, 0.51, 0, 0], 499, (True, True)),
    ],
)
def test_the_ends_of_an_episode(side, physics, step_count, ends):
    start = states([side * np.array(physics, dtype=np.float32)], step_count)
    *_, reward, terminated, truncated = CartPoleDynamics().step(start, torch.tensor([0]))
    assert (terminated.item(), truncated.item()) == ends
    assert reward.item() == 1.0  # the last step pays, too


def test_starts_fill_their_intervals_and_stay_inside():
    index = torch.arange(4096)
    start = CartPoleDynamics.reset(torch.zeros_like(index), index, torch.zeros_like(index))
    observation = CartPoleDynamics.observe(start)
    assert observation.abs().max() <= 0.05
    assert (observation.min(0).values < -0.049).all()
    assert (observation.max(0).values > 0.049).all()
    # The mean of 4,096 uniform draws in ±0.05 has a standard deviation of 0.05 / sqrt(3 * 4096).
    assert observation.mean(0).abs().max() < 4 * 0.05 / math.sqrt(3 * 4096)
    assert (torch.corrcoef(observation.T) - torch.eye(4)).abs().max() < 4.5 / math.sqrt(4096)
    assert not start.step_count.any()
    assert not start.episode_reward.any()


# --- agreement with Gymnasium, step by step ---


def steer(state, goal=0.0):
    """A controller that keeps the pole up, pushing the way it falls, and drives the cart to the goal."""
    x, v, angle, w = state
    return int(angle + 0.3 * w + 0.05 * (x - goal) + 0.1 * v > 0)


def drive(episode, state, noise):
    """Random actions, then balancing up to the limit of 500 steps, then driving out on either side."""
    if episode < RANDOM:
        return int(noise.integers(2))
    leaves = episode >= RANDOM + BALANCING
    return steer(state, goal=leaves * (4.0 if episode % 2 else -4.0))


@pytest.fixture(scope="module")
def steps():
    return visited(CART_POLE, drive, RANDOM + BALANCING + LEAVING)


def test_the_episodes_show_all_that_there_is_to_agree_on(steps):
    assert steps.terminated.sum() == RANDOM + LEAVING
    assert steps.truncated.sum() == BALANCING
    assert sorted(np.sign(steps.after[np.abs(steps.after[:, 0]) > 2.4, 0])) == [-1, -1, 1, 1]
    assert len(steps.action) > 2000
    assert 0.4 < steps.action.mean() < 0.6


def test_a_step_from_every_state_agrees(steps):
    assert_agrees(CART_POLE, CartPoleDynamics().step, steps)


def test_a_step_of_the_environment_agrees(steps):
    assert_agrees(CART_POLE, step_of(CartPoleEnv(len(steps.action), seed=0)), steps)


def test_the_equations_are_gymnasiums_wherever_a_state_may_be():
    """In float64 nothing but the last bits differs."""
    steps = anywhere(CART_POLE, lambda noise, count: noise.integers(2, size=count))
    assert_agrees(CART_POLE, CartPoleDynamics().step, steps, bound=1e-12, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_agrees(CART_POLE, CartPoleDynamics(gravity=9.800001).step, steps, bound=1e-12, dtype=torch.float64)


@pytest.mark.slow
def test_a_step_agrees_when_inductor_generates_the_code(steps):
    torch.compiler.reset()
    assert_agrees(CART_POLE, torch.compile(CartPoleDynamics().step, fullgraph=True), steps)


@dataclass(frozen=True, kw_only=True)
class SemiImplicit(CartPoleDynamics):
    """Positions move by the new velocities."""

    def step(self, state, action):
        following, _, *rest = super().step(state, action)
        position = state.position + self.dt * following.velocity
        angle = state.angle + self.dt * following.angular_velocity
        following = following._replace(position=position, angle=angle)
        return following, self.observe(following), *rest


@dataclass(frozen=True, kw_only=True)
class NoLastReward(CartPoleDynamics):
    """The step that ends the episode does not pay."""

    def step(self, state, action):
        following, observation, reward, terminated, truncated = super().step(state, action)
        reward = reward * ~terminated
        return (
            following._replace(episode_reward=state.episode_reward + reward),
            observation,
            reward,
            terminated,
            truncated,
        )


@dataclass(frozen=True, kw_only=True)
class HalfPrecision(CartPoleDynamics):
    """Computes the accelerations from a state in BF16."""

    def step(self, state, action):
        rounded = state._replace(angle=state.angle.bfloat16().float())
        following, _, *rest = super().step(rounded, action)
        following = following._replace(angle=state.angle + self.dt * state.angular_velocity)
        return following, self.observe(following), *rest


WRONG = {
    "gravity 9.81": CartPoleDynamics(gravity=9.81),
    "pole mass 0.1001": CartPoleDynamics(pole_mass=0.1001),
    "length": CartPoleDynamics(half_length=0.5001),
    "force": CartPoleDynamics(force=10.001),
    "dt": CartPoleDynamics(dt=0.02001),
    "499 steps": CartPoleDynamics(max_steps=499),
    "11 degrees": CartPoleDynamics(angle_bound=11 * math.pi / 180),
    "2.45 metres": CartPoleDynamics(position_bound=2.45),
    "semi-implicit Euler": SemiImplicit(),
    "no reward for the last step": NoLastReward(),
    "BF16": HalfPrecision(),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_task_does_not_agree(name, steps):
    with pytest.raises(AssertionError):
        assert_agrees(CART_POLE, WRONG[name].step, steps)


# --- agreement with Gymnasium, return for return ---

EPISODES = 600


def test_the_distance_by_hand():
    # Up to 2 lie 2/2 of the first and 1/4 of the second sample: 3/4 * sqrt(8 / 6).
    assert scaled_distance(np.array([1, 2]), np.array([2, 3, 4, 5])) == pytest.approx(0.75 * math.sqrt(8 / 6))
    assert scaled_distance(np.arange(9), np.arange(9)) == 0


def at_random(observation, noise):
    return (noise < 0.5).astype(np.int64)


@pytest.fixture(scope="module")
def expected():
    return gymnasium_returns("CartPole-v1", at_random, EPISODES)


def test_returns_have_the_same_distribution(expected):
    assert scaled_distance(native_returns(CartPoleEnv(EPISODES, seed=0), at_random), expected) < CRITICAL


@pytest.mark.parametrize(
    "constants", [{"force": 6.0}, {"half_length": 0.7}, {"dt": 0.024}, {"angle_bound": 18 * math.pi / 180}]
)
def test_returns_of_another_task_have_another_distribution(constants, expected):
    env = CartPoleEnv(EPISODES, seed=0, **constants)
    assert scaled_distance(native_returns(env, at_random), expected) > CRITICAL


def test_starts_have_the_same_distribution():
    assert_starts_agree(CART_POLE, CartPoleDynamics())


# --- the environment ---


def test_truncated_at_step_500_and_not_before():
    def balance(td):
        x, v, angle, w = td["observation"].unbind(-1)
        return td.set("action", (angle + 0.3 * w + 0.05 * x + 0.1 * v > 0).long())

    following = run(CartPoleEnv(2, seed=0), balance, 520)["next"]
    assert following["truncated"].squeeze(-1).nonzero().tolist() == [[0, 499], [1, 499]]
    assert not following["terminated"].any()
    assert following["episode_reward"][:, 499].flatten().tolist() == [500.0, 500.0]
    assert following["step_count"][0, -1].item() == 20


def test_values_stay_in_their_specs_even_where_the_constants_are_extreme():
    for constants in ({}, {"force": 1e3}, {"dt": 0.5}, {"gravity": 500.0, "angle_bound": 1.5}, {"pole_mass": 50.0}):
        env = CartPoleEnv(4, seed=0, **constants)
        for policy in (push(0), push(1), None):
            assert_in_specs(env, policy, 60)
    tight = CartPoleEnv(4, seed=0).observation_spec["state", "angle"].space.high.max()
    wild = run(CartPoleEnv(4, seed=0, dt=0.5), push(0), 60)["next", "state", "angle"]
    assert wild.abs().max() > tight  # so that other constants do need other limits


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"gravity": 0.0}, "gravity must be > 0"),
        ({"cart_mass": -1.0}, "cart_mass must be > 0"),
        ({"dt": math.nan}, "dt must be > 0"),
        ({"force": math.inf}, "every constant must be a finite number"),
        ({"position_bound": 0.05}, "position_bound must be > 0.05, the farthest start"),
        ({"angle_bound": 0.01}, "angle_bound must be > 0.05, the farthest start"),
        ({"max_steps": 0}, "max_steps must be an integer >= 1"),
        ({"max_steps": 2.5}, "max_steps must be an integer >= 1"),
    ],
)
def test_bad_constants_are_refused_by_name(constants, message):
    with pytest.raises(ValueError, match=f"CartPoleEnv: {message}"):
        CartPoleEnv(**constants)
