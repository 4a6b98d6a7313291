"""The default recipe: built of the parts it names, with the options it was given, and repeatable by its seed."""

import dataclasses

import pytest
import torch
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import TensorDictReplayBuffer

from fp8rl_torchrl import ActorCritic, OptimStep, Pipeline
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.objectives import ReplayedActorCriticLoss
from fp8rl_torchrl.recipes import ActorCriticConfig, build
from fp8rl_torchrl.recipes.schedules import lr_factor

SMALL = ActorCriticConfig(
    num_envs=4,
    frames_per_collection=64,
    total_frames=64 * 4,
    min_replay=64,
    updates_per_collection=4,
    hidden=(8,),
    device="cpu",
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_size": 0}, "replay_size must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"lr_decay_updates": 0}, "lr_decay_updates must be >= 1"),
        ({"min_replay": 10_001}, "min_replay 10001 would never be stored in replay_size 10000"),
        ({"replay_size": 1000}, "replay_size must hold a collection, 1024 transitions"),
        ({"lr_final": -0.1}, r"lr_final must lie in \[0, 1\]"),
        ({"lr_final": 1.1}, r"lr_final must lie in \[0, 1\]"),
        ({"max_weight": 0.0}, "max_weight must be > 0"),
        ({"critic_coeff": -1.0}, "critic_coeff and entropy_coeff must be >= 0"),
        ({"entropy_coeff": -1.0}, "critic_coeff and entropy_coeff must be >= 0"),
        ({"lr": 0.0}, "lr must be > 0"),  # the options that all recipes share are checked, too
        ({"num_envs": 0}, "num_envs must be >= 1"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ActorCriticConfig(**options)


def test_the_documented_defaults():
    config = ActorCriticConfig()
    assert (config.algo, config.replay_size, config.batch_size, config.shared) == ("actor-critic", 10_000, 64, True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_is_made_of_the_components_it_names(precision):
    """A native environment, an actor-critic with a shared encoder, collector, replay buffer, and a step with scaler."""
    pipeline = build(dataclasses.replace(SMALL, precision=precision, replay_size=500, batch_size=32))
    assert isinstance(pipeline, Pipeline)
    assert type(pipeline.env) is CustomEnv
    assert isinstance(pipeline.agent, ActorCritic)
    assert [layer.out_features for layer in pipeline.agent.modules() if isinstance(layer, nn.Linear)] == [8, 2, 1]
    assert type(pipeline.collector) is Collector
    assert pipeline.collector.env is pipeline.env
    assert isinstance(pipeline.replay, TensorDictReplayBuffer)
    assert isinstance(pipeline.loss, ReplayedActorCriticLoss)
    assert pipeline.loss.actor_critic is pipeline.agent
    assert isinstance(pipeline.step, OptimStep)
    assert pipeline.step.loss is pipeline.loss
    assert pipeline.step.precision.name == precision
    assert pipeline.step.scalers["loss"].is_enabled() == (precision == "fp16")
    next(iter(pipeline))
    assert pipeline.replay.sample().batch_size == (32,)
    pipeline.replay.extend(pipeline.replay.sample(600))
    assert len(pipeline.replay) == 500


def test_options_reach_the_part_they_are_for():
    config = dataclasses.replace(
        SMALL,
        gamma=0.5,
        max_weight=2.0,
        critic_coeff=0.25,
        entropy_coeff=0.125,
        lr=0.01,
        max_grad_norm=3.0,
        hidden=(16, 4),
        shared=False,
        lr_decay_updates=10,
        lr_final=0.5,
        rollout_precision="bf16",
    )
    pipeline = build(config)
    loss = pipeline.loss
    assert (loss.gamma, loss.max_weight, loss.critic_coeff, loss.entropy_coeff) == (0.5, 2.0, 0.25, 0.125)
    assert pipeline.step.max_grad_norm == 3.0
    assert pipeline.config is not config
    assert pipeline.config == config.resolved()
    widths = [layer.out_features for layer in pipeline.agent.modules() if isinstance(layer, nn.Linear)]
    assert sorted(widths) == sorted([16, 4, 2, 16, 4, 1]), "two encoders"
    (group,) = pipeline.step.optimizers["loss"].param_groups
    rates = []
    for report in pipeline:
        # the rate of the last update: 0.01 at the first, half of it from the tenth on
        rates.append((report.updates, group["lr"].item()))
    assert rates == [(n, pytest.approx(0.01 * (1 - 0.5 * min(n - 1, 10) / 10))) for n in (4, 8, 12, 16)]


def test_the_learning_rate_falls_linearly_to_its_end():
    factor = lr_factor("linear", 100, 0.2)
    updates = torch.tensor([0, 50, 100, 1000])
    assert torch.allclose(factor(updates), torch.tensor([1.0, 0.6, 0.2, 0.2]))


def result(config):
    pipeline = build(config)
    reports = [repr(dataclasses.replace(report, seconds=0.0)) for report in pipeline]
    return reports, {name: value.tolist() for name, value in pipeline.agent.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_seed_repeats_a_run_and_another_does_not(precision):
    config = dataclasses.replace(SMALL, precision=precision, seed=3)
    torch.manual_seed(1)
    first = result(config)
    torch.manual_seed(2)  # what was drawn before does not matter
    assert result(config) == first
    reports, parameters = result(dataclasses.replace(config, seed=4))
    assert reports != first[0]
    assert parameters != first[1]


def test_precisions_differ():
    """The same run in another precision is another run: autocast is on."""
    ends = [result(dataclasses.replace(SMALL, precision=precision))[1] for precision in ("fp32", "bf16", "fp16")]
    assert ends[0] != ends[1] != ends[2] != ends[0]


def test_it_trains_on_a_gymnasium_environment():
    *_, report = build(dataclasses.replace(SMALL, env="gymnasium:CartPole-v1"))
    assert report.frames == 256
    assert report.updates == 16
    assert 8 <= report.episode_length <= 60
    assert report.episode_return == report.episode_length  # CartPole pays 1 a step
