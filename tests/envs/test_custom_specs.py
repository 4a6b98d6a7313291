"""`CustomEnv`: specs that hold for any constants, and arguments that are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import push, run, seesaw
from torchrl.data import Bounded
from torchrl.envs import check_env_specs

from fp8rl_torchrl.envs.custom import CustomEnv


@pytest.mark.parametrize("num_envs", [None, 1, 7])
def test_torchrl_checks_the_specs(num_envs):
    env = CustomEnv(num_envs=num_envs, seed=0)
    assert env.batch_size == (() if num_envs is None else (num_envs,))
    check_env_specs(env)


@pytest.mark.parametrize("num_envs", [None, 1, 7])
def test_every_entry_has_its_shape_and_dtype(num_envs):
    batch = () if num_envs is None else (num_envs,)
    env = CustomEnv(num_envs=num_envs, seed=0)
    data = env.rand_step(env.reset())
    entries = {
        "observation": ((2,), torch.float32),
        "step_count": ((1,), torch.int64),
        "episode_reward": ((1,), torch.float32),
        "done": ((1,), torch.bool),
        "terminated": ((1,), torch.bool),
        "truncated": ((1,), torch.bool),
        ("state", "position"): ((), torch.float32),
        ("state", "velocity"): ((), torch.float32),
        ("state", "seed"): ((), torch.int64),
        ("state", "index"): ((), torch.int64),
        ("state", "episode"): ((), torch.int64),
    }
    for where, extra in ((data.exclude("next"), {"action"}), (data["next"], {"reward"})):
        assert set(where.keys(True, True)) == set(entries) | extra
        for key, (shape, dtype) in entries.items():
            assert (where[key].shape, where[key].dtype) == (batch + shape, dtype), key
    assert (data["action"].shape, data["action"].dtype) == (batch, torch.int64)
    assert (data["next", "reward"].shape, data["next", "reward"].dtype) == ((*batch, 1), torch.float32)
    assert env.action_spec.n == 2


def assert_stays_in_specs(env, steps):
    for policy in (push(0), push(1), seesaw):
        for data in run(env, policy, steps).unbind(-1):
            assert env.observation_spec.is_in(data.select(*env.observation_spec.keys(True, True)))
            following = data["next"]
            assert env.observation_spec.is_in(following.select(*env.observation_spec.keys(True, True)))
            assert env.reward_spec.is_in(following["reward"])
            assert env.full_done_spec.is_in(following.select(*env.full_done_spec.keys(True, True)))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    dt=st.floats(0.01, 2),
    force=st.floats(1e-3, 100),
    damping=st.floats(0, 1),
    bound=st.floats(0.51, 100),
    target=st.floats(-1, 1),
    survival_reward=st.floats(-5, 5),
    max_steps=st.integers(1, 20),
)
def test_values_stay_in_their_specs_for_any_constants(dt, damping, bound, target, **others):
    env = CustomEnv(
        num_envs=2, seed=0, dt=dt, friction=0.999 * damping / dt, bound=bound, target=target * bound, **others
    )
    assert_stays_in_specs(env, steps=22)


def test_values_stay_in_their_specs_through_a_whole_episode():
    assert_stays_in_specs(CustomEnv(num_envs=2, seed=1), steps=205)


def test_a_bound_without_the_last_step_would_be_too_tight():
    env = CustomEnv(num_envs=2, seed=0)
    positions = run(env, push(1))["next", "state", "position"]
    assert positions.max() > env.dynamics.bound
    spec = env.observation_spec.clone()
    spec["state", "position"] = Bounded(-env.dynamics.bound, env.dynamics.bound, (2,), dtype=torch.float32)
    env.observation_spec = spec
    with pytest.raises(AssertionError):
        assert_stays_in_specs(env, steps=80)


def test_the_spec_of_the_return_has_room_for_the_rounding_of_a_long_sum():
    # 4,000 times 1.1 in float32 is 4400.1 by then; the bound of one reward times 4,000 is 4400.04.
    env = CustomEnv(seed=0, dt=1e-6, bound=1e9, max_steps=4000)
    reward, total = torch.tensor(1.1), torch.tensor(0.0)
    for _ in range(4000):
        total = total + reward
    assert total > 4000 * (1.1 + 1e-5)
    assert env.observation_spec["episode_reward"].is_in(total.reshape(1))


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"dt": 0.0}, "dt must be > 0"),
        ({"dt": float("nan")}, "dt must be > 0"),
        ({"force": -1.0}, "force must be > 0"),
        ({"friction": 20.0}, "friction must be >= 0 and friction \\* dt at most 1"),
        ({"bound": 0.4}, "bound must be > 0.5"),
        ({"target": 3.0}, "target must lie within the bound"),
        ({"max_steps": 0}, "max_steps must be an integer >= 1"),
        ({"num_envs": 0}, "num_envs must be a positive integer, or None"),
        ({"num_envs": -3}, "num_envs must be .* got -3"),
        ({"num_envs": 2.0}, "num_envs must be .* got 2.0"),
        ({"num_envs": True}, "num_envs must be .* got True"),
    ],
)
def test_bad_arguments_are_refused_by_name(constants, message):
    with pytest.raises(ValueError, match=message):
        CustomEnv(**constants)


def test_unknown_constants_are_refused_by_name():
    with pytest.raises(TypeError, match="no argument gravity; its constants are dt, force, friction"):
        CustomEnv(gravity=9.81)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_everything_lives_on_the_device(device):
    env = CustomEnv(num_envs=2, device=device, seed=0)
    rollout = run(env, steps=40)
    assert env.device.type == rollout.device.type == torch.device(device).type
    assert all(leaf.device.type == env.device.type for leaf in rollout.values(True, True))
    assert env.fresh().device == env.device
    assert torch.equal(rollout["observation"][:, 0].cpu(), CustomEnv(num_envs=2, seed=0).reset()["observation"])
