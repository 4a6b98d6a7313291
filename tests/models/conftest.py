"""What the tests of models share."""

import pytest
import torch
from actor_critics import enliven

from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.models.actor_critic import ActorCritic


@pytest.fixture
def env():
    return CustomEnv(num_envs=4, seed=0)


@pytest.fixture(params=[True, False], ids=["shared", "separate"])
def agent(env, request):
    torch.manual_seed(0)
    return enliven(ActorCritic.for_env(env, hidden=(16, 16), shared=request.param))
