"""`PendulumEnv`: steps by hand, and step for step and return for return Gymnasium's Pendulum-v1."""

import math
from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
from episode_returns import CRITICAL, gymnasium_returns, native_returns, scaled_distance
from gymnasium_twin import Twin, anywhere, assert_agrees, assert_starts_agree, step_of, visited
from rollouts import always, assert_in_specs, run

from fp8rl_torchrl.envs import check_env
from fp8rl_torchrl.envs.classic_control import PendulumDynamics, PendulumEnv

RANDOM, PUMPING, BALANCING = 10, 6, 6  # episodes
# The steepest reward is that of the angle squared, at most 2π a radian. A start in float32 is off by half an ulp of the
# angle's scale: 64 to 128 rad where the pendulum spins.
PENDULUM = Twin(id="Pendulum-v1", env=PendulumEnv, seen=(0, 0, 1), reward_error=2 * math.pi * 2.0**-18)
states = PENDULUM.states


# --- by hand ---


@pytest.mark.parametrize(
    ("physics", "torque", "following", "reward"),
    [
        # sin = 1: acceleration 15 * 1 + 3 * 1 = 18, times 0.05 is 0.9; the angle moves by the new velocity.
        ([math.pi / 2, 0.1], 1.0, [math.pi / 2 + 0.05, 1.0], -(math.pi**2 / 4 + 0.001 + 0.001)),
        # Upright: 3 * 2 * 0.05 = 0.3; a torque of 5 is clipped to 2, and costs no more: 0.001 * 4.
        ([0.0, 0.0], 5.0, [0.015, 0.3], -0.004),
        ([0.0, 0.0], -5.0, [-0.015, -0.3], -0.004),
        # The speed is clipped to 8; the angle is counted on, but costs as 3π/2 - 2π = -π/2.
        ([3 * math.pi / 2, -7.9], 0.0, [3 * math.pi / 2 - 0.4, -8.0], -(math.pi**2 / 4 + 6.241)),
    ],
)
def test_one_step_by_hand(physics, torque, following, reward):
    after, observation, paid, terminated, truncated = PendulumDynamics().step(
        states([physics]), torch.tensor([[torque]])
    )
    assert PENDULUM.physics(after)[0].tolist() == pytest.approx(following, abs=1e-6)
    angle, speed = following
    assert observation[0].tolist() == pytest.approx([math.cos(angle), math.sin(angle), speed], abs=1e-6)
    assert paid.item() == pytest.approx(reward, abs=1e-5)
    assert after.episode_reward.item() == paid.item()
    assert not terminated.item()
    assert not truncated.item()


def test_truncated_at_step_200_and_not_before():
    following = run(PendulumEnv(2, seed=0), None, 210)["next"]
    assert following["truncated"].squeeze(-1).nonzero().tolist() == [[0, 199], [1, 199]]
    assert not following["terminated"].any()
    assert following["step_count"][0, -1].item() == 10
    total = following["reward"][:, :200].double().sum(1)
    torch.testing.assert_close(following["episode_reward"][:, 199].double(), total, rtol=1e-5, atol=0)


def test_the_reward_is_the_same_after_a_whole_turn():
    turned = [[0.5 + 2 * math.pi * turns, 1.0] for turns in (-9, -1, 0, 1, 9)]
    *_, reward, _, _ = PendulumDynamics().step(states(turned), torch.zeros(5, 1))
    assert (reward + 0.35).abs().max() < 6e-6  # 0.25 + 0.1; float32 keeps an angle of 57 rad to 2e-6


# --- agreement with Gymnasium ---


def drive(episode, state, noise):
    """Random torques beyond the bounds; then always the way it turns, until it spins; then up, and balanced there."""
    angle, speed = math.remainder(state[0], 2 * math.pi), state[1]
    if episode < RANDOM:
        torque = noise.uniform(-3, 3)
    elif episode < RANDOM + PUMPING or abs(angle) > 0.6:
        torque = 2.0 if speed >= 0 else -2.0
    else:
        torque = -20 * angle - 5 * speed
    return np.array([torque], dtype=np.float32)


@pytest.fixture(scope="module")
def steps():
    return visited(PENDULUM, drive, RANDOM + PUMPING + BALANCING)


def test_the_episodes_show_all_that_there_is_to_agree_on(steps):
    assert steps.truncated.sum() == RANDOM + PUMPING + BALANCING
    assert not steps.terminated.any()
    assert np.abs(steps.before[:, 0]).max() > 64
    assert np.abs(steps.after[:, 1]).max() == 8
    assert (steps.reward > -0.01).sum() > 100
    assert (np.abs(steps.action) > 2).any()


def test_a_step_from_every_state_agrees(steps):
    assert_agrees(PENDULUM, PendulumDynamics().step, steps)


def test_a_step_of_the_environment_agrees(steps):
    assert_agrees(PENDULUM, step_of(PendulumEnv(len(steps.action), seed=0)), steps)


def assert_same_equations(step):
    """In float64 nothing but the last bits differs, and those of the torque, which is a float32."""
    everywhere = anywhere(PENDULUM, lambda noise, count: noise.uniform(-3, 3, (count, 1)).astype(np.float32))
    assert_agrees(PENDULUM, step, everywhere, bound=1e-8, dtype=torch.float64)


def test_the_equations_are_gymnasiums_wherever_a_state_may_be():
    assert_same_equations(PendulumDynamics().step)
    with pytest.raises(AssertionError):
        assert_same_equations(PendulumDynamics(gravity=10.00001).step)


@pytest.mark.slow
def test_a_step_agrees_when_inductor_generates_the_code(steps):
    torch.compiler.reset()
    assert_agrees(PENDULUM, torch.compile(PendulumDynamics().step, fullgraph=True), steps)


@dataclass(frozen=True, kw_only=True)
class Explicit(PendulumDynamics):
    """The angle moves by the old velocity."""

    def step(self, state, action):
        following, _, *rest = super().step(state, action)
        following = following._replace(angle=state.angle + state.angular_velocity * self.dt)
        return following, self.observe(following), *rest


@dataclass(frozen=True, kw_only=True)
class Late(PendulumDynamics):
    """Pays for the state after the step."""

    def step(self, state, action):
        following, observation, _, *ends = super().step(state, action)
        reward = super().step(following, action)[2]
        return following._replace(episode_reward=state.episode_reward + reward), observation, reward, *ends


@dataclass(frozen=True, kw_only=True)
class Unclipped(PendulumDynamics):
    """Pays for the torque that was asked for."""

    def step(self, state, action):
        following, observation, reward, *ends = super().step(state, action)
        reward = reward - 0.001 * (action.square() - action.clamp(-2, 2).square()).squeeze(-1)
        return following._replace(episode_reward=state.episode_reward + reward), observation, reward, *ends


WRONG = {
    "gravity 9.8": PendulumDynamics(gravity=9.8),
    "mass": PendulumDynamics(mass=1.0001),
    "length": PendulumDynamics(length=1.0001),
    "torque 2.001": PendulumDynamics(max_torque=2.001),
    "speed 7.999": PendulumDynamics(max_speed=7.999),
    "dt": PendulumDynamics(dt=0.05001),
    "199 steps": PendulumDynamics(max_steps=199),
    "explicit Euler": Explicit(),
    "reward of the next state": Late(),
    "reward of the torque asked for": Unclipped(),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_task_does_not_agree(name, steps):
    with pytest.raises(AssertionError):
        assert_agrees(PENDULUM, WRONG[name].step, steps)


EPISODES = 250


def at_random(observation, noise):
    return (4 * noise[:, None] - 2).astype(np.float32)


@pytest.fixture(scope="module")
def expected():
    return gymnasium_returns("Pendulum-v1", at_random, EPISODES)


def test_returns_have_the_same_distribution(expected):
    assert scaled_distance(native_returns(PendulumEnv(2 * EPISODES, seed=0), at_random), expected) < CRITICAL


@pytest.mark.parametrize("constants", [{"gravity": 5.0}, {"max_steps": 160}, {"max_speed": 4.0}, {"mass": 0.3}])
def test_returns_of_another_task_have_another_distribution(constants, expected):
    env = PendulumEnv(2 * EPISODES, seed=0, **constants)
    assert scaled_distance(native_returns(env, at_random), expected) > CRITICAL


class OtherStarts(PendulumDynamics):
    @staticmethod
    def reset(seed, index, episode):
        start = PendulumDynamics.reset(seed, index, episode)
        return start._replace(angle=start.angle * 0.8)


def test_starts_have_the_same_distribution_and_fill_their_intervals():
    assert_starts_agree(PENDULUM, PendulumDynamics())
    with pytest.raises(AssertionError):
        assert_starts_agree(PENDULUM, OtherStarts())
    index = torch.arange(4096)
    start = PendulumDynamics.reset(torch.zeros_like(index), index, torch.zeros_like(index))
    for number, high in ((start.angle, math.pi), (start.angular_velocity, 1.0)):
        assert 0.999 * high < number.abs().max() <= high


# --- the environment ---


@pytest.mark.slow
def test_it_passes_every_check_over_whole_episodes():
    assert not check_env(lambda: PendulumEnv(3)).not_reached


def test_the_specs_are_gymnasiums():
    env, theirs = PendulumEnv(), gymnasium.make("Pendulum-v1")
    space, seen = env.action_spec.space, env.observation_spec["observation"].space
    assert (space.low.tolist(), space.high.tolist()) == ([-2.0], [2.0])
    assert env.action_spec.shape == theirs.action_space.shape
    np.testing.assert_allclose(seen.low, theirs.observation_space.low, rtol=2e-5)
    np.testing.assert_allclose(seen.high, theirs.observation_space.high, rtol=2e-5)


def test_values_stay_in_their_specs_even_where_the_constants_are_extreme():
    extreme = ({}, {"max_torque": 1e4}, {"dt": 3.0}, {"length": 0.01}, {"max_speed": 1e3}, {"mass": 1e-6})
    for constants in extreme:
        env = PendulumEnv(4, seed=0, max_steps=50, **constants)
        for policy in (always(-1e9), always(1e9), None):
            assert_in_specs(env, policy, 60)
    # The limit of the angle is no wider than it must be.
    env = PendulumEnv(4, seed=0, max_torque=1e4)
    angle = assert_in_specs(env, always(1e9), 200)["state", "angle"]
    assert angle.max() > 0.95 * env.observation_spec["state", "angle"].space.high.max()
    env.observation_spec["state", "angle"].space.high *= 0.9
    with pytest.raises(AssertionError):  # and a narrower one is noticed
        assert_in_specs(env, always(1e9), 200)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"gravity": 0.0}, "gravity must be > 0"),
        ({"mass": -1.0}, "mass must be > 0"),
        ({"length": math.nan}, "length must be > 0"),
        ({"max_torque": 0.0}, "max_torque must be > 0"),
        ({"max_torque": math.inf}, "every constant must be a finite number"),
        ({"max_speed": 0.9}, "max_speed must be >= 1.0, the fastest start"),
        ({"dt": 0.0}, "dt must be > 0"),
        ({"max_steps": True}, "max_steps must be an integer >= 1"),
    ],
)
def test_bad_constants_are_refused_by_name(constants, message):
    with pytest.raises(ValueError, match=f"PendulumEnv: {message}"):
        PendulumEnv(**constants)
