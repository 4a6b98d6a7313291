"""What the losses need of a model: who offers it, and the entropy of its distribution."""

import inspect
import math

import pytest
import torch
from tabular import Table
from torch.distributions import Categorical, Normal
from torchrl.modules import TanhNormal
from whole_rollouts import agent_and_rollout, custom_env

from fp8rl_torchrl.models.actor_critic import ActorCritic
from fp8rl_torchrl.objectives.joint_model import JointModel, entropy_of


def missing(model, example):
    """What a class or its instance lacks of the protocol."""
    names = [name for name in vars(JointModel) if not name.startswith("_")]
    return [name for name in names if not hasattr(model, name) and not hasattr(example, name)]


def test_the_actor_critic_and_the_table_are_joint_models():
    agent, rollout = agent_and_rollout(custom_env())
    assert not missing(ActorCritic, agent)
    assert not missing(Table, Table([[0.0]], [0.0]))
    assert missing(torch.nn.Linear, torch.nn.Linear(1, 1)) == ["value", "distribution_and_value", "state_value"]
    for name in ("distribution_and_value", "state_value"):
        assert next(iter(inspect.signature(getattr(agent, name)).parameters)) == "tensordict"
    distribution, value = agent.distribution_and_value(rollout)
    assert distribution.batch_shape == rollout.shape
    assert value.shape == agent.state_value(rollout).shape == (*rollout.shape, 1)


def test_the_entropy_of_a_categorical_is_its_formula():
    entropy = entropy_of(Categorical(probs=torch.tensor([[0.25, 0.75], [0.5, 0.5]])))
    assert entropy.tolist() == pytest.approx([0.5623351, math.log(2)], rel=1e-6)


def test_the_entropy_is_float32():
    distribution = Normal(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    entropy = entropy_of(distribution)
    assert entropy.dtype == torch.float32
    assert entropy.tolist() == pytest.approx([0.5 * math.log(2 * math.pi * math.e)] * 3, rel=1e-6)


def test_the_entropy_of_a_tanh_normal_is_estimated_by_a_reparametrised_sample():
    # With a scale of 0.01 at 0, tanh is the identity: the entropy is log 0.01 + 0.5 log(2 pi e), its slope by the scale
    # 100. The standard deviation of the mean of 40,000 is 0.004.
    scale = torch.tensor(0.01, requires_grad=True)
    distribution = TanhNormal(torch.zeros(40_000, 1), scale.expand(40_000, 1), tanh_loc=False)
    torch.manual_seed(0)
    entropy = entropy_of(distribution)
    assert entropy.shape == (40_000,)
    assert entropy.mean().item() == pytest.approx(math.log(0.01) + 0.5 * math.log(2 * math.pi * math.e), abs=0.02)
    (slope,) = torch.autograd.grad(entropy.mean(), scale)
    assert slope.item() == pytest.approx(100, abs=2)
