"""`Pipeline` without a replay buffer, with `prepare`, and with buffers that gather many batches at once."""

import types

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from fp8rl_torchrl import ActorCritic, OptimStep, Precision
from fp8rl_torchrl.data import PackedReplayBuffer, PackedStorage, replay_buffer, rollout_buffer
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.objectives import JointClipPPOLoss, RolloutA2CLoss, RolloutAdvantage
from fp8rl_torchrl.training import LoopConfig, Pipeline
from fp8rl_torchrl.training.loop import SAMPLED_TOGETHER


def rollout(start=0, envs=2, steps=3):
    """A collection ``[envs, steps]`` whose observations number the transitions from ``start`` on; nothing ends."""
    shape = (envs, steps)
    flags = {"done": torch.zeros(*shape, 1, dtype=torch.bool), "episode_reward": torch.zeros(*shape, 1)}
    following = {**flags, "step_count": torch.zeros(*shape, 1, dtype=torch.int64)}
    numbers = torch.arange(start, start + envs * steps, dtype=torch.float32).reshape(shape)
    return TensorDict({"observation": numbers, "unused": numbers, "next": following}, batch_size=shape)


class Recording:
    """A step that keeps what it is given, and when."""

    precision = Precision("fp32")

    def __init__(self, log=None):
        self.batches, self.log = [], log if log is not None else []
        self.updates, self.skipped_steps = torch.tensor(0), torch.tensor(0)

    def __call__(self, batch):
        self.log.append("update")
        self.batches.append(batch.clone())
        self.updates += 1
        return TensorDict(loss=torch.zeros(()), skipped=torch.zeros(()))


def pipeline_of(collections, replay=None, prepare=None, in_keys=("observation",), step=None, **config):
    config = {"min_replay": 1, "updates_per_collection": 1, "total_frames": 6 * len(collections), **config}
    step = step or Recording()
    step.loss = types.SimpleNamespace(in_keys=list(in_keys))
    return Pipeline(
        None,
        None,
        collections,
        replay,
        step.loss,
        step,
        LoopConfig(**config),
        prepare=prepare,
    )


# ------------------------------------------------------------------------------------------------------ no replay


def test_each_collection_is_handed_to_the_step_once_and_whole():
    collections = [rollout(0), rollout(6), rollout(12)]
    pipeline = pipeline_of(collections, updates_per_collection=5, min_replay=1000)
    reports = list(pipeline)
    assert [report.updates for report in reports] == [1, 2, 3]
    assert [report.frames for report in reports] == [6, 12, 18]
    for batch, collected in zip(pipeline.step.batches, collections, strict=True):
        assert batch.batch_size == (2, 3)
        assert torch.equal(batch["observation"], collected["observation"])
        assert list(batch.keys()) == ["observation"], "what the loss does not read stays behind"
    assert all("loss" in report.metrics for report in reports)


def test_with_a_replay_buffer_it_is_stored_instead():
    """Negative twin: the same loop with a buffer gives batches."""
    pipeline = pipeline_of([rollout()], TensorDictReplayBuffer(storage=LazyTensorStorage(6), batch_size=2))
    list(pipeline)
    assert [batch.batch_size for batch in pipeline.step.batches] == [(2,)]


def test_an_a2c_of_ones_own_parts_learns_on_whole_collections():
    torch.manual_seed(0)
    env = CustomEnv(num_envs=8, seed=0, max_steps=20)
    agent = ActorCritic.for_env(env, hidden=(16,))
    collector = Collector(
        env, agent.policy, frames_per_batch=8 * 16, total_frames=-1, auto_register_policy_transforms=False
    )
    loss = RolloutA2CLoss(agent)
    step = OptimStep(loss, torch.optim.Adam(agent.parameters(), lr=1e-3, fused=True), "fp32")
    pipeline = Pipeline(env, agent, collector, None, loss, step, LoopConfig(total_frames=128 * 4))
    reports = list(pipeline)
    assert [report.updates for report in reports] == [1, 2, 3, 4]
    # The loss sees a collection before the policy changes, so it measures the distance itself: there is none.
    assert all(report.metrics["rollout_ratio_error"] < 1e-4 for report in reports)
    collector.shutdown()


# -------------------------------------------------------------------------------------------------------- prepare


def test_a_collection_is_prepared_once_before_it_is_stored():
    log = []

    def prepare(collected):
        log.append("prepare")
        assert collected.batch_size == (2, 3)
        assert "unused" in collected.keys(), "it sees the whole collection"
        return collected.set("advantage", collected["observation"] * 2)

    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(6), batch_size=2)
    pipeline = pipeline_of(
        [rollout(0), rollout(6)],
        replay,
        prepare,
        in_keys=("observation", "advantage"),
        step=Recording(log),
        updates_per_collection=3,
    )
    list(pipeline)
    assert log == ["prepare", *["update"] * 3] * 2
    for batch in pipeline.step.batches:
        assert torch.equal(batch["advantage"], 2 * batch["observation"])
    assert sorted(replay[:]["observation"].tolist()) == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]


def test_what_prepare_returns_is_what_is_learned_from():
    pipeline = pipeline_of([rollout()], None, lambda collected: collected.apply(lambda entry: entry + 1))
    list(pipeline)
    assert pipeline.step.batches[0]["observation"].flatten().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_without_prepare_a_missing_entry_is_an_error():
    pipeline = pipeline_of([rollout()], in_keys=("observation", "advantage"))
    with pytest.raises(KeyError, match="advantage"):
        list(pipeline)


# -------------------------------------------------------------------------------------------------- many at once


class OneByOne(PackedReplayBuffer):
    """Negative twin of a buffer that gathers many batches: it has no such method."""

    sample_many = None


def drawn(make, updates, collections=3, seed=0):
    pipeline = pipeline_of([rollout(6 * k) for k in range(collections)], make(), updates_per_collection=updates)
    torch.manual_seed(seed)
    list(pipeline)
    return [batch["observation"].tolist() for batch in pipeline.step.batches]


def packed(kind=PackedReplayBuffer, sampler=None, size=6):
    options = {} if sampler is None else {"sampler": sampler()}
    return kind(storage=PackedStorage(size), batch_size=2, **options)


@pytest.mark.parametrize("sampler", [None, SamplerWithoutReplacement])
@pytest.mark.parametrize("updates", [1, 3, SAMPLED_TOGETHER, SAMPLED_TOGETHER + 1, 2 * SAMPLED_TOGETHER + 7])
def test_many_at_once_are_the_batches_that_come_one_by_one(updates, sampler):
    many = drawn(lambda: packed(sampler=sampler), updates)
    one = drawn(lambda: packed(OneByOne, sampler=sampler), updates)
    assert len(many) == 3 * updates
    assert many == one
    assert drawn(lambda: packed(sampler=sampler), updates, seed=1) != one


def test_as_many_are_gathered_as_the_loop_needs(monkeypatch):
    asked = []

    class Counting(PackedReplayBuffer):
        def sample_many(self, count, batch_size=None):
            asked.append(count)
            return super().sample_many(count, batch_size)

    drawn(lambda: packed(Counting), 2 * SAMPLED_TOGETHER + 7, collections=2)
    assert asked == [SAMPLED_TOGETHER, SAMPLED_TOGETHER, 7] * 2


def test_a_stock_buffer_draws_one_by_one():
    def stock():
        return TensorDictReplayBuffer(storage=LazyTensorStorage(6), batch_size=2)

    assert not hasattr(stock(), "sample_many")
    batches = drawn(stock, SAMPLED_TOGETHER + 3)
    assert len(batches) == 3 * (SAMPLED_TOGETHER + 3)
    assert {number for batch in batches[-SAMPLED_TOGETHER:] for number in batch} <= set(range(12, 18))


def test_passes_over_a_rollout_buffer_see_every_transition_once_a_pass():
    pipeline = pipeline_of(
        [rollout(0), rollout(6)], rollout_buffer(6, 2), updates_per_collection=3 * 4
    )  # four passes of three minibatches
    list(pipeline)
    numbers = [number for batch in pipeline.step.batches for number in batch["observation"].tolist()]
    for place in range(8):
        first = 0 if place < 4 else 6
        assert sorted(numbers[6 * place : 6 * place + 6]) == list(range(first, first + 6))
    assert numbers[:6] != numbers[6:12], "each pass has an order of its own"


def test_learning_still_waits_until_enough_is_stored():
    pipeline = pipeline_of([rollout(6 * k) for k in range(4)], replay_buffer(100, 2), min_replay=13)
    assert [report.updates for report in pipeline] == [0, 0, 1, 2]


@pytest.mark.parametrize("kind", ["packed", "stock"])
def test_a_ppo_of_ones_own_parts(kind):
    torch.manual_seed(0)
    env = CustomEnv(num_envs=4, seed=0, max_steps=20)
    agent = ActorCritic.for_env(env, hidden=(16,))
    collector = Collector(
        env, agent.policy, frames_per_batch=64, total_frames=-1, auto_register_policy_transforms=False
    )
    stock = TensorDictReplayBuffer(
        storage=LazyTensorStorage(64),
        sampler=SamplerWithoutReplacement(),
        batch_size=16,
    )
    replay = rollout_buffer(64, 16) if kind == "packed" else stock
    loss = JointClipPPOLoss(agent)
    step = OptimStep(loss, torch.optim.Adam(agent.parameters(), lr=1e-3, fused=True), "fp32")
    config = LoopConfig(total_frames=128, updates_per_collection=8, min_replay=1)
    pipeline = Pipeline(env, agent, collector, replay, loss, step, config, prepare=RolloutAdvantage(agent))
    reports = list(pipeline)
    assert [report.updates for report in reports] == [8, 16]
    assert {"loss_actor", "loss_critic", "kl", "clip_fraction"} <= set(reports[0].metrics)
    assert reports[0].metrics["kl"] > 0, "later minibatches see a policy that has changed"
    collector.shutdown()
