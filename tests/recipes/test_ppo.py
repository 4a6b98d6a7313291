"""The PPO recipe: its parts, its options and presets, its runs, and that a stopped run continues exactly."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from runs import everything, finish, interrupted
from torch import nn
from torchrl.collectors import Collector
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from fp8rl_torchrl import OptimStep
from fp8rl_torchrl.data import FusedCollector, PackedReplayBuffer
from fp8rl_torchrl.envs import CartPoleEnv, CustomEnv
from fp8rl_torchrl.objectives import JointClipPPOLoss, RolloutAdvantage
from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.recipes import PPOConfig, build
from fp8rl_torchrl.training.flat import FlatParameter

SMALL = PPOConfig(
    num_envs=4,
    frames_per_collection=64,
    total_frames=64 * 5,
    epochs=3,
    batch_size=16,
    hidden=(16,),
    device="cpu",
    precision="fp32",
)


# --------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1; got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1; got 0"),
        ({"batch_size": 500}, "batch_size must divide frames_per_collection; got 500 and 4096"),
        ({"batch_size": 8192}, "batch_size must divide frames_per_collection"),
        ({"updates_per_collection": 3}, "are not options of this recipe"),
        ({"batch_size": 1}, "a single transition has no advantages to normalize"),
        ({"clip_epsilon": 0.0}, "clip_epsilon must be > 0"),
        ({"clip_epsilon": math.nan}, "clip_epsilon must be > 0"),
        ({"critic_coeff": -1.0}, "_coeff must be >= 0"),
        ({"entropy_coeff": -1.0}, "_coeff must be >= 0"),
        ({"lmbda": 1.1}, r"lmbda must lie in \[0, 1\]"),
        ({"lr_final": -0.1}, r"lr_final must lie in \[0, 1\]"),
        ({"lr_decay_updates": 0}, "lr_decay_updates must be >= 1"),
        ({"gamma": 2.0}, r"gamma must lie in \[0, 1\]"),
        ({"env": "gymnasium:Acrobot-v1", "collector": "fused"}, "Acrobot-v1 has none: use torchrl"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_updates_follow_from_epochs_and_minibatches():
    config = PPOConfig(device="cpu").resolved()
    assert config.updates_per_collection == 32  # 4 epochs of 4096 / 512 minibatches
    assert config.lr_decay_updates == 32 * 123  # 500,000 frames in collections of 4096
    small = SMALL.resolved()
    assert (small.updates_per_collection, small.lr_decay_updates) == (3 * 4, 3 * 4 * 5)
    assert PPOConfig(updates_per_collection=32).updates_per_collection == 32


def test_resolving_twice_changes_nothing():
    for config in (PPOConfig(device="cpu"), SMALL, PPOConfig.for_task("CartPole-v1", device="cpu")):
        resolved = config.resolved()
        assert resolved.resolved() == resolved
        assert resolved.chosen("cpu")[1] == [], "nothing is left to choose"
        assert PPOConfig.from_dict(json.loads(json.dumps(resolved.to_dict()))) == resolved
        assert resolved != config


def test_presets():
    preset = PPOConfig.for_task("CartPole-v1")
    assert preset.env == "CartPole-v1"
    for name, value in PPOConfig.PRESETS["CartPole-v1"].items():
        assert getattr(preset, name) == value
    assert preset != PPOConfig(env="CartPole-v1")
    assert PPOConfig.for_task("CartPole-v1", seed=3, total_frames=2048) == dataclasses.replace(
        preset, seed=3, total_frames=2048
    )
    assert PPOConfig.for_task("CartPole-v1", collector="torchrl").collector == "torchrl"
    assert PPOConfig.for_task("Acrobot-v1", seed=3) == PPOConfig(env="Acrobot-v1", seed=3)
    with pytest.raises(ValueError, match="epochs must be >= 1"):
        PPOConfig.for_task("CartPole-v1", epochs=0)


# ----------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("collector", ["torchrl", "fused"])
def test_it_is_made_of_the_parts_it_names(collector):
    pipeline = build(dataclasses.replace(SMALL, collector=collector, compile="off"))
    assert type(pipeline.env) is CustomEnv
    assert type(pipeline.collector) is {"torchrl": Collector, "fused": FusedCollector}[collector]
    assert type(pipeline.replay) is PackedReplayBuffer
    assert type(pipeline.replay.sampler) is SamplerWithoutReplacement
    assert pipeline.replay.storage.max_size == 64
    assert type(pipeline.prepare) is RolloutAdvantage
    assert type(pipeline.loss) is JointClipPPOLoss
    assert pipeline.loss.actor_critic is pipeline.prepare.actor_critic is pipeline.agent
    assert type(pipeline.step) is OptimStep
    (flat,) = pipeline.step.optimizers["loss"].param_groups[0]["params"]
    assert type(flat) is FlatParameter
    assert {id(view) for view in flat.views} == {id(parameter) for parameter in pipeline.agent.parameters()}
    next(iter(pipeline))
    assert pipeline.replay.sample().batch_size == (16,)
    assert pipeline.step.updates == 12


def test_options_reach_the_part_they_are_for():
    config = dataclasses.replace(
        SMALL,
        gamma=0.5,
        lmbda=0.25,
        clip_epsilon=0.3,
        critic_coeff=0.125,
        entropy_coeff=0.0625,
        normalize_advantage=False,
        max_grad_norm=3.0,
        activation="relu",
        lr=0.01,
        lr_decay_updates=30,
        lr_final=0.5,
    )
    pipeline = build(config)
    loss = pipeline.loss
    assert (pipeline.prepare.gamma, pipeline.prepare.lmbda, pipeline.prepare.episode_ends) == (0.5, 0.25, 1)
    assert (loss.clip_epsilon, loss.critic_coeff, loss.entropy_coeff) == (0.3, 0.125, 0.0625)
    assert not loss.normalize_advantage
    assert pipeline.step.max_grad_norm == 3.0
    assert sum(isinstance(module, nn.ReLU) for module in pipeline.agent.modules()) == 1
    (group,) = pipeline.step.optimizers["loss"].param_groups
    rates = [group["lr"].item() for _ in pipeline]  # of the updates 12, 24, 36, ...
    assert rates == pytest.approx([0.01 * (1 - 0.5 * min(12 * n - 1, 30) / 30) for n in range(1, 6)])


def test_compiling_is_handed_on():
    pipeline = build(dataclasses.replace(SMALL, compile="on"))
    assert pipeline.step.compiled
    assert type(pipeline.collector) is FusedCollector
    assert pipeline.collector.compiled


def test_every_epoch_sees_every_transition_once():
    pipeline = build(SMALL)
    seen, update = [], pipeline.step._update

    def recording(batch, compute_loss):
        seen.append(batch["action_log_prob"].tolist())
        return update(batch, compute_loss)

    pipeline.step._update = recording
    next(iter(pipeline))
    epochs = [sorted(itertools.chain(*seen[4 * epoch : 4 * epoch + 4])) for epoch in range(3)]
    assert len(seen) == 12
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == 64
    assert seen[:4] != seen[4:8], "each epoch has an order of its own"


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("env", ["CustomEnv", "CartPole-v1", "gymnasium:Acrobot-v1", "Pendulum-v1"])
def test_it_runs(env):
    pipeline = build(dataclasses.replace(SMALL, env=env, total_frames=64 * 3))
    native = {"CustomEnv": CustomEnv, "CartPole-v1": CartPoleEnv}
    assert type(pipeline.env) is native.get(env, type(pipeline.env))
    before = {name: value.clone() for name, value in pipeline.agent.state_dict().items()}
    reports = list(pipeline)
    assert [report.updates for report in reports] == [12, 24, 36]
    assert {"loss_actor", "loss_critic", "loss_entropy", "kl", "clip_fraction"} <= set(reports[0].metrics)
    assert all(math.isfinite(value) for report in reports for value in report.metrics.values())
    after = pipeline.agent.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("collector", ["torchrl", "fused"])
def test_every_precision_runs(precision, collector):
    config = dataclasses.replace(
        SMALL, precision=precision, collector=collector, compile="off", hidden=(32, 32), init_scale=64.0
    )
    pipeline = build(config)
    assert any(isinstance(m, Float8Linear) for m in pipeline.agent.modules()) == (precision == "fp8")
    reports = list(pipeline)
    assert reports[-1].updates == 60
    assert reports[-1].skipped_steps == 0
    assert all(math.isfinite(value) for value in reports[-1].metrics.values())


def test_the_preset_runs_on_both_collectors():
    for collector in ("torchrl", "fused"):
        config = PPOConfig.for_task("CartPole-v1", device="cpu", collector=collector, compile="off")
        config = dataclasses.replace(config, total_frames=2 * config.frames_per_collection)
        pipeline = build(config)
        assert type(pipeline.env) is CartPoleEnv
        assert not pipeline.step.compiled
        reports = list(pipeline)
        assert reports[-1].updates == 2 * config.epochs * config.frames_per_collection // config.batch_size
        assert reports[-1].episodes > 10


def test_a_seed_repeats_a_run_and_another_does_not():
    first, again, other = (finish(build(dataclasses.replace(SMALL, seed=seed))) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("collector", ["torchrl", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_resumed_run_ends_bit_identical(collector, precision, stopped_after, tmp_path):
    config = dataclasses.replace(
        SMALL, collector=collector, compile="off", precision=precision, init_scale=64.0, growth_interval=20
    )
    whole = build(config)
    reports, expected = finish(whole), everything(whole)
    found, resumed = interrupted(config, tmp_path, stopped_after)
    assert found == reports
    actual = everything(resumed)
    for name in expected:
        assert actual[name] == expected[name], name


def test_with_other_random_streams_a_resumed_run_ends_elsewhere(tmp_path, monkeypatch):
    """Negative twin: minibatches in another order are noticed."""
    config = dataclasses.replace(SMALL, collector="fused", compile="off")
    whole = finish(build(config))
    monkeypatch.setattr("fp8rl_torchrl.training.checkpoint.GlobalRNGState", lambda: {"nothing": 0})
    found, _ = interrupted(config, tmp_path, 3)
    assert found != whole
