"""`ActorCritic` in TorchRL's own losses."""

import pytest
import torch
from torchrl.objectives import A2CLoss, ClipPPOLoss
from torchrl.objectives.value import GAE

from fp8rl_torchrl.envs.gym import make
from fp8rl_torchrl.models.actor_critic import ActorCritic


@pytest.mark.parametrize("make_loss", [A2CLoss, ClipPPOLoss])
def test_torchrls_losses_take_it(env, agent, make_loss):
    torch.manual_seed(0)
    rollout = env.rollout(40, agent.policy, break_when_any_done=False).detach()
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=agent.value)
    loss = make_loss(agent.policy, agent.value)
    with torch.no_grad():
        advantage(rollout)
    losses = loss(rollout.reshape(-1))
    total = sum(value for key, value in losses.items() if key.startswith("loss_"))
    total.backward()
    assert total.isfinite()
    for name, parameter in agent.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_torchrls_losses_take_continuous_actions():
    env = make("Pendulum-v1", num_envs=2, seed=0)
    agent = ActorCritic.for_env(env)
    rollout = env.rollout(20, agent.policy).detach()
    with torch.no_grad():
        GAE(gamma=0.99, lmbda=0.95, value_network=agent.value)(rollout)
    losses = ClipPPOLoss(agent.policy, agent.value)(rollout.reshape(-1))
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    assert all(parameter.grad.isfinite().all() for parameter in agent.parameters())
