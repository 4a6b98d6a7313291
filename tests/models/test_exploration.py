"""`StateDependentNoise`: what it writes, worked out by hand, and how long it stays the same."""

import math

import pytest
import torch
from actor_critics import VECTOR, Specs
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical
from torchrl.envs.utils import ExplorationType, set_exploration_type

from fp8rl_torchrl.envs import PendulumEnv
from fp8rl_torchrl.models.actor_q import ActorQ
from fp8rl_torchrl.models.exploration import StateDependentNoise
from fp8rl_torchrl.recipes import SACConfig, build

BOX = Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]))
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


def test_no_log_probability_is_left_of_an_action_that_was_not_taken():
    env = PendulumEnv(num_envs=2, seed=0)
    agent = ActorQ.for_env(env, (16, 16), state_dependent_noise=True)
    with set_exploration_type(RANDOM):
        written = agent.policy(env.reset())
    assert "action_log_prob" not in written.keys()
    assert env.action_spec.is_in(written["action"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StateDependentNoise(4, 2, Categorical(3, (), dtype=torch.int64)), "needs a bounded continuous action"),
        (lambda: agent_of(noise=0.1, state_dependent_noise=True), "is for a stochastic actor"),
        (lambda: build(SACConfig.for_task("CartPole-v1", state_dependent_noise=True)), "continuous action"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_other_environments_are_refused():
    noise = StateDependentNoise(4, 2, BOX)
    with set_exploration_type(RANDOM), pytest.raises(ValueError, match="made for 4 environments side by side; got a b"):
        noise(parameters(3))


def test_the_recipe_explores_in_another_way_in_each_collection():
    options = {"num_envs": 4, "frames_per_collection": 128, "total_frames": 256, "min_replay": 1024}
    config = SACConfig(env="MountainCarContinuous-v0", device="cpu", state_dependent_noise=True, **options)
    pipeline = build(config)
    found = [pipeline.agent.exploration.weights.clone()]
    found += [pipeline.agent.exploration.weights.clone() for _ in pipeline]
    assert len(found) == 3
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
