"""What recipes hang into a `Pipeline`: what follows a collection, when its updates end, what is stored, priorities."""

import itertools
import types

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

from fp8rl_torchrl import Precision
from fp8rl_torchrl.data.replay import rollout_buffer
from fp8rl_torchrl.training import LoopConfig, Pipeline, loop


class CountingStep:
    """Counts as `OptimStep` does, keeps its batches, and lets a function say what an update returns."""

    precision = Precision("fp32")

    def __init__(self, returns=lambda number, batch: {}):
        self.returns, self.batches = returns, []
        self.updates, self.skipped_steps = torch.tensor(0), torch.tensor(0)

    def __call__(self, batch):
        self.batches.append(batch)
        metrics = {"loss": 0.0, "skipped": 0.0} | self.returns(len(self.batches), batch)
        skipped = any(value for name, value in metrics.items() if name.startswith("skipped"))
        self.updates += not skipped
        self.skipped_steps += skipped
        return TensorDict({name: torch.tensor(float(value)) for name, value in metrics.items()})


def numbered(collections, frames=8, ends=0):
    """Collections ``[1, frames]`` whose observations count on; the first ``ends`` steps of each end an episode."""
    for collection in range(collections):
        done = torch.zeros(1, frames, 1, dtype=torch.bool)
        done[:, :ends] = True
        following = {"done": done, "episode_reward": torch.ones(1, frames, 1), "step_count": torch.ones(1, frames, 1)}
        observation = torch.arange(frames).reshape(1, frames, 1) + collection * frames
        entries = {"observation": observation, "action": -observation, "next": following}
        yield TensorDict(entries, batch_size=[1, frames])


def pipeline_of(step, replay, *, collections=3, config=None, in_keys=("observation",), **hooks):
    step.loss = types.SimpleNamespace(in_keys=list(in_keys))
    return Pipeline(
        env=None,
        agent=None,
        collector=numbered(collections, ends=1),
        replay=replay,
        loss=step.loss,
        step=step,
        config=LoopConfig(
            **{"min_replay": 1, "updates_per_collection": 2, "total_frames": 8 * collections, **(config or {})}
        ),
        **hooks,
    )


def uniform():
    return TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=2)


def seen(batch):
    return batch["observation"].flatten().tolist()


# ------------------------------------------------------------------------------------------------ after_collection


def test_what_follows_a_collection_comes_after_its_updates_and_before_the_report_is_handed_out():
    step, events = CountingStep(), []

    def following(rollout, report):
        events.append(("followed", seen(rollout), report.frames, report.episodes, report.updates, int(step.updates)))

    for report in pipeline_of(step, uniform(), after_collection=following):
        events.append(("reported", report.frames))
    assert events == [
        ("followed", [*range(8)], 8, 1, 2, 2),
        ("reported", 8),
        ("followed", [*range(8, 16)], 16, 2, 4, 4),
        ("reported", 16),
        ("followed", [*range(16, 24)], 24, 3, 6, 6),
        ("reported", 24),
    ]


def test_it_follows_a_collection_without_updates_too():
    calls = []
    config = {"min_replay": 1000}
    following = lambda rollout, report: calls.append((report.updates, report.metrics))  # noqa: E731
    list(pipeline_of(CountingStep(), uniform(), config=config, after_collection=following))
    assert calls == [(0, {})] * 3


def test_it_is_given_the_collection_as_it_came():
    """What is learned from may be prepared; what follows a collection sees what was collected."""
    step, given = CountingStep(), []

    def prepare(rollout):
        return rollout.clone().set("observation", rollout["observation"] + 100)

    following = lambda rollout, report: given.extend(seen(rollout))  # noqa: E731
    list(pipeline_of(step, None, prepare=prepare, after_collection=following))
    assert given == [*range(24)]
    assert [seen(batch) for batch in step.batches] == [[*range(100, 108)], [*range(108, 116)], [*range(116, 124)]]


def test_its_time_counts_as_training():
    clock = itertools.count()
    pipeline = pipeline_of(CountingStep(), uniform(), collections=1)
    pipeline.after_collection = lambda rollout, report: [next(clock) for _ in range(100_000)]
    (report,) = pipeline
    assert report.seconds == pipeline.seconds > 0


# ---------------------------------------------------------------------------------------------------------- enough


def test_updates_end_early_once_it_is_enough():
    step = CountingStep(lambda number, batch: {"kl": number})
    asked = []

    def enough(losses):
        asked.append(losses["kl"].item())
        return losses["kl"].item() in (2, 3, 10)

    reports = list(pipeline_of(step, uniform(), config={"updates_per_collection": 5}, enough=enough))
    # the first collection ends after the second update, the next one after its first, the last one is never enough
    assert [report.updates for report in reports] == [2, 3, 8]
    assert asked == [1, 2, 3, 4, 5, 6, 7, 8], "asked after each update, of what it returned"
    assert reports[0].metrics["kl"] == 1.5, "the mean is over those that were done"


def test_nothing_is_asked_where_no_one_asks():
    reports = list(pipeline_of(CountingStep(), uniform(), config={"updates_per_collection": 5}))
    assert [report.updates for report in reports] == [5, 10, 15]


@pytest.fixture
def one_by_one(monkeypatch):
    """Of many batches, the buffer gathers some at once; here it does not, so that a pass can end in its middle."""
    monkeypatch.setattr(loop, "SAMPLED_TOGETHER", 1)


def chained(lists):
    return list(itertools.chain(*lists))


def stopping_early(replay):
    """Two passes of four minibatches; the first collection's end after three, in the middle of a pass."""
    step = CountingStep()
    enough = lambda losses: len(step.batches) == 3  # noqa: E731
    list(pipeline_of(step, replay, collections=2, config={"updates_per_collection": 8}, enough=enough))
    assert len(step.batches) == 3 + 8
    return [seen(batch) for batch in step.batches]


def test_after_an_early_end_the_next_pass_draws_every_transition_once(one_by_one):
    torch.manual_seed(0)
    batches = stopping_early(rollout_buffer(8, 2))
    assert set(chained(batches[:3])) < set(range(8))
    for epoch in (batches[3:7], batches[7:]):
        assert sorted(chained(epoch)) == [*range(8, 16)]


def test_what_was_left_of_the_pass_would_be_drawn(one_by_one):
    """Negative twin: without emptying the buffer, the next pass would begin with the rest of the last."""
    torch.manual_seed(0)
    replay = rollout_buffer(8, 2)
    replay.empty = lambda: None
    batches = stopping_early(replay)
    passes = [sorted(chained(batches[3:7])), sorted(chained(batches[7:]))]
    assert passes != [[*range(8, 16)]] * 2


def test_a_buffer_that_is_drawn_from_with_replacement_keeps_what_it_holds():
    replay = uniform()
    enough = lambda losses: True  # noqa: E731
    list(pipeline_of(CountingStep(), replay, enough=enough))
    assert len(replay) == 24


# ------------------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize("with_buffer", [True, False])
@pytest.mark.parametrize("keys", [None, ["action"], ["observation", ("next", "episode_reward")]])
def test_what_is_learned_from_is_what_is_named(keys, with_buffer):
    step = CountingStep()
    list(pipeline_of(step, uniform() if with_buffer else None, keys=keys))
    expected = set(keys or ["observation"]) | ({"index"} if with_buffer else set())
    for batch in step.batches:
        assert set(batch.keys(True, True)) - {"index"} == expected - {"index"}


def test_a_key_that_no_collection_has_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        list(pipeline_of(CountingStep(), uniform(), keys=["nothing"]))


# ------------------------------------------------------------------------------------------------------ priorities


def prioritized():
    return TensorDictPrioritizedReplayBuffer(
        alpha=1.0, beta=1.0, eps=0.0, storage=LazyTensorStorage(100), batch_size=4, priority_key="td_error"
    )


def priorities(replay):
    return [replay.sampler._sum_tree[index] for index in range(len(replay))]


def with_errors(skips=()):
    """Each update finds errors that are its number, and is skipped where it is one of some."""

    def returns(number, batch):
        batch.set("td_error", torch.full(batch.shape, float(number)))
        return {"skipped_b" if isinstance(skips, dict) else "skipped": number in skips}

    return CountingStep(returns)


def test_priorities_are_the_errors_of_the_last_update():
    torch.manual_seed(0)
    replay, step = prioritized(), with_errors()
    list(pipeline_of(step, replay, collections=1))
    expected = {}
    for number, batch in enumerate(step.batches, start=1):
        expected |= dict.fromkeys(seen(batch), float(number))
    found = dict(enumerate(priorities(replay)))
    assert {index: found[index] for index in expected} == expected
    assert {1.0, 2.0} == set(expected.values())


@pytest.mark.parametrize("skips", [(2,), {2: "by one of several optimizers"}])
def test_a_skipped_update_leaves_the_priorities(skips):
    torch.manual_seed(0)
    replay, step = prioritized(), with_errors(skips)
    list(pipeline_of(step, replay, collections=1))
    assert 2.0 not in priorities(replay)
    assert {priorities(replay)[index] for index in seen(step.batches[0])} == {1.0}


def test_other_buffers_are_not_asked_for_priorities():
    replay, step = uniform(), with_errors()
    replay.update_tensordict_priority = None
    list(pipeline_of(step, replay))
    assert len(step.batches) == 6
