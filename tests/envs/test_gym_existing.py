"""`make` with an environment that exists already: one, a batch, a batch of somebody else's."""

import gymnasium
import pytest
import torch
from counting import BOX, Count, collect, column
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from fp8rl_torchrl.envs.gym import GymnasiumEnv, make


def test_an_existing_single_environment():
    env = make(gymnasium.make("CartPole-v1"), seed=0)
    expected = make("CartPole-v1", seed=0, native=False)
    torch.testing.assert_close(env.reset()["observation"], expected.reset()["observation"])
    assert type(env.fresh(num_envs=2, seed=1)) is GymnasiumEnv
    assert env.fresh(num_envs=2).batch_size == (2,)
    assert make(gymnasium.spec("CartPole-v1"), num_envs=2).batch_size == (2,)


class Batch(VectorEnv):
    """Two counting environments of lengths 3 and 2, of somebody else's making: no subclass that we know."""

    def __init__(self, mode):
        self.env = SyncVectorEnv([lambda: Count(3), lambda: Count(2)], autoreset_mode=mode)
        self.metadata, self.num_envs = self.env.metadata, 2
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space
        self.single_observation_space, self.single_action_space = BOX, spaces.Discrete(2)
        self.masked = self.env.autoreset_mode == AutoresetMode.DISABLED

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options=options if self.masked else None)

    def step(self, actions):
        return self.env.step(actions)


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("wrap", [lambda env: env, RecordEpisodeStatistics])
def test_a_batch_of_somebody_elses(mode, wrap):
    env = make(wrap(Batch(mode)))
    data = collect(env, frames=12)
    assert column(data, "observation") == [[100, 101, 102, 200, 201, 202], [100, 101, 200, 201, 300, 301]]
    assert column(data, "next", "observation") == [[101, 102, 103, 201, 202, 203], [101, 102, 201, 202, 301, 302]]
    start = env.reset()
    before = start["observation"].clone()
    interrupted = start.set("_reset", torch.tensor([[True], [False]]))
    if mode == AutoresetMode.DISABLED:
        assert (env.reset(interrupted)["observation"] - before).tolist() == [[100], [0]]
    else:
        with pytest.raises(RuntimeError, match=r"cannot reset environments \[0\] in mid-episode"):
            env.reset(interrupted)


def test_existing_environments_that_are_refused():
    with pytest.raises(ValueError, match="cannot be reset one environment at a time"):
        make(Batch(AutoresetMode.NEXT_STEP))
    with pytest.raises(ValueError, match=r"CartPoleVectorEnv.*cannot be reset one environment at a time.*pass its id"):
        make(gymnasium.make_vec("CartPole-v1", num_envs=2))  # Gymnasium's own batch ignores a mask
    with pytest.raises(ValueError, match="exists already, with 2"):
        make(SyncVectorEnv([Count, Count]), num_envs=3)
    with pytest.raises(ValueError, match="length: arguments of an environment cannot be set"):
        make(Count(), length=3)
    with pytest.raises(TypeError, match="got int"):
        make(3)
    with pytest.raises(RuntimeError, match="pass make\\(\\) the id"):
        make(Count()).fresh()
