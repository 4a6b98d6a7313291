"""The PPO recipe: its parts, its options and presets, its runs, and that a stopped run continues exactly."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from runs import check_resuming, everything, finish, interrupted, record
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
        ({"clip_final": 0.0}, "clip_final must be > 0; got 0.0"),
        ({"max_kl": 0.0}, "max_kl must be > 0; got 0.0"),
        ({"max_kl": math.nan}, "max_kl must be > 0"),
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
    assert PPOConfig.for_task("Untuned-v0", seed=3) == PPOConfig(env="Untuned-v0", seed=3)
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
    assert type(pipeline.loss) is JointClipPPOLoss
    assert pipeline.loss.actor_critic is pipeline.agent
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
    rollout = next(iter(pipeline.collector))
    expected = RolloutAdvantage(pipeline.agent, gamma=0.5, lmbda=0.25, episode_ends=1)(rollout.clone())
    other = RolloutAdvantage(pipeline.agent, gamma=0.5, lmbda=0.5, episode_ends=1)(rollout.clone())
    found = pipeline.prepare(rollout.clone())
    for name in ("advantage", "value_target"):
        assert torch.equal(found[name], expected[name])
        assert not torch.equal(found[name], other[name])
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


# ----------------------------------------------------------------------------------------- early stop and annealing


def counts(pipeline):
    """The updates of each collection."""
    total = [0, *(report.updates for report in pipeline)]
    return [after - before for before, after in itertools.pairwise(total)]


def test_updates_end_once_the_new_policy_is_far_from_the_old_one():
    """The first update's policy is the old one; the second finds it moved, and is the last where that is too far."""
    assert counts(build(dataclasses.replace(SMALL, max_kl=1e-9))) == [2] * 5
    assert counts(build(dataclasses.replace(SMALL, max_kl=1e9))) == [12] * 5
    assert counts(build(SMALL)) == [12] * 5
    between = counts(build(dataclasses.replace(SMALL, max_kl=1e-3, lr=3e-2)))
    assert all(2 <= count <= 12 for count in between)
    assert len(set(between)) > 1


def test_the_last_update_of_a_collection_is_the_first_that_was_too_far():
    pipeline = build(dataclasses.replace(SMALL, max_kl=1e-3, lr=3e-2))
    found, update = [], pipeline.step._update

    def recording(batch, compute_loss):
        losses = update(batch, compute_loss)
        found.append(losses["kl"].item())
        return losses

    pipeline.step._update = recording
    ended_early = 0
    for _ in pipeline:
        assert all(kl <= 1e-3 for kl in found[:-1])
        ended_early += len(found) < 12
        assert found[-1] > 1e-3 or len(found) == 12
        found.clear()
    assert ended_early


def test_a_limit_that_is_never_reached_changes_nothing():
    assert finish(build(dataclasses.replace(SMALL, max_kl=1e9))) == finish(build(SMALL))


@pytest.mark.parametrize("batch_size", [16, 1])
def test_after_an_early_end_every_transition_is_drawn_once_again(batch_size):
    """Also with minibatches so many that the buffer does not gather a pass at once."""
    config = dataclasses.replace(SMALL, max_kl=1e-9, batch_size=batch_size, normalize_advantage=False)
    pipeline = build(dataclasses.replace(config, total_frames=128))
    next(iter(pipeline))
    assert pipeline.step.updates < 64
    pipeline.enough = None
    batches, collections = record(pipeline)
    next(iter(pipeline))
    seen = [batch["observation"][:, 0].tolist() for batch in batches]
    collected = collections[0][0]["observation"][..., 0].flatten().tolist()
    size = 64 // batch_size
    assert len(seen) == 3 * size
    for epoch in range(3):
        drawn = itertools.chain(*seen[size * epoch : size * (epoch + 1)])
        assert sorted(drawn) == sorted(collected)


def test_the_clip_falls_by_hand():
    pipeline = build(dataclasses.replace(SMALL, epochs=1, clip_epsilon=0.4, clip_final=0.1))
    assert pipeline.loss.clip_epsilon == pytest.approx(0.4)
    # 20 updates in five collections
    found = [pipeline.loss.clip_epsilon.item() for _ in pipeline]
    assert found == pytest.approx([0.34, 0.28, 0.22, 0.16, 0.1])


def test_the_clip_falls_as_long_as_the_learning_rate_does_and_stays():
    config = dataclasses.replace(SMALL, epochs=1, clip_epsilon=0.4, clip_final=0.1, lr_decay_updates=8)
    assert clips(config) == pytest.approx([0.25, 0.1, 0.1, 0.1, 0.1])
    rising = dataclasses.replace(config, clip_epsilon=0.1, clip_final=0.2)
    assert clips(rising) == pytest.approx([0.15, 0.2, 0.2, 0.2, 0.2])
    assert clips(dataclasses.replace(config, clip_final=None)) == pytest.approx([0.4] * 5)


def clips(config):
    pipeline = build(config)
    return [pipeline.loss.clip_epsilon.item() for _ in pipeline]


def test_the_annealed_clip_is_what_the_loss_clips_by():
    pipeline = build(dataclasses.replace(SMALL, clip_epsilon=0.9, clip_final=1e-6, lr=0.03))
    *_, last = pipeline
    plain = build(dataclasses.replace(SMALL, clip_epsilon=0.9, lr=0.03))
    *_, other = plain
    # before the last collection, a fifth of 0.9 was left
    assert last.metrics["clip_fraction"] > other.metrics["clip_fraction"] == 0


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


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("collector", ["torchrl", "fused"])
@pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")
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


@pytest.mark.parametrize("collector", ["torchrl", "fused"])
def test_a_resumed_run_with_annealing_and_statistics_ends_bit_identical(collector, tmp_path):
    options = {"clip_epsilon": 0.4, "clip_final": 0.1, "max_kl": 1e-3, "normalize_observation": True, "lr": 0.03}
    config = dataclasses.replace(SMALL, collector=collector, compile="off", lr_schedule="cosine", **options)
    whole = check_resuming(config, tmp_path)
    assert 10 < whole.step.updates < 60, "some collections' updates ended early"
    assert whole.agent.statistics.count == 320
    assert whole.loss.clip_epsilon < 0.4


def test_with_other_random_streams_a_resumed_run_ends_elsewhere(tmp_path, monkeypatch):
    """Negative twin: minibatches in another order are noticed."""
    config = dataclasses.replace(SMALL, collector="fused", compile="off")
    whole = finish(build(config))
    monkeypatch.setattr("fp8rl_torchrl.training.checkpoint.GlobalRNGState", lambda: {"nothing": 0})
    found, _ = interrupted(config, tmp_path, 3)
    assert found != whole
