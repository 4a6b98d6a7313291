"""`CartPoleEnv`: steps by hand, and step for step and return for return Gymnasium's CartPole-v1."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from rollouts import push, run

from fp8rl_torchrl.envs.classic_control import CartPoleDynamics, CartPoleEnv, CartPoleState

RANDOM, BALANCING, LEAVING = 20, 4, 4  # episodes


def states(physics, step_count=0):
    """A state of shape [N] from physics [N, 4], at a step count or at one for each."""
    physics = torch.as_tensor(np.asarray(physics), dtype=torch.float32)
    count = torch.zeros(len(physics), dtype=torch.int64) + torch.as_tensor(step_count)
    zero = torch.zeros_like(count)
    return CartPoleState(*physics.unbind(-1), count, count.to(torch.float32), zero, zero, zero)


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


class Steps(NamedTuple):
    """Every step of some Gymnasium episodes, in float64."""

    before: np.ndarray  # [steps, 4]
    step_count: np.ndarray
    action: np.ndarray
    after: np.ndarray  # [steps, 4]
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


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
    env, noise, rows = gymnasium.make("CartPole-v1"), np.random.default_rng(0), []
    for episode in range(RANDOM + BALANCING + LEAVING):
        env.reset(seed=episode)
        over, count = False, 0
        while not over:
            before = np.array(env.unwrapped.state)
            action = drive(episode, before, noise)
            _, reward, terminated, truncated, _ = env.step(action)
            rows.append((before, count, action, np.array(env.unwrapped.state), reward, terminated, truncated))
            over, count = terminated or truncated, count + 1
    return Steps(*map(np.array, zip(*rows, strict=True)))


def assert_agrees(step, steps):
    """One native step from every state gives Gymnasium's, within 4 float32 ulp of each number's scale.

    A number's scale is the largest magnitude that it has in these episodes.
    """
    start = states(steps.before, torch.as_tensor(steps.step_count))
    following, observation, reward, terminated, truncated = step(start, torch.as_tensor(steps.action))
    bound = 4 * np.spacing(np.abs(steps.before).max(0).astype(np.float32)).astype(np.float64)
    assert torch.equal(CartPoleDynamics.observe(following), observation)
    assert (np.abs(observation.double().numpy() - steps.after) <= bound).all()
    assert np.array_equal(reward.numpy(), steps.reward)
    assert np.array_equal(following.episode_reward.numpy(), steps.step_count + steps.reward)
    thresholds = np.array([2.4, 12 * math.pi / 180])
    near = (np.abs(np.abs(steps.after[:, [0, 2]]) - thresholds) <= bound[[0, 2]]).any(-1)
    assert np.array_equal(terminated.numpy()[~near], steps.terminated[~near])
    assert np.array_equal(truncated.numpy(), steps.truncated)


def test_the_episodes_show_all_that_there_is_to_agree_on(steps):
    assert steps.terminated.sum() == RANDOM + LEAVING
    assert steps.truncated.sum() == BALANCING
    assert sorted(np.sign(steps.after[np.abs(steps.after[:, 0]) > 2.4, 0])) == [-1, -1, 1, 1]
    assert len(steps.action) > 2000
    assert 0.4 < steps.action.mean() < 0.6


def test_a_step_from_every_state_agrees(steps):
    assert_agrees(CartPoleDynamics().step, steps)


def test_a_step_of_the_environment_agrees(steps):
    """Injected into the TensorDict, as a user would."""
    env = CartPoleEnv(len(steps.action), seed=0)

    def step(state, action):
        no = torch.zeros_like(action, dtype=torch.bool)
        data = env.write(state, env.observe(state), no, no).set("action", action)
        following = env.step(data)["next"]
        ends = (following[name].squeeze(-1) for name in ("reward", "terminated", "truncated"))
        return env.read(following), following["observation"], *ends

    assert_agrees(step, steps)


@pytest.mark.slow
def test_a_step_agrees_when_inductor_generates_the_code(steps):
    torch.compiler.reset()
    assert_agrees(torch.compile(CartPoleDynamics().step, fullgraph=True), steps)


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
        assert_agrees(WRONG[name].step, steps)


# --- agreement with Gymnasium, return for return ---

EPISODES = 600
# Two-sample Kolmogorov-Smirnov at alpha = 0.001: the critical scaled distance is sqrt(-ln(alpha / 2) / 2) = 1.949.
# Ties, as returns are whole numbers, only make the test more careful.
CRITICAL = math.sqrt(-math.log(0.001 / 2) / 2)


def scaled_distance(first, second):
    """The largest distance of two empirical distributions, times sqrt(n m / (n + m))."""
    points = np.concatenate((first, second))
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (first, second)]
    return np.abs(shares[0] - shares[1]).max() * math.sqrt(len(first) * len(second) / (len(first) + len(second)))


def test_the_distance_by_hand():
    # Up to 2 lie 2/2 of the first and 1/4 of the second sample: 3/4 * sqrt(8 / 6).
    assert scaled_distance(np.array([1, 2]), np.array([2, 3, 4, 5])) == pytest.approx(0.75 * math.sqrt(8 / 6))
    assert scaled_distance(np.arange(9), np.arange(9)) == 0


@pytest.fixture(scope="module")
def gymnasium_returns():
    """Returns of Gymnasium's episodes under uniformly random actions; seed 0."""
    env, noise, returns = gymnasium.make("CartPole-v1"), np.random.default_rng(0), []
    env.reset(seed=0)
    for _ in range(EPISODES):
        env.reset()
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(int(noise.integers(2)))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    return np.array(returns)


def returns_of(env, seed=0):
    """Returns of the first episode of each environment, under uniformly random actions."""
    generator = torch.Generator().manual_seed(seed)
    data = env.reset()
    returns, running = torch.zeros(env.batch_size), torch.ones(env.batch_size, dtype=torch.bool)
    while running.any():
        action = torch.randint(2, env.batch_size, generator=generator)
        stepped, data = env.step_and_maybe_reset(data.set("action", action))
        done = stepped["next", "done"].squeeze(-1)
        returns = torch.where(running & done, stepped["next", "episode_reward"].squeeze(-1), returns)
        running = running & ~done
    return returns.numpy()


def test_returns_have_the_same_distribution(gymnasium_returns):
    assert scaled_distance(returns_of(CartPoleEnv(EPISODES, seed=0)), gymnasium_returns) < CRITICAL


@pytest.mark.parametrize(
    "constants", [{"force": 6.0}, {"half_length": 0.7}, {"dt": 0.024}, {"angle_bound": 18 * math.pi / 180}]
)
def test_returns_of_another_task_have_another_distribution(constants, gymnasium_returns):
    assert scaled_distance(returns_of(CartPoleEnv(EPISODES, seed=0, **constants)), gymnasium_returns) > CRITICAL


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
        for policy in (push(0), push(1), env.rand_action):
            for data in run(env, policy, 60)["next"].unbind(-1):
                assert env.observation_spec.is_in(data.select(*env.observation_spec.keys(True, True)))
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
