"""The default recipe: built of the parts it names, with the options it was given, and repeatable by its seed."""

import dataclasses

import pytest
import torch
from runs import PRECISIONS, check_resuming, finish, owned_bits, record, trained
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import TensorDictReplayBuffer

from fp8rl_torchrl import ActorCritic, OptimStep, Pipeline
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.objectives import ReplayedActorCriticLoss
from fp8rl_torchrl.recipes import ActorCriticConfig, build

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
        ({"replay_size": -1}, "replay_size must be >= 0; got -1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"lr_decay_updates": 0}, "lr_decay_updates must be >= 1"),
        ({"min_replay": 10_001}, "min_replay 10001 would never be stored in replay_size 10000"),
        ({"replay_size": 1000}, "replay_size must hold a collection, 1024 transitions"),
        ({"lr_final": -0.1}, r"lr_final must lie in \[0, 1\]"),
        ({"lr_final": 1.1}, r"lr_final must lie in \[0, 1\]"),
        ({"max_weight": 0.0}, "max_weight must be > 0"),
        ({"critic_coeff": -1.0}, "critic_coeff and entropy_coeff must be >= 0"),
        ({"entropy_coeff": -1.0}, "critic_coeff and entropy_coeff must be >= 0"),
        ({"two_optimizers": True}, "two_optimizers needs shared=False and entropy_coeff=0"),
        ({"two_optimizers": True, "shared": False}, "two_optimizers needs shared=False and entropy_coeff=0"),
        ({"two_optimizers": True, "entropy_coeff": 0.0}, "two_optimizers needs shared=False and entropy_coeff=0"),
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


def test_the_learning_rate_of_the_default_run_falls_over_7000_updates():
    assert (ActorCriticConfig().lr_schedule, ActorCriticConfig().lr_decay_updates) == ("linear", 7000)
    pipeline = build(dataclasses.replace(SMALL, lr=0.01))
    (group,) = pipeline.step.optimizers["loss"].param_groups
    list(pipeline)
    assert group["lr"].item() == pytest.approx(0.01 * (1 - 0.95 * 15 / 7000))


@pytest.mark.parametrize("coeff", [0.0, 0.05])
def test_an_entropy_bonus_of_0_is_no_loss(coeff):
    *_, report = build(dataclasses.replace(SMALL, entropy_coeff=coeff))
    assert ("loss_entropy" in report.metrics) == (coeff > 0)
    assert report.metrics["entropy"] > 0.6, "it is measured all the same"


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


# ------------------------------------------------------------------------------------------------- the online variant

ONLINE = ActorCriticConfig.variant("online", "CartPole-v1", total_frames=30, device="cpu", precision="fp32")
KEYS = ("loss_actor", "loss_critic")


def test_the_online_variant_has_two_networks_and_two_optimizers():
    pipeline = build(ONLINE)
    assert not pipeline.agent.shared
    widths = [layer.out_features for layer in pipeline.agent.modules() if isinstance(layer, nn.Linear)]
    assert sorted(widths) == sorted([128, 2, 128, 1])
    assert pipeline.replay is None
    assert tuple(pipeline.step.optimizers) == KEYS
    for key, part in zip(KEYS, (pipeline.agent.policy, pipeline.agent.value), strict=True):
        optimizer = pipeline.step.optimizers[key]
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.param_groups[0]["lr"] == 1e-3
        assert {id(leaf) for leaf in pipeline.step._gradients.leaves[key]} == {id(each) for each in part.parameters()}
    list(pipeline)
    assert {float(optimizer.param_groups[0]["lr"]) for optimizer in pipeline.step.optimizers.values()} == {1e-3}


def test_online_every_transition_is_learned_from_once_as_it_comes():
    pipeline = build(ONLINE)
    batches, collections = record(pipeline)
    reports = list(pipeline)
    learned = [batch["observation"].flatten().tolist() for batch in batches]
    collected = [rollout["observation"].flatten().tolist() for rollout, _ in collections]
    assert [(report.frames, report.updates) for report in reports] == [(n, n) for n in range(1, 31)]
    assert learned == collected
    assert len({tuple(each) for each in learned}) == 30
    assert len({report.metrics["entropy"] for report in reports}) > 20, "the policy that acts is the one that learns"
    assert all(report.metrics["importance_weight"] == pytest.approx(1, abs=1e-5) for report in reports)


def test_the_online_update_by_hand():
    """One-step TD: the critic's loss is half of half the squared error, the actor's the error times -log pi."""
    pipeline = build(dataclasses.replace(ONLINE, gamma=0.5))
    rollout = next(iter(pipeline.collector))
    with torch.no_grad():
        value, following = (pipeline.agent.value(each.clone())["state_value"] for each in (rollout, rollout["next"]))
    error = (rollout["next", "reward"] + 0.5 * following * ~rollout["next", "terminated"] - value).item()
    metrics = pipeline.step(rollout.select(*pipeline.loss.in_keys))
    assert metrics["loss_critic"].item() == pytest.approx(0.5 * 0.5 * error**2, rel=1e-5)
    assert metrics["loss_actor"].item() == pytest.approx(-error * rollout["action_log_prob"].item(), rel=1e-5)
    assert set(metrics.keys()) >= {"grad_norm_loss_actor", "grad_norm_loss_critic"}
    assert "loss_entropy" not in metrics.keys()


@pytest.mark.parametrize("overflowing", KEYS)
def test_online_an_overflow_of_one_loss_does_not_stop_the_other_optimizer(overflowing):
    pipeline = build(dataclasses.replace(ONLINE, precision="fp16", init_scale=64.0))
    next(iter(pipeline))
    (other,) = set(KEYS) - {overflowing}
    pipeline.step.scalers[overflowing]._scale.fill_(2.0**127)
    before = {key: owned_bits(pipeline, key) for key in KEYS}
    metrics = pipeline.step(next(iter(pipeline.collector)).select(*pipeline.loss.in_keys))
    assert (metrics[f"skipped_{overflowing}"], metrics[f"skipped_{other}"]) == (1, 0)
    assert owned_bits(pipeline, overflowing) == before[overflowing]
    assert owned_bits(pipeline, other) != before[other]
    assert {key: pipeline.step.scalers[key].get_scale() for key in KEYS} == {overflowing: 2.0**126, other: 64.0}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", [SMALL, ONLINE], ids=["replayed", "online"])
@pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")
def test_every_precision_runs(config, precision):
    options = {"precision": precision, "hidden": (32, 32), "init_scale": 64.0}
    _, reports = trained(dataclasses.replace(config, **options))
    assert reports[-1].updates == (16 if config is SMALL else 30)


def test_without_a_buffer_whole_collections_are_learned_from():
    pipeline = build(dataclasses.replace(SMALL, replay_size=0))
    assert [report.updates for report in pipeline] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (SMALL, {"normalize_observation": True, "lr_schedule": "cosine"}),
        (SMALL, {"replay_size": 0, "precision": "fp16", "init_scale": 64.0}),
        (ONLINE, {"collector": "torchrl"}),
        (ONLINE, {"collector": "fused", "precision": "fp16", "init_scale": 64.0, "growth_interval": 4}),
    ],
    ids=["statistics", "no replay", "online", "online fused"],
)
def test_a_resumed_run_ends_bit_identical(config, options, tmp_path):
    check_resuming(dataclasses.replace(config, compile="off", **options), tmp_path)


def test_another_seed_is_another_online_run():
    assert finish(build(ONLINE)) == finish(build(ONLINE)) != finish(build(dataclasses.replace(ONLINE, seed=1)))
