"""The Gymnasium form of the custom environment: dynamics by hand, the native form, Gymnasium's contract."""

import warnings
from dataclasses import fields

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.envs.custom_constants import CustomConstants
from fp8rl_torchrl.envs.gymnasium_env import (
    ENV_ID,
    CustomGymnasiumEnv,
    CustomGymnasiumVectorEnv,
    register,
)

register()


def started(state, **constants):
    env = CustomGymnasiumEnv(**constants)
    env.reset(seed=0, options={"state": state})
    return env


# ---- dynamics, worked out by hand


def test_a_step_moves_with_the_new_velocity():
    env = started([1.0, 0.0])
    observation, reward, terminated, truncated, info = env.step(1)
    # v = 0 + (1 - 0.1 * 0) * 0.1 = 0.1;  x = 1 + 0.1 * 0.1 = 1.01;  reward = 0.1 + 1 - 1.01 / 2.4
    np.testing.assert_allclose(observation, [1.01, 0.1], rtol=1e-6)
    assert reward == pytest.approx(0.1 + 1 - 1.01 / 2.4, rel=1e-6)
    assert (terminated, truncated, info) == (False, False, {})
    assert observation.dtype == np.float32
    assert type(reward) is float
    assert type(terminated) is type(truncated) is bool
    observation, *_ = env.step(0)
    # v = 0.1 + (-1 - 0.1 * 0.1) * 0.1 = -0.001;  x = 1.01 - 0.001 * 0.1 = 1.0099
    np.testing.assert_allclose(observation, [1.0099, -0.001], rtol=1e-5)


def test_every_constant_counts():
    env = started([0.5, 0.2], dt=0.5, force=2.0, friction=0.4, bound=1.5, target=-0.25, survival_reward=0.3)
    observation, reward, *_ = env.step(0)
    # v = 0.2 + (-2 - 0.4 * 0.2) * 0.5 = -0.84;  x = 0.5 - 0.84 * 0.5 = 0.08;  reward = 0.3 + 1 - |0.08 + 0.25| / 1.5
    np.testing.assert_allclose(observation, [0.08, -0.84], rtol=1e-5)
    assert reward == pytest.approx(0.3 + 1 - 0.33 / 1.5, rel=1e-5)


@pytest.mark.parametrize("side", [-1, 1])
def test_terminates_beyond_the_bound_and_only_there(side):
    env = started([side * 2.29, side * 1.0])
    action = int(side == 1)
    # |v| = 1 + (1 - 0.1) * 0.1 = 1.09;  |x| = 2.29 + 0.109 = 2.399 <= 2.4, then |v| = 1.1791, |x| = 2.51691
    assert env.step(action)[2] is False
    observation, reward, terminated, truncated, _ = env.step(action)
    assert (terminated, truncated) == (True, False)
    np.testing.assert_allclose(np.abs(observation), [2.51691, 1.1791], rtol=1e-5)
    assert reward == pytest.approx(1.1 - 2.51691 / 2.4, abs=1e-5)
    with pytest.raises(ResetNeeded, match="the episode is over"):
        env.step(action)
    env.reset()
    env.step(action)


@pytest.mark.parametrize("max_steps", [1, 3, 200])
def test_truncates_at_the_step_limit(max_steps):
    env = started([0.0, 0.0], max_steps=max_steps)
    flags = [env.step(step % 2)[2:4] for step in range(max_steps)]
    assert flags == [(False, False)] * (max_steps - 1) + [(False, True)]


def test_the_last_step_can_terminate_and_truncate():
    # v = (20 - 0) * 0.1 = 2;  x = 2.3 + 2 * 0.1 = 2.5
    assert started([2.3, 0.0], max_steps=1, force=20.0).step(1)[2:4] == (True, True)


# ---- the same as the native environment


def test_constants_are_the_native_ones():
    native = CustomEnv().dynamics
    ours = CustomConstants()
    for field in fields(ours):
        assert getattr(native, field.name) == getattr(ours, field.name)
    assert (native.max_velocity, native.max_position) == (ours.max_velocity, ours.max_position)
    space = CustomGymnasiumEnv().observation_space
    np.testing.assert_array_equal(space.high, CustomEnv().observation_spec["observation"].high.numpy())


@pytest.mark.parametrize(
    "constants", [{}, {"dt": 0.03, "force": 3.0, "friction": 0.7, "bound": 1.9, "target": 0.6, "survival_reward": 0.37}]
)
def test_agrees_with_the_native_environment_to_float32_rounding(constants):
    generator = np.random.default_rng(0)
    env = CustomGymnasiumVectorEnv(4096, **constants)
    states = (generator.uniform(-1, 1, size=(4096, 2)) * [env.constants.bound, 3]).astype(np.float32)
    actions = generator.integers(0, 2, size=4096)
    env.reset(seed=0, options={"state": states})
    native = CustomEnv(num_envs=4096, seed=0, **constants)
    state = native.reset()
    start = native.pure_reset(*(state["state", name] for name in ("seed", "index", "episode")))
    start = start._replace(position=torch.tensor(states[:, 0]), velocity=torch.tensor(states[:, 1]))

    observation, reward, terminated, truncated, _ = env.step(actions)
    expected = [part.numpy() for part in native.pure_step(start, torch.tensor(actions))[1:]]
    epsilon = np.finfo(np.float32).eps
    np.testing.assert_allclose(observation, expected[0], rtol=4 * epsilon, atol=4 * epsilon)
    np.testing.assert_allclose(reward, expected[1], rtol=4 * epsilon, atol=4 * epsilon)
    np.testing.assert_array_equal(terminated, expected[2])
    np.testing.assert_array_equal(truncated, expected[3])
    assert terminated.any()
    assert not terminated.all()
    # The tolerance is fine enough to tell explicit from semi-implicit Euler.
    explicit = states[:, 0] + states[:, 1] * np.float32(env.constants.dt)
    assert not np.allclose(observation[:, 0], explicit, rtol=4 * epsilon, atol=4 * epsilon)


def test_a_whole_episode_agrees_with_the_native_environment():
    native = CustomEnv(seed=3)
    td = native.reset()
    env = started(td["observation"].numpy())
    total, truncated = 0.0, False
    for _ in range(200):
        assert not truncated
        action = int(td["observation"] @ torch.tensor([1.0, 1.5]) < 0)  # push back: the episode lasts
        td = native.step(td.set("action", torch.tensor(action)))["next"]
        observation, reward, terminated, truncated, _ = env.step(action)
        total += reward
        np.testing.assert_allclose(observation, td["observation"].numpy(), atol=2e-5)
        assert (terminated, truncated) == (td["terminated"].item(), td["truncated"].item())
    assert truncated
    assert total == pytest.approx(td["episode_reward"].item(), rel=1e-5)
    assert total > 210


# ---- Gymnasium's contract


@pytest.mark.parametrize(
    "kwargs", [{}, {"render_mode": "rgb_array"}, {"max_steps": 50, "friction": 0.0, "target": 1.0}]
)
def test_passes_the_env_checkers_of_gymnasium_and_sb3_without_a_warning(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ENV_ID, **kwargs).unwrapped)
        sb3_check_env(gymnasium.make(ENV_ID, **kwargs))


def test_the_checkers_notice_a_broken_environment():
    class Leaves(CustomGymnasiumEnv):
        def reset(self, **kwargs):
            observation, info = super().reset(**kwargs)
            return observation + 100, info

    with pytest.raises(AssertionError):
        check_env(Leaves())
    with pytest.raises(AssertionError):
        sb3_check_env(Leaves())


@settings(max_examples=60, deadline=None)
@given(
    dt=st.floats(0.01, 0.5),
    force=st.floats(0.1, 20),
    damping=st.floats(0, 1),
    bound=st.floats(0.6, 50),
    max_steps=st.integers(1, 60),
    right=st.booleans(),
    start=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
def test_the_observation_space_holds_every_observation(dt, force, damping, bound, max_steps, right, start):
    env = CustomGymnasiumEnv(dt=dt, force=force, friction=damping / dt, bound=bound, max_steps=max_steps)
    fast = env.constants.terminal_velocity <= env.constants.max_velocity
    state = np.array(start) * [bound * 0.999999, env.constants.max_velocity * 0.999999 if fast else 0.05]
    observation, _ = env.reset(options={"state": state})
    done = False
    while not done:
        assert observation in env.observation_space
        observation, _, terminated, truncated, _ = env.step(int(right))
        done = terminated or truncated
    assert observation in env.observation_space


def test_the_observation_space_is_not_wider_than_it_must_be():
    env = started([2.4, 10.0])
    observation, *_ = env.step(1)
    np.testing.assert_allclose(observation, env.observation_space.high, rtol=1e-4)


def test_seeds():
    env = CustomGymnasiumEnv()
    first, second = env.reset(seed=5)[0], env.reset()[0]
    assert (np.abs(first) <= [0.5, 0.05]).all()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(env.reset(seed=5)[0], first)
    np.testing.assert_array_equal(env.reset()[0], second)
    assert not np.array_equal(env.reset(seed=6)[0], first)


def test_starts_fill_their_range():
    observation, _ = CustomGymnasiumVectorEnv(2000).reset(seed=0)
    for values, high in zip(observation.T, (0.5, 0.05), strict=True):
        assert -high <= values.min() < -0.99 * high
        assert 0.99 * high < values.max() <= high
        assert abs(values.mean()) < 0.06 * high  # standard error of the mean of 2000: 0.013 * high


def test_what_it_gives_out_is_not_its_own_buffer():
    env = started([0.1, 0.0])
    observation, *_ = env.step(1)
    kept = observation.copy()
    observation[:] = 99
    later, *_ = env.step(1)
    assert later[0] == pytest.approx(kept[0], abs=0.1)
    given = np.array([0.5, 0.0], dtype=np.float32)
    env.reset(options={"state": given})
    env.step(1)
    np.testing.assert_array_equal(given, [0.5, 0.0])


@pytest.mark.parametrize("action", [2, -1, 1.0, None, "left", np.array([1]), [0]])
def test_a_wrong_action_is_refused_and_changes_nothing(action):
    env = started([0.0, 0.0])
    with pytest.raises(InvalidAction, match=r"0 \(left\) or 1 \(right\)"):
        env.step(action)
    assert env.step(np.int32(1))[0][1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"State": [0, 0]}, "unknown reset option.*'State'"),
        ({"state": [2.5, 0]}, r"\|position\| <= 2.4"),
        ({"state": [0, 11]}, r"\|velocity\| <= 10"),
        ({"state": [0, np.nan]}, "velocity"),
        ({"state": [0, 0, 0]}, None),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CustomGymnasiumEnv().reset(options=options)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="dt must be > 0"):
        CustomGymnasiumEnv(dt=0)
    with pytest.raises(TypeError, match="gravity"):
        CustomGymnasiumEnv(gravity=9.8)
    with pytest.raises(ValueError, match="'human'"):
        CustomGymnasiumEnv(render_mode="human")
    with pytest.raises(ResetNeeded, match="call reset"):
        CustomGymnasiumEnv().step(0)
