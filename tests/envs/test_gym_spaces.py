"""`make`: which spaces it takes, in which form, and which it refuses."""

import gymnasium
import numpy as np
import pytest
import torch
from counting import BOX, Spaces, collect
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from torchrl.envs import check_env_specs

from fp8rl_torchrl.envs.gym import make

pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.parametrize(
    ("observation", "named"),
    [
        (spaces.Dict({"a": BOX}), "Dict"),
        (spaces.Tuple([BOX]), "Tuple"),
        (spaces.MultiDiscrete([2, 3]), "MultiDiscrete"),
        (spaces.MultiBinary(3), "MultiBinary"),
        (spaces.Text(3), "Text"),
        (spaces.Sequence(BOX), "Sequence"),
    ],
)
@pytest.mark.parametrize("num_envs", [None, 2])
def test_unsupported_observations_are_refused_by_name(observation, named, num_envs):
    with pytest.raises(ValueError, match=f"test/Spaces-v0: observations of the space {named} are not supported"):
        make("test/Spaces-v0", num_envs, observation=observation)


@pytest.mark.parametrize(
    "action",
    [
        spaces.MultiDiscrete([2, 3]),
        spaces.Dict({"a": BOX}),
        spaces.Tuple([BOX]),
        spaces.MultiBinary(2),
        spaces.Box(0, 5, (2,), np.int64),
    ],
)
@pytest.mark.parametrize("num_envs", [None, 2])
def test_unsupported_actions_are_refused_by_name(action, num_envs):
    with pytest.raises(
        ValueError, match=f"test/Spaces-v0: actions of the space {type(action).__name__}.* are not supported"
    ):
        make("test/Spaces-v0", num_envs, action=action)
    with pytest.raises(ValueError, match="actions of the space"):
        make(SyncVectorEnv([lambda: Spaces(action=action)]))


def test_a_refused_environment_is_not_touched():
    env = Spaces(action=spaces.MultiBinary(2))
    env.reset = env.close = None
    with pytest.raises(ValueError, match="MultiBinary"):
        make(env)
    assert env.actions == []
    for space in (spaces.Discrete(3), spaces.Dict({"a": BOX})):
        with pytest.raises(ValueError, match="exists already"):
            make(SyncVectorEnv([lambda space=space: Spaces(space)]))


@pytest.mark.parametrize("num_envs", [None, 1, 2])
@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (3,), np.float64),
        spaces.Box(0, 255, (4,), np.uint8),
        spaces.Box(-5, 5, (2,), np.int64),
        spaces.Box(-np.inf, np.inf, (3,), np.float16),
        spaces.Box(-1, 1, (), np.float32),
        spaces.Discrete(5, start=2),
    ],
)
def test_vector_observations_become_float32(space, num_envs):
    env = make("test/Spaces-v0", num_envs, observation=space)
    check_env_specs(env)
    data = collect(env, frames=12)
    assert data["observation"].dtype == torch.float32
    size = 5 if isinstance(space, spaces.Discrete) else int(np.prod(space.shape))
    assert data["observation"].shape[-1] == size
    assert env.observation_spec["observation"].shape[-1] == size


@pytest.mark.parametrize("num_envs", [None, 2])
def test_images_pass_unchanged(num_envs):
    env = make("test/Spaces-v0", num_envs, observation=spaces.Box(0, 255, (8, 8, 3), np.uint8))
    check_env_specs(env)
    data = collect(env, frames=4)
    assert data["observation"].dtype == torch.uint8
    assert data["observation"].shape[-3:] == (8, 8, 3)
    assert data["observation"].float().std() > 30


@pytest.mark.parametrize("num_envs", [None, 2])
def test_actions_arrive_as_the_environment_wants_them(num_envs):
    class Wants(Spaces):
        def step(self, action):
            assert self.action_space.contains(action), (action, self.action_space)
            return super().step(action)

    for action in (
        spaces.Discrete(3, start=4),
        spaces.Box(-2, 2, (3,), np.float64),
        spaces.Box(-1, 1, (1,), np.float32),
    ):
        gymnasium.register("test/Wants-v0", Wants, disable_env_checker=True)
        env = make("test/Wants-v0", num_envs, action=action)
        assert env.action_spec.dtype == (torch.int64 if isinstance(action, spaces.Discrete) else torch.float32)
        collect(env, frames=20)
        del gymnasium.registry["test/Wants-v0"]
