"""The A2C recipe: its parts, its options, its runs, and that a stopped run continues exactly."""

import dataclasses
import json
import math

import pytest
import torch
from runs import everything, finish, interrupted
from torch import nn
from torchrl.collectors import Collector

from fp8rl_torchrl import ActorCritic, OptimStep, Pipeline
from fp8rl_torchrl.data import FusedCollector
from fp8rl_torchrl.envs import CartPoleEnv, CustomEnv
from fp8rl_torchrl.objectives import RolloutA2CLoss
from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.recipes import A2CConfig, build
from fp8rl_torchrl.training.flat import FlatParameter

SMALL = A2CConfig(
    num_envs=4, frames_per_collection=64, total_frames=64 * 6, hidden=(16,), device="cpu", precision="fp32"
)
EAGER_FUSED = {"collector": "fused", "compile": "off"}


# --------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates_per_collection": 2}, "are not options of this recipe"),
        ({"min_replay": 2}, "are not options of this recipe"),
        ({"lmbda": -0.1}, r"lmbda must lie in \[0, 1\]; got -0.1"),
        ({"lmbda": 1.1}, r"lmbda must lie in \[0, 1\]"),
        ({"lmbda": math.nan}, r"lmbda must lie in \[0, 1\]"),
        ({"lr_final": 1.5}, r"lr_final must lie in \[0, 1\]"),
        ({"critic_coeff": -1.0}, "critic_coeff must be >= 0"),
        ({"entropy_coeff": -1.0}, "entropy_coeff must be >= 0"),
        ({"lr_decay_updates": 0}, "lr_decay_updates must be >= 1; got 0"),
        ({"num_envs": 1, "frames_per_collection": 1}, "a single transition has no advantages to normalize"),
        ({"num_envs": 1000}, "frames_per_collection must be a multiple of num_envs"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"env": "gymnasium:Pendulum-v1", "collector": "fused"}, "Pendulum-v1 has none: use torchrl"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        A2CConfig(**options)


def test_a_cuda_graph_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="cudagraph='on' needs a GPU; use auto or off"):
        build(dataclasses.replace(SMALL, cudagraph="on"))


def test_the_decay_lasts_as_long_as_the_run():
    # 3,000,000 frames in collections of 8192 are 367, the last one short of 6,464 frames more than asked.
    assert A2CConfig(device="cpu").resolved().lr_decay_updates == 367
    assert A2CConfig(device="cpu", lr_decay_updates=10).resolved().lr_decay_updates == 10
    by_episodes = A2CConfig(device="cpu", total_frames=None, episodes=1000, num_envs=4, frames_per_collection=64)
    assert by_episodes.resolved().lr_decay_updates == 1563  # 100,000 frames in collections of 64
    # A resumed run that is extended keeps the decay it started with.
    longer = dataclasses.replace(A2CConfig(device="cpu").resolved(), total_frames=10_000_000)
    assert longer.resolved().lr_decay_updates == 367


def test_resolving_twice_changes_nothing():
    for config in (A2CConfig(device="cpu"), SMALL, dataclasses.replace(SMALL, compile="on", total_frames=10**8)):
        resolved = config.resolved()
        assert resolved.resolved() == resolved
        assert resolved.chosen("cpu")[1] == [], "nothing is left to choose"
        assert A2CConfig.from_dict(json.loads(json.dumps(resolved.to_dict()))) == resolved
        assert resolved != config


# ----------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("collector", ["torchrl", "fused"])
def test_it_is_made_of_the_parts_it_names(collector):
    pipeline = build(dataclasses.replace(SMALL, collector=collector, compile="off", precision="bf16"))
    assert isinstance(pipeline, Pipeline)
    assert type(pipeline.env) is CustomEnv
    assert type(pipeline.agent) is ActorCritic
    assert type(pipeline.collector) is {"torchrl": Collector, "fused": FusedCollector}[collector]
    assert pipeline.collector.env is pipeline.env
    assert pipeline.replay is None
    rollout = next(iter(pipeline.collector))
    assert pipeline.prepare(rollout) is rollout, "the loss estimates the advantages"
    assert type(pipeline.loss) is RolloutA2CLoss
    assert pipeline.loss.actor_critic is pipeline.agent
    assert type(pipeline.step) is OptimStep
    assert not pipeline.step.compiled
    (flat,) = pipeline.step.optimizers["loss"].param_groups[0]["params"]
    assert type(flat) is FlatParameter
    assert {id(view) for view in flat.views} == {id(parameter) for parameter in pipeline.agent.parameters()}
    assert any(isinstance(module, nn.ReLU) for module in pipeline.agent.modules())


def test_options_reach_the_part_they_are_for():
    config = dataclasses.replace(
        SMALL,
        gamma=0.5,
        lmbda=0.25,
        critic_coeff=0.125,
        entropy_coeff=0.0625,
        normalize_advantage=False,
        max_grad_norm=3.0,
        hidden=(16, 4),
        activation="tanh",
        lr=0.01,
        lr_decay_updates=4,
        lr_final=0.5,
    )
    pipeline = build(config)
    loss = pipeline.loss
    assert (loss.advantage.gamma, loss.advantage.lmbda, loss.critic_coeff, loss.entropy_coeff) == (
        0.5,
        0.25,
        0.125,
        0.0625,
    )
    assert not loss.normalize_advantage
    assert pipeline.step.max_grad_norm == 3.0
    assert [m.out_features for m in pipeline.agent.modules() if isinstance(m, nn.Linear)] == [16, 4, 2, 1]
    assert sum(isinstance(module, nn.Tanh) for module in pipeline.agent.modules()) == 2
    (group,) = pipeline.step.optimizers["loss"].param_groups
    rates = [group["lr"].item() for _ in pipeline]
    assert rates == pytest.approx([0.01 * (1 - 0.5 * min(n, 4) / 4) for n in range(6)])


def test_compiling_is_handed_on():
    pipeline = build(dataclasses.replace(SMALL, compile="on"))
    assert pipeline.step.compiled
    assert pipeline.collector.compiled  # auto takes the fused collector where the run is compiled
    assert not pipeline.step.captured
    assert not pipeline.collector.captured


@pytest.mark.parametrize(("steps", "ends"), [(1, 1), (200, 1), (201, 2), (400, 2), (401, 3)])
def test_truncations_are_bounded_by_the_length_of_an_episode(steps, ends):
    """An episode of CustomEnv has at most 200 steps: 1 + (T - 1) // 200 can be truncated in T steps."""
    config = dataclasses.replace(SMALL, num_envs=2, frames_per_collection=2 * steps)
    assert build(config).loss.advantage.episode_ends == ends


def test_of_other_environments_the_number_of_truncations_is_not_known():
    assert build(dataclasses.replace(SMALL, env="gymnasium:Acrobot-v1")).loss.advantage.episode_ends is None


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("env", ["CustomEnv", "CartPole-v1", "gymnasium:Acrobot-v1", "Pendulum-v1"])
def test_it_runs(env):
    config = dataclasses.replace(SMALL, env=env, total_frames=64 * 3)
    pipeline = build(config)
    native = {"CustomEnv": CustomEnv, "CartPole-v1": CartPoleEnv}
    assert type(pipeline.env) is native.get(env, type(pipeline.env))
    before = {name: value.clone() for name, value in pipeline.agent.state_dict().items()}
    reports = list(pipeline)
    assert [report.frames for report in reports] == [64, 128, 192]
    assert [report.updates for report in reports] == [1, 2, 3]
    assert {"loss_actor", "loss_critic", "loss_entropy", "rollout_kl", "grad_norm"} <= set(reports[0].metrics)
    assert all(math.isfinite(value) for report in reports for value in report.metrics.values())
    assert all(report.metrics["rollout_ratio_error"] < 1e-4 for report in reports), (
        "the policy is the one that collected"
    )
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
    assert pipeline.step.scalers["loss"].is_enabled() == (precision == "fp16")
    assert any(isinstance(m, Float8Linear) for m in pipeline.agent.modules()) == (precision == "fp8")
    assert (pipeline.conversion is not None) == (precision == "fp8")
    reports = list(pipeline)
    assert reports[-1].updates == 6
    assert reports[-1].skipped_steps == 0
    assert all(math.isfinite(value) for value in reports[-1].metrics.values())


def test_both_collectors_give_the_same_run():
    """Streams of the environments and of the actions are the same, so learning is."""
    ends = []
    for collector in ("torchrl", "fused"):
        pipeline = build(dataclasses.replace(SMALL, collector=collector, compile="off"))
        torch.manual_seed(0)  # TorchRL's collector draws some actions while it is built
        list(pipeline)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in pipeline.agent.parameters()]))
    assert torch.allclose(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_a_seed_repeats_a_run_and_another_does_not():
    first, again, other = (finish(build(dataclasses.replace(SMALL, seed=seed))) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("collector", ["torchrl", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stopped_after", [1, 4])
def test_a_resumed_run_ends_bit_identical(collector, precision, stopped_after, tmp_path):
    config = dataclasses.replace(
        SMALL, collector=collector, compile="off", precision=precision, total_frames=64 * 7, init_scale=64.0,
        growth_interval=3,
    )  # fmt: skip
    whole = build(config)
    reports, expected = finish(whole), everything(whole)
    found, resumed = interrupted(config, tmp_path, stopped_after)
    assert found == reports
    actual = everything(resumed)
    for name in expected:
        assert actual[name] == expected[name], name


def test_without_the_live_step_a_resumed_run_ends_elsewhere(tmp_path, monkeypatch):
    """Negative twin: episodes that start anew are noticed."""
    config = dataclasses.replace(SMALL, **EAGER_FUSED)
    whole = finish(build(config))
    load = FusedCollector.load_state_dict

    def forgetful(self, state):
        load(self, {**state, "live_step": self._carrier.to_dict()})

    monkeypatch.setattr(FusedCollector, "load_state_dict", forgetful)
    found, _ = interrupted(config, tmp_path, 3)
    assert found != whole


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one():
    ends = []
    for compile in ("off", "on"):
        pipeline = build(dataclasses.replace(SMALL, collector="fused", compile=compile))
        reports = list(pipeline)
        assert [report.updates for report in reports] == [1, 2, 3, 4, 5, 6]
        ends.append(torch.cat([parameter.detach().flatten() for parameter in pipeline.agent.parameters()]))
    assert torch.allclose(ends[0], ends[1], rtol=1e-3, atol=1e-4)
