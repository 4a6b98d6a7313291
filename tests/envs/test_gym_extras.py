"""Environments of Gymnasium whose simulators are extras of this package: made, checked, or what to install."""

import sys

import pytest
import torch

from fp8rl_torchrl.envs import check_env
from fp8rl_torchrl.envs.gym import GymnasiumEnv, is_native, make

BOX2D, MUJOCO = ("LunarLander-v3", "Box2D"), ("HalfCheetah-v5", "mujoco")


@pytest.mark.parametrize("num_envs", [None, 2])
@pytest.mark.parametrize(("name", "simulator"), [BOX2D, MUJOCO])
def test_it_is_made_and_steps(name, simulator, num_envs):
    pytest.importorskip(simulator)
    env = make(name, num_envs, seed=0)
    assert type(env) is GymnasiumEnv
    assert not is_native(name)
    rollout = env.rollout(5, break_when_any_done=False)
    assert rollout.shape == ((5,) if num_envs is None else (num_envs, 5))
    assert rollout["observation"].dtype == torch.float32  # MuJoCo's are float64
    assert rollout["next", "reward"].isfinite().all()
    twin = make(name, num_envs, seed=0)
    torch.testing.assert_close(twin.reset()["observation"], env.fresh(seed=0).reset()["observation"])


def test_the_lander_has_four_actions_and_eight_numbers():
    pytest.importorskip("Box2D")
    env = make("LunarLander-v3", 2)
    assert env.action_spec.n == 4
    assert env.observation_spec["observation"].shape == (2, 8)


def test_the_cheetah_has_six_torques_and_seventeen_numbers():
    pytest.importorskip("mujoco")
    env = make("HalfCheetah-v5", 2)
    assert env.action_spec.shape == (2, 6)
    assert env.observation_spec["observation"].shape == (2, 17)


@pytest.mark.parametrize("num_envs", [None, 2])
@pytest.mark.parametrize(("name", "simulator", "options"), [(*BOX2D, {}), (*MUJOCO, {"max_episode_steps": 40})])
def test_it_passes_check_env(name, simulator, options, num_envs):
    pytest.importorskip(simulator)
    report = check_env(lambda: make(name, num_envs, **options), max_steps=150)
    assert report.ok
    assert report.episodes > 0


@pytest.mark.parametrize("prefix", ["", "gymnasium:"])
@pytest.mark.parametrize("num_envs", [None, 2])
@pytest.mark.parametrize(
    ("name", "simulator", "extra"),
    [
        ("LunarLander-v3", "Box2D", "box2d"),
        ("BipedalWalker-v3", "Box2D", "box2d"),
        ("HalfCheetah-v5", "mujoco", "mujoco"),
        ("Ant-v5", "mujoco", "mujoco"),
    ],
)
def test_a_missing_simulator_is_named_with_the_extra_that_brings_it(
    name, simulator, extra, num_envs, prefix, monkeypatch
):
    monkeypatch.setitem(sys.modules, simulator, None)
    for module in [each for each in sys.modules if each.startswith(f"gymnasium.envs.{extra}")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ValueError, match=rf"{name}.*pip install \"gymnasium\[{extra}\]\""):
        make(prefix + name, num_envs)


@pytest.mark.parametrize(("name", "simulator"), [BOX2D, MUJOCO])
def test_nothing_is_to_be_installed_where_something_else_is_wrong(name, simulator):
    pytest.importorskip(simulator)
    with pytest.raises(TypeError) as raised:
        make(name, colour=3)
    assert "pip install" not in str(raised.value)


@pytest.mark.parametrize("num_envs", [None, 2])
@pytest.mark.parametrize("name", ["LunarLander-v2", "gymnasium:LunarLander-v2"])
def test_the_retired_version_is_refused_with_the_one_to_use(name, num_envs):
    with pytest.raises(ValueError, match=r"'.*LunarLander-v2' is retired upstream, .* use `LunarLander-v3`"):
        make(name, num_envs)
