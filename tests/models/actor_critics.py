"""Environments that have specs only, and agents whose output depends on the observation."""

import torch
from tensordict import TensorDict
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase

VECTOR = Unbounded((3,), dtype=torch.float32)


class Specs(EnvBase):
    """An environment that has specs only."""

    def __init__(self, observation, action):
        super().__init__(batch_size=())
        self.observation_spec = (
            observation if isinstance(observation, Composite) else Composite(observation=observation)
        )
        self.action_spec = action
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict=None, **kwargs): ...

    def _step(self, tensordict): ...

    def _set_seed(self, seed): ...


def enliven(agent):
    """Give the actor's head larger weights than it starts with, so that its output depends on the observation."""
    with torch.no_grad():
        for parameter in agent.joint.module[1 if agent.shared else 0].parameters():
            parameter.add_(torch.randn(parameter.shape))
    return agent


def batch(*shape, size=2):
    values = torch.randn(*shape, size, generator=torch.Generator().manual_seed(2))
    return TensorDict(observation=values, batch_size=shape)


def encoders(agent):
    """The encoder, or the actor's and the critic's."""
    actor, _, critic, _ = agent._parts
    return [actor.module] if agent.shared else [actor.module, critic.module]
