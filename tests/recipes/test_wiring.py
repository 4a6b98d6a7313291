"""The lines that every recipe begins and ends with: parts by name, rewards, observations, and the optimizer."""

import dataclasses

import pytest
import torch
from runs import REPLAYED, bits, record
from torch import nn
from torchrl.collectors import Collector

from fp8rl_torchrl import evaluate, recipes
from fp8rl_torchrl.data import FusedCollector
from fp8rl_torchrl.models.normalize import Normalize
from fp8rl_torchrl.precision import Twin
from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.recipes import (
    RECIPES,
    A2CConfig,
    ActorCriticConfig,
    DQNConfig,
    PPOConfig,
    RecipeConfig,
    ReinforceConfig,
    SACConfig,
    TD3Config,
    build,
    config_class,
)
from fp8rl_torchrl.training.flat import FlatParameter

ON_POLICY = {"num_envs": 4, "frames_per_collection": 16, "total_frames": 64, "hidden": (32, 32), "device": "cpu"}
EACH = [
    ActorCriticConfig(env="CartPole-v1", **REPLAYED),
    ReinforceConfig(env="CartPole-v1", **ON_POLICY),
    A2CConfig(env="CartPole-v1", **ON_POLICY),
    PPOConfig(env="CartPole-v1", batch_size=8, epochs=1, **ON_POLICY),
    DQNConfig(env="CartPole-v1", **REPLAYED),
    SACConfig(env="CartPole-v1", **REPLAYED),
    SACConfig(env="Pendulum-v1", **REPLAYED),
    TD3Config(env="Pendulum-v1", **REPLAYED),
]
each = pytest.mark.parametrize("config", EACH, ids=lambda config: f"{config.algo}-{config.env}")


# ------------------------------------------------------------------------------------------------------ by name


def test_every_recipe_is_here():
    assert {config.algo for config in EACH} == set(RECIPES)


@pytest.mark.parametrize("config", [RecipeConfig(), None, {"env": "CustomEnv"}, "actor-critic"])
def test_build_refuses_what_belongs_to_no_recipe(config):
    names = ", ".join(config_class.__name__ for config_class, _ in RECIPES.values())
    with pytest.raises(TypeError, match=f"build takes one of {names}; got {type(config).__name__}"):
        build(config)


def test_recipes_are_found_by_name():
    for name, (config, _) in RECIPES.items():
        assert config_class(name) is config
        assert config().algo == name
        assert config.__name__ in recipes.__all__
    with pytest.raises(ValueError, match="unknown algo 'ppo2'; use one of actor-critic, reinforce, a2c, ppo, dqn, sac"):
        config_class("ppo2")


# ---------------------------------------------------------------------------------------------------------- parts


@each
@pytest.mark.parametrize("collector", ["torchrl", "fused"])
def test_the_collector_is_the_one_named_and_runs_the_agents_policy(config, collector):
    pipeline = build(dataclasses.replace(config, collector=collector, compile="off"))
    assert type(pipeline.collector) is {"torchrl": Collector, "fused": FusedCollector}[collector]
    assert pipeline.collector.env is pipeline.env
    assert pipeline.collector.policy is pipeline.agent.policy
    (rollout, *_) = [collection for collection, _ in zip(pipeline.collector, range(1), strict=False)]
    assert rollout.shape == (4, 4)


@each
def test_low_precision_is_put_around_the_networks_from_outside(config):
    fp8 = build(dataclasses.replace(config, precision="fp8"))
    assert isinstance(fp8.collector.policy, Twin)
    converted = [each for each in fp8.conversion.layers if each.reason is None]
    assert len(converted) == sum(isinstance(module, Float8Linear) for module in fp8.agent.modules())
    bf16 = build(dataclasses.replace(config, precision="fp32", rollout_precision="bf16"))
    assert isinstance(bf16.collector.policy, Twin)
    assert bf16.conversion is None
    # the same parameters, and not copies of them
    for pipeline in (fp8, bf16):
        of_the_agent = {each.data_ptr() for each in pipeline.agent.parameters()}
        assert {each.data_ptr() for each in pipeline.collector.policy.parameters()} <= of_the_agent


@each
def test_each_optimizer_is_a_fused_adam_of_one_flat_parameter(config):
    step = build(dataclasses.replace(config, lr=0.25, max_grad_norm=7.0)).step
    assert step.max_grad_norm == 7.0
    trained = []
    for optimizer in step.optimizers.values():
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.defaults["fused"]
        (group,) = optimizer.param_groups
        assert group["lr"] == 0.25
        (flat,) = group["params"]
        assert type(flat) is FlatParameter
        trained += [id(view) for view in flat.views]
    assert len(trained) == len(set(trained))


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1.0] * 4),
        # over three updates to a half; the rates are those of updates 0, 1, 2, 3
        ("linear", [1.0, 5 / 6, 4 / 6, 0.5]),
        ("cosine", [1.0, 0.875, 0.625, 0.5]),  # 0.5 + 0.25 (1 + cos(pi k / 3))
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, factors):
    options = {"lr": 0.01, "lr_schedule": schedule, "lr_decay_updates": 3, "lr_final": 0.5}
    pipeline = build(A2CConfig(**ON_POLICY, **options))
    (group,) = pipeline.step.optimizers["loss"].param_groups
    rates = [float(group["lr"]) for _ in pipeline]
    assert rates == pytest.approx([0.01 * factor for factor in factors])


# --------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("options", "learned"),
    [
        ({}, 1.0),  # CartPole pays 1 for every step
        ({"reward_scale": 0.5}, 0.5),
        ({"reward_clip": 0.25}, 0.25),
        ({"reward_clip": 4.0}, 1.0),
        ({"reward_scale": 8.0, "reward_clip": 4.0}, 4.0),  # scaled, then clipped
        ({"reward_scale": 0.125, "reward_clip": 0.25}, 0.125),
    ],
)
def test_what_is_learned_from_is_rescaled_and_what_is_reported_is_not(options, learned):
    pipeline = build(DQNConfig(env="CartPole-v1", **{**REPLAYED, "total_frames": 16 * 8}, **options))
    batches, collections = record(pipeline)
    reports = list(pipeline)
    assert len(batches) == 24
    for batch in batches:
        assert batch["next", "reward"].unique().tolist() == [learned]
    for rollout, _ in collections:
        assert rollout["next", "reward"].unique().tolist() == [1.0], "the collection itself is left as it is"
    assert reports[-1].episodes > 0
    assert reports[-1].episode_return == reports[-1].episode_length


def test_negative_rewards_are_clipped_too():
    pipeline = build(TD3Config(env="Pendulum-v1", reward_scale=2.0, reward_clip=6.0, **REPLAYED))
    batches, collections = record(pipeline)
    list(pipeline)
    own = torch.cat([rollout["next", "reward"].flatten() for rollout, _ in collections])
    assert (own < -3).any(), "nothing to clip: this would prove nothing"
    assert (own > -3).any()
    expected = set((2 * own).clamp(-6, 6).tolist())
    assert {value for batch in batches for value in batch["next", "reward"].flatten().tolist()} <= expected
    assert min(batch["next", "reward"].min() for batch in batches) == -6


@each
def test_every_recipe_learns_from_rescaled_rewards(config):
    """Another scale is another batch; a scale of 1, and a clip that nothing reaches, are none at all."""
    ends = []
    for options in ({}, {"reward_scale": 1.0, "reward_clip": 1e9}, {"reward_scale": 0.125}):
        # normalised advantages would undo a scale
        more = {"normalize_advantage": False} if hasattr(config, "normalize_advantage") else {}
        if config.algo == "reinforce":  # a return is known once an episode has ended
            more["frames_per_collection"] = 160
        pipeline = build(dataclasses.replace(config, total_frames=32, **more, **options))
        batches, _ = record(pipeline)
        list(pipeline)
        ends.append(bits([list(batches[0].flatten_keys(".").values())]))
    assert ends[0] == ends[1]
    assert ends[0] != ends[2]


# ---------------------------------------------------------------------------------------------------- observations


@each
def test_statistics_are_updated_after_a_collections_updates_and_not_before(config):
    pipeline = build(dataclasses.replace(config, normalize_observation=True))
    statistics, seen, update = pipeline.agent.statistics, [], pipeline.step._update

    def recording(batch, compute_loss):
        seen.append(statistics.count.item())
        return update(batch, compute_loss)

    pipeline.step._update = recording
    _, collections = record(pipeline)
    for number, report in enumerate(pipeline):
        assert set(seen) == {16.0 * number}, "while it learned, the collection was not part of them"
        assert statistics.count == report.frames == 16 * (number + 1)
        seen.clear()
    observed = torch.cat([rollout["observation"].reshape(-1, len(statistics.mean)) for rollout, _ in collections])
    assert len(observed) == 64
    assert torch.allclose(statistics.mean, observed.double().mean(0))
    assert torch.allclose(statistics.variance, observed.double().var(0, correction=0))


@each
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_all_networks_normalise_by_the_same_statistics(config, precision, monkeypatch):
    """Those that act, learn, and are targets: TorchRL's losses keep their networks where `modules` does not look."""
    used, forward = [], Normalize.forward

    def recording(self, observation):
        used.append(self.statistics)
        return forward(self, observation)

    config = dataclasses.replace(config, precision=precision, rollout_precision=precision, normalize_observation=True)
    pipeline = build(config)
    statistics = pipeline.agent.statistics
    monkeypatch.setattr(Normalize, "forward", recording)
    next(iter(pipeline))
    assert len(used) > 4, "four steps, and the update"
    assert all(each is statistics for each in used)
    names = [name for name in pipeline.agent.state_dict() if "statistics" in name]
    assert names == ["statistics.mean", "statistics.variance", "statistics.count"], "saved once"


@each
def test_an_evaluation_leaves_the_statistics(config):
    pipeline = build(dataclasses.replace(config, normalize_observation=True))
    next(iter(pipeline))
    before = bits(dict(pipeline.agent.statistics.state_dict()))
    evaluate(pipeline.agent.policy, pipeline.env, episodes=2)
    assert bits(dict(pipeline.agent.statistics.state_dict())) == before
    next(iter(pipeline))
    assert bits(dict(pipeline.agent.statistics.state_dict())) != before, "the comparison must be able to fail"


@each
def test_without_normalisation_there_are_no_statistics(config):
    pipeline = build(config)
    assert pipeline.agent.statistics is None
    assert not any(isinstance(module, Normalize) for module in pipeline.agent.modules())


# --------------------------------------------------------------------------------------------------- other options


@pytest.mark.parametrize(("name", "layer"), [("tanh", nn.Tanh), ("relu", nn.ReLU)])
@each
def test_networks_have_the_layers_and_the_nonlinearity_asked_for(config, name, layer):
    agent = build(dataclasses.replace(config, activation=name, hidden=(24, 17))).agent
    assert any(isinstance(module, layer) for module in agent.modules())
    assert not any(isinstance(module, {"tanh": nn.ReLU, "relu": nn.Tanh}[name]) for module in agent.modules())
    widths = [module.out_features for module in agent.modules() if isinstance(module, nn.Linear)]
    assert {24, 17} <= set(widths)
