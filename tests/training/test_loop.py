"""`Pipeline`: what is collected, stored and updated, what is counted, and what each report says."""

import dataclasses
import math
import types

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from fp8rl_torchrl import OptimStep, Precision
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.recipes import ActorCriticConfig, build
from fp8rl_torchrl.training import LoopConfig, Pipeline, Report

# ------------------------------------------------------------------------------------------ hand-made collections


def rollout(returns, lengths, steps=4):
    """A collection ``[1, steps]`` in which episodes with these returns and lengths end, one a step."""
    done = torch.zeros(1, steps, 1, dtype=torch.bool)
    episode_reward, step_count = torch.full((1, steps, 1), 77.0), torch.full((1, steps, 1), 77)
    for place, (value, length) in enumerate(zip(returns, lengths, strict=True)):
        done[0, place], episode_reward[0, place], step_count[0, place] = True, value, length
    following = {"done": done, "episode_reward": episode_reward, "step_count": step_count}
    return TensorDict(
        {"observation": torch.rand(1, steps, 2), "unused": torch.rand(1, steps, 2), "next": following},
        batch_size=[1, steps],
    )


class FakeStep:
    """Returns prepared metrics and counts as `OptimStep` does."""

    precision = Precision("fp32")

    def __init__(self, metrics=()):
        self.metrics, self.batches = list(metrics), []
        self.updates, self.skipped_steps = torch.tensor(0), torch.tensor(0)

    def __call__(self, batch):
        self.batches.append(batch)
        metrics = TensorDict(self.metrics.pop(0) if self.metrics else {"loss": 0.0, "skipped": 0.0})
        if "skipped" in metrics.keys():
            self.updates += metrics["skipped"] == 0
            self.skipped_steps += metrics["skipped"] != 0
        return metrics


def pipeline_of(collections, step=None, **config):
    step = step or FakeStep()
    step.loss = types.SimpleNamespace(in_keys=["observation"])
    return Pipeline(
        env=None,
        agent=None,
        collector=collections,
        replay=TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=2),
        loss=step.loss,
        step=step,
        config=LoopConfig(**{"min_replay": 1, "updates_per_collection": 2, **config}),
    )


def test_a_report_counts_frames_and_episodes():
    collections = [rollout([], []), rollout([3.0], [5]), rollout([5.0, 10.0], [2, 4])]
    first, second, third = pipeline_of(collections, episodes=3)
    assert (first.frames, first.episodes, first.episode_returns) == (4, 0, ())
    assert math.isnan(first.episode_return)
    assert math.isnan(first.episode_length)
    assert (second.frames, second.episodes, second.episode_returns) == (8, 1, (3.0,))
    assert (second.episode_return, second.episode_length) == (3.0, 5.0)
    assert (third.frames, third.episodes, third.episode_returns) == (12, 3, (5.0, 10.0))
    assert third.episode_return == 6.0  # (3 + 5 + 10) / 3
    assert third.episode_length == pytest.approx(11 / 3)
    assert [report.updates for report in (first, second, third)] == [2, 4, 6]
    assert 0 < first.seconds < second.seconds < third.seconds


def test_the_mean_is_over_the_last_100_episodes():
    collections = [rollout([0.0] * 60, [1] * 60, 60), rollout([1.0] * 60, [3] * 60, 60)]
    _, report = pipeline_of(collections, episodes=120)
    assert report.episode_return == 0.6  # 40 zeros and 60 ones
    assert report.episode_length == pytest.approx((40 * 1 + 60 * 3) / 100)
    assert len(report.episode_returns) == 60


def test_the_budget_in_episodes_stops_after_the_collection_that_reaches_it():
    pipeline = pipeline_of([rollout([1.0], [1])] * 10, episodes=3)
    assert [report.episodes for report in pipeline] == [1, 2, 3]
    assert pipeline.finished
    assert list(pipeline) == []


def test_the_budget_in_frames_replaces_the_one_in_episodes():
    pipeline = pipeline_of([rollout([1.0], [1])] * 10, episodes=1, total_frames=18)
    assert [report.frames for report in pipeline] == [4, 8, 12, 16, 20]


def test_learning_starts_when_enough_is_stored():
    step = FakeStep()
    reports = list(pipeline_of([rollout([1.0], [1])] * 10, step, episodes=4, min_replay=9))
    assert [report.updates for report in reports] == [0, 0, 2, 4]  # 4, 8, 12, 16 stored
    assert [bool(report.metrics) for report in reports] == [False, False, True, True]


def test_the_buffer_holds_what_the_loss_reads_and_hands_out_batches():
    step, collections = FakeStep(), [rollout([1.0], [1])]
    pipeline = pipeline_of(collections, step, episodes=1)
    list(pipeline)
    assert len(pipeline.replay) == 4
    stored = pipeline.replay[:]
    assert torch.equal(stored["observation"], collections[0]["observation"][0])
    assert "unused" not in stored.keys()
    assert [batch.batch_size for batch in step.batches] == [torch.Size([2])] * 2


def test_metrics_are_averaged_over_applied_updates_alone():
    updates = [
        {"loss": 1.0, "grad_norm": 2.0, "skipped": 0.0, "loss_scale": 8.0},
        {"loss": float("inf"), "grad_norm": float("nan"), "skipped": 1.0, "loss_scale": 8.0},
        {"loss": 3.0, "grad_norm": 6.0, "skipped": 0.0, "loss_scale": 4.0},
        {"loss": 5.0, "grad_norm": 1.0, "skipped": 0.0, "loss_scale": 4.0},
    ]
    pipeline = pipeline_of([rollout([1.0], [1])], FakeStep(updates), episodes=1, updates_per_collection=4)
    (report,) = pipeline
    assert report.metrics == pytest.approx({"loss": 3.0, "grad_norm": 3.0, "skipped": 0.25, "loss_scale": 6.0})
    assert report.updates == 3
    assert report.skipped_steps == 1


def test_with_several_optimizers_an_update_counts_when_none_of_them_skipped():
    updates = [
        {"loss_a": 1.0, "loss_b": 1.0, "skipped_loss_a": 0.0, "skipped_loss_b": 0.0},
        {"loss_a": 9.0, "loss_b": float("nan"), "skipped_loss_a": 0.0, "skipped_loss_b": 1.0},
    ]
    step = FakeStep([{**update, "skipped": 0.0} for update in updates])
    (report,) = pipeline_of([rollout([1.0], [1])], step, episodes=1)
    assert report.metrics["loss_a"] == report.metrics["loss_b"] == 1.0
    assert report.metrics["skipped_loss_b"] == 0.5


def test_where_all_updates_were_skipped_there_is_no_mean():
    updates = [{"loss": float("inf"), "skipped": 1.0}] * 2
    (report,) = pipeline_of([rollout([1.0], [1])], FakeStep(updates), episodes=1)
    assert math.isnan(report.metrics["loss"])
    assert report.metrics["skipped"] == 1.0
    assert (report.updates, report.skipped_steps) == (0, 2)


# ------------------------------------------------------------------------------------------------- with real components

CONFIG = ActorCriticConfig(
    num_envs=4, frames_per_collection=64, min_replay=64, updates_per_collection=3, hidden=(8,), total_frames=64 * 14
)


def state_of(pipeline):
    return {name: value.tolist() for name, value in pipeline.agent.state_dict().items()}


def without_time(report):
    return repr(dataclasses.replace(report, seconds=0.0))


def test_leaving_early_and_iterating_again_continues():
    whole = build(CONFIG)
    expected = [without_time(report) for report in whole]

    pipeline, reports = build(CONFIG), []
    for stop_after in (1, 4, 100):
        for report in pipeline:
            reports.append(without_time(report))
            stop_after -= 1
            if not stop_after:
                break
    assert reports == expected
    assert len(reports) == 14
    assert state_of(pipeline) == state_of(whole)
    other = build(dataclasses.replace(CONFIG, seed=1))
    assert [without_time(report) for report in other] != expected, "the comparison must be able to fail"


def test_returns_and_lengths_of_a_real_environment():
    # So slow a mass stays where it starts: a step pays 0.1 + 1 - |x| / 2.4, and an episode has eight of them.
    env = CustomEnv(num_envs=4, seed=0, dt=1e-6, max_steps=8)
    policy = env.rand_action
    collector = Collector(env, policy, frames_per_batch=64, total_frames=-1, auto_register_policy_transforms=False)
    pipeline = pipeline_of([])
    pipeline.collector, pipeline.env = collector, env
    report = next(iter(pipeline))
    starts = env.fresh(seed=0)
    first, second = (starts.reset()["observation"][:, 0] for _ in range(2))
    expected = 8 * (
        1.1 - torch.stack((first, second), 1).abs() / 2.4
    )  # each environment plays two episodes in 16 steps
    assert torch.allclose(torch.tensor(report.episode_returns), expected.flatten(), atol=1e-4)
    assert report.episode_return == pytest.approx(expected.mean().item(), abs=1e-4)
    assert report.episode_length == 8.0
    assert report.episodes == 8


def test_the_counters_are_saved_and_restored():
    pipeline = build(CONFIG)
    reports = list(pipeline)
    assert reports[-1].episodes > 0
    fresh = build(CONFIG)
    fresh.load_state_dict(pipeline.state_dict())
    assert fresh.finished
    assert (fresh.frames, fresh.episodes, fresh.seconds) == (pipeline.frames, pipeline.episodes, pipeline.seconds)
    assert fresh._report((), {}).episode_return == reports[-1].episode_return
    assert fresh._report((), {}).episode_length == reports[-1].episode_length


def test_a_pipeline_of_the_users_own_parts():
    """Other environment, agent, loss and step than the recipe's go through the same loop."""
    env = CustomEnv(num_envs=2, seed=0, max_steps=6)
    agent = torch.nn.Linear(2, 1)

    class Loss(torch.nn.Module):
        in_keys = ("observation", ("next", "reward"))

        def forward(self, batch):
            error = agent(batch["observation"]).float() - batch["next", "reward"]
            return TensorDict(loss_value=error.square().mean())

    loss = Loss()
    step = OptimStep(loss, torch.optim.SGD(agent.parameters(), lr=0.01, fused=True), "fp32")
    collector = Collector(env, env.rand_action, frames_per_batch=16, total_frames=-1)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(64), batch_size=8)
    config = LoopConfig(total_frames=64, min_replay=16, updates_per_collection=8)
    reports = list(Pipeline(env, agent, collector, replay, loss, step, config))
    assert [report.updates for report in reports] == [8, 16, 24, 32]
    assert reports[-1].metrics["loss_value"] < reports[0].metrics["loss_value"]
    assert isinstance(reports[0], Report)


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", ["episodes", "updates_per_collection", "min_replay", "total_frames"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be >= 1; got {value}"):
        LoopConfig(**{name: value})


def test_reports_and_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoopConfig().episodes = 3
    report = next(iter(pipeline_of([rollout([1.0], [1])], episodes=1)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.frames = 3


def test_parts_that_do_not_belong_together_are_refused():
    def parts(config):
        pipeline = build(config)
        return [getattr(pipeline, name) for name in ("env", "agent", "collector", "replay", "loss", "step", "config")]

    mine, other = parts(CONFIG), parts(dataclasses.replace(CONFIG, seed=1))
    with pytest.raises(ValueError, match="the step updates another loss than the pipeline's"):
        Pipeline(*mine[:5], other[5], CONFIG)
    with pytest.raises(ValueError, match="no optimizer steps a parameter of the agent"):
        Pipeline(mine[0], other[1], *mine[2:])
    Pipeline(*mine)  # whose optimizer steps one flat parameter, of which the agent's are views
