"""`make`: our own environment natively, Gymnasium's in TorchRL, and fresh copies of either."""

import gymnasium
import numpy as np
import pytest
import torch
from counting import collect
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from torchrl.envs import EnvBase, TransformedEnv, check_env_specs

from fp8rl_torchrl.envs.classic_control import (
    AcrobotEnv,
    CartPoleEnv,
    MountainCarContinuousEnv,
    MountainCarEnv,
    PendulumEnv,
)
from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.envs.gym import GymnasiumEnv, is_native, make
from fp8rl_torchrl.envs.gymnasium_env import ENV_ID

pytestmark = pytest.mark.usefixtures("registered")


NATIVE = {
    "Acrobot-v1": AcrobotEnv,
    "CartPole-v1": CartPoleEnv,
    "MountainCar-v0": MountainCarEnv,
    "MountainCarContinuous-v0": MountainCarContinuousEnv,
    "Pendulum-v1": PendulumEnv,
}
CONTROL = [*NATIVE, "FrozenLake-v1"]


# ---- native where we have one


@pytest.mark.parametrize("name", ["CustomEnv", ENV_ID, f"fp8rl_torchrl.envs:{ENV_ID}"])
def test_our_own_environment_is_native(name):
    env = make(name, num_envs=3, seed=5, max_steps=7)
    assert type(env) is CustomEnv
    assert env.dynamics.max_steps == 7
    expected = CustomEnv(num_envs=3, seed=5).reset()["observation"]
    torch.testing.assert_close(env.reset()["observation"], expected)
    assert make(name).batch_size == ()


@pytest.mark.parametrize("prefix", ["", "fp8rl_torchrl:"])
@pytest.mark.parametrize("name", NATIVE)
def test_control_tasks_are_native(name, prefix):
    env = make(prefix + name, num_envs=3, seed=5, max_steps=7)
    assert type(env) is NATIVE[name]
    assert is_native(prefix + name)
    assert env.dynamics.max_steps == 7
    torch.testing.assert_close(env.reset()["observation"], NATIVE[name](num_envs=3, seed=5).reset()["observation"])
    assert make(prefix + name).batch_size == ()


@pytest.mark.parametrize("name", NATIVE)
def test_the_limit_of_an_episode_is_gymnasiums(name):
    assert make(name).dynamics.max_steps == gymnasium.spec(name).max_episode_steps


@pytest.mark.parametrize("name", ["FrozenLake-v1", "gymnasium:Pendulum-v1", "nowhere:Pendulum-v1", "Pendulum-v0"])
def test_what_is_not_native_is_not_called_so(name):
    assert not is_native(name)


# ---- Gymnasium's own


@pytest.mark.parametrize("num_envs", [None, 2])
@pytest.mark.parametrize("name", [*NATIVE, "CustomEnv", ENV_ID])
def test_without_native_it_is_gymnasiums_own_and_so_is_its_fresh_copy(name, num_envs):
    env = make(name, num_envs, seed=0, native=False)
    for each in (env, env.fresh(seed=1)):
        assert type(each) is GymnasiumEnv
        assert each.batch_size == (() if num_envs is None else (num_envs,))
        assert "state" not in each.reset().keys()


def test_an_id_can_ask_for_gymnasiums_own():
    start = make("gymnasium:CartPole-v1", num_envs=2, seed=3).reset()["observation"]
    torch.testing.assert_close(start, make("CartPole-v1", num_envs=2, seed=3, native=False).reset()["observation"])


@pytest.mark.parametrize("num_envs", [None, 1, 4])
@pytest.mark.parametrize("name", CONTROL)
def test_control_environments_run_in_a_collector(name, num_envs):
    env = make(name, num_envs, seed=0, native=False)
    assert isinstance(env, GymnasiumEnv)
    assert env.batch_size == (() if num_envs is None else (num_envs,))
    check_env_specs(env)
    data = collect(env, frames=60, batches=2)
    assert data["observation"].dtype == data["next", "reward"].dtype == data["next", "episode_reward"].dtype
    assert data["observation"].dtype == torch.float32
    assert data["step_count"].dtype == torch.int64
    single = gymnasium.make(name)
    if isinstance(single.action_space, spaces.Discrete):
        assert data["action"].dtype == torch.int64
        assert data["action"].shape == data.batch_size  # categorical, not one-hot
        assert set(data["action"].flatten().tolist()) == set(range(single.action_space.n))
    else:
        assert data["action"].dtype == torch.float32
        assert data["action"].shape == (*data.batch_size, *single.action_space.shape)
    for key in ("reward", "done", "terminated", "truncated", "step_count", "episode_reward"):
        assert data["next", key].shape == (*data.batch_size, 1)


@pytest.mark.parametrize("num_envs", [None, 2])
def test_bookkeeping_of_whole_episodes(num_envs):
    data = collect(make("CartPole-v1", num_envs, seed=0, native=False), frames=400)
    rows = data if num_envs else data[None]
    assert rows["next", "done"].sum() >= 10
    for row in rows:
        expected, total = 0, 0.0
        for step in row:
            assert step["step_count"].item() == expected
            expected, total = expected + 1, total + step["next", "reward"].item()
            assert step["next", "step_count"].item() == expected
            assert step["next", "episode_reward"].item() == total
            if step["next", "done"].item():
                expected, total = 0, 0.0


def test_a_discrete_observation_is_one_hot():
    data = collect(make("FrozenLake-v1", 2, seed=0, is_slippery=False), frames=200)
    observation = data["observation"]
    assert observation.shape == (2, 100, 16)
    assert (observation.sum(-1) == 1).all()
    starts = data["step_count"].squeeze(-1) == 0
    assert (observation[starts].argmax(-1) == 0).all()
    # left 0, down 1, right 2, up 3 on a 4 x 4 grid: right of field 0 is field 1
    moved = starts & (data["action"] == 2)
    assert moved.any()
    assert (data["next", "observation"][moved].argmax(-1) == 1).all()


@pytest.mark.parametrize("num_envs", [None, 3])
def test_seeds(num_envs):
    def episodes(seed):
        env = make("CartPole-v1", num_envs, seed=seed, native=False)
        torch.manual_seed(0)  # of the random actions
        return collect(env, frames=90)["observation"]

    torch.testing.assert_close(episodes(3), episodes(3), rtol=0, atol=0)
    assert not torch.isclose(episodes(3), episodes(4)).all(-1).any()
    if num_envs:
        first = make("CartPole-v1", num_envs, seed=3, native=False).reset()["observation"]
        assert len({tuple(row) for row in first.tolist()}) == num_envs


def test_without_a_seed_torch_decides():
    def first(torch_seed):
        torch.manual_seed(torch_seed)
        return make("CartPole-v1", native=False).reset()["observation"].tolist()

    assert first(0) == first(0) != first(1)


# ---- fresh copies


@pytest.mark.parametrize("num_envs", [None, 2])
def test_a_fresh_copy_is_independent(num_envs):
    env = make("CartPole-v1", num_envs, seed=0, native=False)
    twin = make("CartPole-v1", num_envs, seed=0, native=False)
    start = env.reset()
    twin.reset()
    copy = env.fresh(seed=9)
    assert copy.batch_size == env.batch_size
    torch.testing.assert_close(
        copy.reset()["observation"], make("CartPole-v1", num_envs, seed=9, native=False).reset()["observation"]
    )
    copy.rollout(30, break_when_any_done=False)
    action = torch.ones(env.batch_size, dtype=torch.int64)
    for _ in range(40):  # across ends of episodes: the copy has drawn nothing from this one's random streams
        step, expected = env.step(start.set("action", action)), twin.step(start.clone().set("action", action))
        torch.testing.assert_close(step["next", "observation"], expected["next", "observation"], rtol=0, atol=0)
        start = env.step_mdp(step) if not step["next", "done"].any() else env.reset()
        if step["next", "done"].any():
            twin.reset()
    assert env.fresh(num_envs=5).batch_size == (5,)
    assert not getattr(env, "stateless", False)


def test_a_wrapped_environment_can_have_what_an_id_cannot():
    pair = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Discrete(3)})
    env = make(FlattenObservation(gymnasium.make("test/Spaces-v0", observation=pair)))
    assert collect(env, frames=4)["observation"].shape == (4, 5)
    assert env.fresh(num_envs=2, seed=0).reset()["observation"].shape == (2, 5)


def test_a_fresh_copy_keeps_the_arguments():
    env = make("test/Count-v0", num_envs=2, length=4)
    assert env.fresh(num_envs=1).rollout(10)["next", "done"].shape[1] == 4


# ---- what is refused


@pytest.mark.gpu
@pytest.mark.parametrize("num_envs", [None, 3])
def test_tensors_live_on_the_device(num_envs):
    data = collect(make("test/Count-v0", num_envs, device="cuda"), frames=12)
    assert data["observation"].device.type == "cuda"
    assert data["next", "done"].sum() >= 2


def test_what_make_returns_is_a_torchrl_environment():
    env = make("CartPole-v1", 2, native=False)
    assert isinstance(env, EnvBase)
    assert isinstance(env, TransformedEnv)
    env.close()
