"""`ActorCritic`: which environments it fits, and which it refuses."""

import pytest
import torch
from actor_critics import VECTOR, Specs, batch, encoders
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, OneHot, Unbounded

from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.envs.gym import make
from fp8rl_torchrl.models.actor_critic import ActorCritic
from fp8rl_torchrl.models.networks import Float32Head


def test_hidden_gives_the_widths(env):
    layers = [module for module in ActorCritic.for_env(env, hidden=(32, 8)).modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(2, 32), (32, 8), (8, 2), (8, 1)]
    assert [type(layer) for layer in layers[2:]] == [Float32Head, Float32Head]


def test_continuous_actions_stay_in_their_bounds():
    env = make("Pendulum-v1", num_envs=2, seed=0)
    agent = ActorCritic.for_env(env)
    torch.manual_seed(0)
    actions = env.rollout(50, agent.policy)["action"]
    assert actions.shape == (2, 50, 1)
    assert actions.abs().max() <= 2
    assert actions.abs().max() > 1  # the bounds of ±2 are used, not ±1
    observed = agent.policy(TensorDict(observation=torch.randn(2000, 3), batch_size=[2000]))
    assert observed["action"].min() < -1.5
    assert observed["action"].max() > 1.5
    assert observed["action_log_prob"].isfinite().all()


def test_asymmetric_bounds_are_kept():
    bounds = Bounded(torch.tensor([-2.0, 5.0]), torch.tensor([-1.0, 10.0]))
    actions = ActorCritic.for_env(Specs(VECTOR, bounds)).policy(batch(500, size=3))["action"]
    assert actions[:, 0].min() >= -2
    assert actions[:, 0].max() <= -1
    assert actions[:, 1].min() >= 5
    assert actions[:, 1].max() <= 10


def pixel_encoder():
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 3, 10))


@pytest.mark.parametrize("key", ["observation", "pixels"])
@pytest.mark.parametrize("shared", [True, False])
def test_an_encoder_of_ones_own_for_pixels(key, shared):
    env = Specs(Composite({key: Bounded(0, 1, (3, 8, 8))}), Categorical(5, (), dtype=torch.int64))
    encoder = pixel_encoder()
    agent = ActorCritic.for_env(env, encoder=encoder, shared=shared)
    with pytest.raises(ValueError, match="normalize is for the encoder that is built here"):
        ActorCritic.for_env(env, encoder=encoder, shared=shared, normalize=True)
    output = agent.joint(TensorDict({key: torch.rand(6, 3, 8, 8)}, batch_size=[6]))
    assert output["logits"].shape == (6, 5)
    assert output["state_value"].shape == (6, 1)
    assert encoders(agent)[0] is encoder
    if not shared:  # a copy, with the same initial weights but its own
        assert encoders(agent)[1] is not encoder
        assert encoders(agent)[1][0].weight is not encoder[0].weight
        assert torch.equal(encoders(agent)[1][0].weight, encoder[0].weight)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (Bounded(0, 1, (3, 8, 8)), Categorical(2, ()), r"'observation' has shape \(3, 8, 8\).*pass encoder="),
        (Composite(pixels=Bounded(0, 1, (3, 8, 8))), Categorical(2, ()), r"'pixels' has shape .*pass encoder="),
        (Categorical(16, ()), Categorical(2, ()), r"'observation' has shape \(\).*pass encoder="),
        (Categorical(16, (3,)), Categorical(2, ()), r"'observation' holds torch.int64 numbers: pass encoder="),
        (
            Composite(position=VECTOR, velocity=VECTOR),
            Categorical(2, ()),
            r"no entry 'observation' .*only \['position', 'velocity'\]; gather .*CatTensors",
        ),
        (VECTOR, Unbounded((2,)), "unsupported action space Unbounded"),
        (VECTOR, Bounded(-torch.inf, torch.inf, (2,)), "the action space is unbounded .*needs finite bounds"),
        (VECTOR, MultiCategorical([3, 4]), "unsupported action space MultiCategorical"),
        (VECTOR, OneHot(4), "unsupported action space OneHot"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(observation, action, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ActorCritic.for_env(Specs(observation, action))


def test_a_missing_observation_is_named(agent):
    with pytest.raises(KeyError, match='"observation" not found'):
        agent.distribution_and_value(TensorDict(other=torch.ones(3, 2), batch_size=[3]))
    with pytest.raises(KeyError, match='"observation" not found'):
        agent.state_value(TensorDict(other=torch.ones(3, 2), batch_size=[3]))


def test_the_environment_is_not_stepped(env):
    before = CustomEnv(num_envs=4, seed=0).reset()["observation"]
    ActorCritic.for_env(env)
    assert torch.equal(env.reset()["observation"], before)
