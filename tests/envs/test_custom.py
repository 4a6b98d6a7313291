"""`CustomEnv`: steps worked out by hand, and policies whose returns are known."""

import math

import numpy as np
import pytest
import torch
from rollouts import run

from fp8rl_torchrl.envs.custom import CustomDynamics, CustomEnv, CustomState

EPISODES = 4096
# Constants that are exact in binary, so that the numbers worked out by hand are exact as well.
EXACT = {"dt": 0.5, "force": 2.0, "friction": 0.5, "bound": 4.0, "target": 1.0, "survival_reward": 0.25}
WITHOUT_FRICTION = CustomDynamics(dt=0.5, force=2.0, friction=0.0, bound=4.0)


def state(position, velocity, step_count=0, episode_reward=0.0):
    counter = torch.zeros((), dtype=torch.int64)
    return CustomState(
        position=torch.tensor(position),
        velocity=torch.tensor(velocity),
        step_count=counter + step_count,
        episode_reward=torch.tensor(episode_reward),
        seed=counter,
        index=counter,
        episode=counter,
    )


# --- dynamics ---


def test_one_step_by_hand_exactly():
    # v = 1 + (-2 - 0.5 * 1) * 0.5 = -0.25;  x = -1 - 0.25 * 0.5 = -1.125;  r = 0.25 + 1 - 2.125 / 4 = 0.71875
    dynamics = CustomDynamics(**EXACT)
    left, observation, reward, terminated, truncated = dynamics.step(state(-1.0, 1.0), torch.tensor(0))
    assert observation.tolist() == [-1.125, -0.25]
    assert reward.item() == 0.71875
    assert (left.step_count, left.episode_reward) == (1, 0.71875)
    assert not terminated
    assert not truncated
    # v = 1 + (2 - 0.5) * 0.5 = 1.75;  x = -1 + 1.75 * 0.5 = -0.125;  r = 1.25 - 1.125 / 4 = 0.96875
    _, observation, reward, _, _ = dynamics.step(state(-1.0, 1.0), torch.tensor(1))
    assert observation.tolist() == [-0.125, 1.75]
    assert reward.item() == 0.96875


def test_three_steps_of_the_defaults_by_hand():
    #   right  v = 0 + (1 - 0) * 0.1 = 0.1               x = 0 + 0.1 * 0.1 = 0.01         r = 1.1 - 0.01 / 2.4
    #   left   v = 0.1 + (-1 - 0.01) * 0.1 = -0.001      x = 0.01 - 0.0001 = 0.0099       r = 1.1 - 0.0099 / 2.4
    #   left   v = -0.001 + (-1 + 0.0001) * 0.1          x = 0.0099 - 0.010099            r = 1.1 - 0.000199 / 2.4
    #            = -0.10099                                = -0.000199
    by_hand = [(0.01, 0.1, 1.0958333), (0.0099, -0.001, 1.095875), (-0.000199, -0.10099, 1.0999171)]
    current = state(0.0, 0.0)
    for action, (position, velocity, reward) in zip((1, 0, 0), by_hand, strict=True):
        current, observation, got, _, _ = CustomDynamics().step(current, torch.tensor(action))
        assert observation.tolist() == pytest.approx([position, velocity], abs=1e-7)
        assert got.item() == pytest.approx(reward, abs=2e-7)
    assert current.step_count == 3
    assert current.episode_reward.item() == pytest.approx(1.0958333 + 1.095875 + 1.0999171, abs=1e-6)


def test_the_environment_steps_as_the_pure_function_does():
    env = CustomEnv(num_envs=2, seed=0, **EXACT)
    data = env.reset()
    data["state", "position"], data["state", "velocity"] = torch.full((2,), -1.0), torch.full((2,), 1.0)
    after = env.step(data.set("action", torch.tensor([0, 1])))["next"]
    assert after["observation"].tolist() == [[-1.125, -0.25], [-0.125, 1.75]]
    assert after["reward"].tolist() == [[0.71875], [0.96875]]
    assert after["episode_reward"].tolist() == [[0.71875], [0.96875]]
    assert after["step_count"].tolist() == [[1], [1]]


@pytest.mark.parametrize("side", [1, -1])
def test_terminates_beyond_the_bound_and_not_on_it(side):
    # v = 1 + 2 * 0.5 = 2, x = 3 + 2 * 0.5 = 4.0, the bound itself; 2^-21 is the spacing of float32 above 4.
    action = torch.tensor(int(side > 0))
    _, observation, _, terminated, _ = WITHOUT_FRICTION.step(state(side * 3.0, side * 1.0), action)
    assert observation[0] == side * 4.0
    assert not terminated
    _, observation, _, terminated, _ = WITHOUT_FRICTION.step(state(side * (3.0 + 2**-21), side * 1.0), action)
    assert observation[0] == side * (4.0 + 2**-21)
    assert terminated


@pytest.mark.parametrize(
    ("position", "step_count", "terminated", "truncated"),
    [(0.0, 0, False, False), (3.5, 0, True, False), (0.0, 199, False, True), (3.5, 199, True, True)],
)
def test_the_two_ends_of_an_episode_are_independent(position, step_count, terminated, truncated):
    # v = 1 + 2 * 0.5 = 2, so x = 3.5 leads to 4.5, beyond the bound of 4, and x = 0 to 1.
    env = CustomEnv(seed=0, dt=0.5, force=2.0, friction=0.0, bound=4.0)
    data = env.reset()
    data["state", "position"], data["state", "velocity"] = torch.tensor(position), torch.tensor(1.0)
    data["step_count"] = torch.tensor([step_count])
    after = env.step(data.set("action", torch.tensor(1)))["next"]
    assert (after["terminated"].item(), after["truncated"].item()) == (terminated, truncated)
    assert after["done"].item() == (terminated or truncated)


def test_truncated_at_step_200_and_not_before():
    env = CustomEnv(num_envs=3, seed=0, force=1e-3)  # too weak to leave the bound
    following = run(env, steps=401)["next"]
    truncated = following["truncated"].squeeze(-1)
    assert truncated.nonzero()[:, 1].tolist() == [199, 399] * 3
    assert not following["terminated"].any()
    assert torch.equal(following["done"], following["truncated"])
    assert following["step_count"][0, :, 0].tolist() == [*range(1, 201), *range(1, 201), 1]


def test_starts_fill_their_intervals_and_stay_inside():
    counter = torch.arange(EPISODES)
    start = CustomDynamics.reset(torch.zeros_like(counter), counter, torch.zeros_like(counter))
    for value, limit in ((start.position, 0.5), (start.velocity, 0.05)):
        assert value.abs().max() <= limit
        assert value.min() < -0.99 * limit
        assert value.max() > 0.99 * limit
        # The mean of 4,096 uniform draws in ±limit has a standard deviation of limit / sqrt(3 * 4096).
        assert abs(value.mean()) < 4 * limit / math.sqrt(3 * EPISODES)
    assert abs(torch.corrcoef(torch.stack((start.position, start.velocity)))[0, 1]) < 4 / math.sqrt(EPISODES)
    assert not start.step_count.any()
    assert not start.episode_reward.any()


# --- known returns ---


def returns(policy):
    """Returns of 4,096 first episodes, played by the pure functions."""
    index = torch.arange(EPISODES)
    dynamics, zero = CustomDynamics(), torch.zeros_like(index)
    current, running = dynamics.reset(zero, index, zero), torch.ones(EPISODES, dtype=torch.bool)
    total = torch.zeros(EPISODES, dtype=torch.float64)
    for _ in range(200):
        current, _, reward, terminated, truncated = dynamics.step(current, policy(current))
        total += reward * running
        running &= ~(terminated | truncated)
    assert not running.any()
    return total


def numpy_returns_of_random_actions():
    """The same problem written down a second time, in float64 and with numpy's own noise."""
    noise = np.random.default_rng(0)
    x, v = noise.uniform(-0.5, 0.5, EPISODES), noise.uniform(-0.05, 0.05, EPISODES)
    running, total = np.ones(EPISODES, dtype=bool), np.zeros(EPISODES)
    for _ in range(200):
        v = v + (noise.choice([-1.0, 1.0], EPISODES) - 0.1 * v) * 0.1
        x = x + v * 0.1
        total += np.where(running, 0.1 + (1 - np.abs(x) / 2.4), 0.0)
        running &= np.abs(x) <= 2.4
    return total


def test_random_actions_return_73_5():
    generator = torch.Generator().manual_seed(0)
    values = returns(lambda current: torch.randint(2, current.position.shape, generator=generator)).numpy()
    independent = numpy_returns_of_random_actions()
    standard_error = values.std() / math.sqrt(EPISODES)  # about 0.66
    assert 0.5 < standard_error < 0.8
    assert abs(values.mean() - 73.5) < 3 * standard_error
    assert abs(values.mean() - independent.mean()) < 3 * math.sqrt(2) * standard_error


def test_a_bang_bang_controller_returns_219_05():
    def controller(current):
        # Push against the point at which braking from now on would end, v |v| / (2 force), half a step ahead.
        ahead = current.position + 0.5 * current.velocity * current.velocity.abs() + 0.05 * current.velocity
        return (ahead < 0).long()

    values = returns(controller)
    # The standard deviation over episodes is 0.4, that of the mean 0.006.
    assert values.mean().item() == pytest.approx(219.05, abs=0.03)
    assert values.max() < 220
    # The same controller with its actions swapped runs away.
    assert returns(lambda current: 1 - controller(current)).mean() < 60
