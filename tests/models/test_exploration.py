"""`StateDependentNoise`: what it writes, worked out by hand, and how long it stays the same."""

import dataclasses
import math

import pytest
import torch
from actor_critics import VECTOR, Specs
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical
from torchrl.envs.utils import ExplorationType, set_exploration_type

from fp8rl_torchrl.envs import PendulumEnv
from fp8rl_torchrl.models.actor_critic import ActorCritic
from fp8rl_torchrl.models.actor_q import ActorQ
from fp8rl_torchrl.models.exploration import StateDependentNoise
from fp8rl_torchrl.recipes import A2CConfig, PPOConfig, SACConfig, build

BOX = Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]))
CAR = "MountainCarContinuous-v0"
RANDOM, DETERMINISTIC = ExplorationType.RANDOM, ExplorationType.DETERMINISTIC


def parameters(envs=1, features=(3.0, 4.0), loc=0.25, scale=0.5):
    return TensorDict(
        _hidden=torch.tensor([features] * envs),
        loc=torch.full((envs, 2), loc),
        scale=torch.full((envs, 2), scale),
        batch_size=[envs],
    )


def test_the_action_by_hand():
    """Features (3, 4) point to (0.6, 0.8): u is 0.6 · 1 + 0.8 · 2 = 2.2 and 0.6 · -1 + 0.8 · 0.5 = -0.2."""
    noise = StateDependentNoise(1, 2, BOX)
    noise.weights.copy_(torch.tensor([[[1.0, -1.0], [2.0, 0.5]]]))
    with set_exploration_type(RANDOM):
        action = noise(parameters())["action"][0].tolist()
    expected = [2 * math.tanh(0.25 + 0.5 * 2.2), 5 + 5 * math.tanh(0.25 - 0.5 * 0.2)]
    assert action == pytest.approx(expected, abs=1e-5)
    with set_exploration_type(DETERMINISTIC):
        mode = noise(parameters())["action"][0].tolist()
    assert mode == pytest.approx([2 * math.tanh(0.25), 5 + 5 * math.tanh(0.25)], abs=1e-5)


def test_a_state_has_one_action_until_the_next_draw():
    noise = StateDependentNoise(3, 2, BOX)
    with set_exploration_type(RANDOM):
        first, again = noise(parameters(3))["action"].clone(), noise(parameters(3))["action"].clone()
        noise.resample()
        later = noise(parameters(3))["action"].clone()
    assert torch.equal(first, again)
    assert not (first == later).any()
    assert not torch.equal(first[0], first[1])  # each environment explores in its own way


def test_its_size_does_not_depend_on_the_features():
    """Before it is squashed the noise is a standard Normal: of 20,000, mean 0 and variance 1."""
    torch.manual_seed(0)
    noise = StateDependentNoise(10_000, 2, BOX)
    for features in ((3.0, 4.0), (1e-3, -2e-3)):
        noise.resample()
        with set_exploration_type(RANDOM):
            action = noise(parameters(10_000, features, loc=0.0, scale=0.3))["action"]
        unit = torch.stack([action[:, 0] / 2, (action[:, 1] - 5) / 5]).atanh() / 0.3
        assert unit.mean().item() == pytest.approx(0.0, abs=0.03)
        assert unit.var().item() == pytest.approx(1.0, abs=0.04)


def agent_of(**options):
    torch.manual_seed(0)
    return ActorQ.for_env(Specs(VECTOR, BOX), (16, 16), **options)


def test_it_explores_unless_told_otherwise():
    noise = StateDependentNoise(3, 2, BOX)
    default = noise(parameters(3))["action"].clone()
    with set_exploration_type(RANDOM):
        assert torch.equal(default, noise(parameters(3))["action"])
    with set_exploration_type(DETERMINISTIC):
        assert not torch.equal(default, noise(parameters(3))["action"])


@pytest.mark.parametrize("explores", [True, False])
def test_without_noise_the_policy_is_the_actor(explores):
    agent = agent_of(state_dependent_noise=explores)
    seen = TensorDict(observation=torch.randn(5, 3), batch_size=[5])
    with set_exploration_type(DETERMINISTIC):
        assert torch.equal(agent.policy(seen.copy())["action"], agent.actor(seen.copy())["action"])
    assert ("exploration.weights" in agent.state_dict()) == explores


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_log_probability_is_that_of_the_squashed_normal(scale):
    """By hand, with x = 0.25 + scale · u: log N(x) - log(half the interval · (1 - tanh² x)), over both components."""
    noise = StateDependentNoise(1, 2, BOX)
    noise.weights.copy_(torch.tensor([[[1.0, -1.0], [2.0, 0.5]]]))
    with set_exploration_type(RANDOM):
        written = noise(parameters(scale=scale))
    expected = 0.0
    for u, half in ((2.2, 2.0), (-0.2, 5.0)):
        density = math.exp(-(u**2) / 2) / (scale * math.sqrt(2 * math.pi))
        expected += math.log(density / (half * (1 - math.tanh(0.25 + scale * u) ** 2)))
    assert written["action_log_prob"].item() == pytest.approx(expected, abs=0.02 if scale > 1 else 1e-4)


@pytest.mark.parametrize("agent", [ActorQ, ActorCritic])
def test_the_policy_gives_the_taken_action_the_log_probability_that_it_stores(agent):
    env = PendulumEnv(num_envs=2, seed=0)
    agent = agent.for_env(env, (16, 16), state_dependent_noise=True)
    with set_exploration_type(RANDOM):
        written = agent.policy(env.reset())
    assert env.action_spec.is_in(written["action"])
    again = agent.policy.get_dist(written.select("observation")).log_prob(written["action"])
    assert torch.equal(again, written["action_log_prob"])


@pytest.mark.parametrize("shared", [True, False])
def test_an_actor_critic_explores_by_it_and_its_losses_do_not_see_it(shared):
    torch.manual_seed(0)
    env = PendulumEnv(num_envs=3, seed=0)
    agent = ActorCritic.for_env(env, (16, 16), shared, state_dependent_noise=True)
    seen = TensorDict(observation=torch.randn(3, 3), batch_size=[3])
    with set_exploration_type(RANDOM):
        first, again = (agent.policy(seen.copy())["action"] for _ in range(2))
        agent.exploration.resample()
        later = agent.policy(seen.copy())["action"]
        drawn = {agent.joint(seen.copy())["action"][0].item() for _ in range(2)}
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert len(drawn) == 2  # joint samples at every call
    with set_exploration_type(DETERMINISTIC):
        assert torch.equal(agent.policy(seen.copy())["action"], agent.joint(seen.copy())["action"])
    many = TensorDict(observation=torch.randn(7, 5, 3), batch_size=[7, 5])
    assert agent.distribution_and_value(many)[1].shape == (7, 5, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StateDependentNoise(4, 2, Categorical(3, (), dtype=torch.int64)), "needs a bounded continuous action"),
        (lambda: agent_of(noise=0.1, state_dependent_noise=True), "is for a stochastic actor"),
        (lambda: build(SACConfig.for_task("CartPole-v1", state_dependent_noise=True)), "continuous action"),
        (lambda: build(PPOConfig.for_task("CartPole-v1", state_dependent_noise=True)), "continuous action"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_other_environments_are_refused():
    noise = StateDependentNoise(4, 2, BOX)
    with set_exploration_type(RANDOM), pytest.raises(ValueError, match="made for 4 environments side by side; got a b"):
        noise(parameters(3))


SMALL = {"num_envs": 4, "frames_per_collection": 128, "total_frames": 256, "device": "cpu", "collector": "torchrl"}
EACH = [SACConfig(**SMALL, env=CAR, min_replay=1024), PPOConfig(**SMALL, env=CAR, batch_size=64)]


@pytest.mark.parametrize("config", [*EACH, A2CConfig(**SMALL, env=CAR)], ids=["sac", "ppo", "a2c"])
def test_the_recipe_explores_in_another_way_in_each_collection(config):
    pipeline = build(dataclasses.replace(config, state_dependent_noise=True))
    found = [pipeline.agent.exploration.weights.clone()]
    found += [pipeline.agent.exploration.weights.clone() for _ in pipeline]
    assert len(found) == 3
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_what_ppo_collects_is_as_likely_to_the_learner():
    """The gap between rollout and learner is nothing in FP32, and seen where they differ."""
    config = dataclasses.replace(EACH[1], state_dependent_noise=True)
    gaps = {}
    for precision in ("fp32", "bf16"):
        options = {"precision": precision, "rollout_precision": "fp32"}
        *_, report = build(dataclasses.replace(config, **options))
        gaps[precision] = report.metrics["rollout_ratio_error"]
    assert gaps["fp32"] < 1e-5 < gaps["bf16"]
