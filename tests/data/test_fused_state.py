"""A `FusedCollector`'s state: saved and restored, its weights, and memory that nothing else shares."""

import pytest
import torch
from gathering import (
    ENVS,
    CustomEnv,
    FusedCollector,
    agent,
    assert_own_memory,
    assert_same,
    assert_same_batches,
    build,
    no_policy,
    take,
)
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector

from fp8rl_torchrl import Precision, convert, twin
from fp8rl_torchrl.models.actor_critic import ActorCritic

# --- saved and restored ---


def assert_continues_exactly(make_env, tmp_path, fused=FusedCollector, **options):
    """Stop after two collections, restore in a new collector, and compare the next three with an unbroken run."""
    whole = build(fused, make_env(0), **options)
    take(whole, 2)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    expected = take(whole, 3)
    resumed = build(fused, make_env(99), **options)
    take(resumed, 1)  # whatever happened before is overwritten
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same_batches(take(resumed, 3), expected)
    assert any(batch["next", "done"].any() for batch in expected)
    assert resumed.stats() == whole.stats()


@pytest.mark.parametrize("options", [{}, {"track_traj_ids": False}, {"reset_at_each_iter": True}])
@pytest.mark.parametrize("num_envs", [3, None])
@pytest.mark.parametrize("make", ENVS)
def test_a_stopped_collector_continues_bit_for_bit(make, num_envs, options, tmp_path):
    assert_continues_exactly(lambda seed: make(num_envs, seed=seed, max_steps=7), tmp_path, **options)


class Forgets(FusedCollector):
    """Negative twin: leaves one thing out of what it saves."""

    forgotten: str

    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, self.forgotten: self.state_dict()[self.forgotten]})


@pytest.mark.parametrize("name", ["frames", "iter", "next_traj_id", "live_step"])
def test_whatever_is_left_out_is_missed(name, tmp_path):
    forgetful = type("Forgetful", (Forgets,), {"forgotten": name})
    with pytest.raises(AssertionError):
        assert_continues_exactly(lambda seed: CustomEnv(3, seed=seed, max_steps=7), tmp_path, forgetful)


def test_the_saved_state_is_its_own():
    collector = build(FusedCollector, CustomEnv(3, seed=0, max_steps=7))
    take(collector, 1)
    state = collector.state_dict()
    before = TensorDict(state["live_step"], batch_size=[3]).clone()
    batches = []
    for _ in range(2):
        collector.load_state_dict(state)
        collector.set_seed(5)  # changes the live step in place
        batches.append(take(collector, 2))
        assert_same(TensorDict(state["live_step"], batch_size=[3]), before)
    assert_same_batches(*batches)


def test_a_state_of_another_size_is_refused_and_changes_nothing():
    collector = build(FusedCollector, CustomEnv(3, seed=0))
    other = build(FusedCollector, CustomEnv(4, seed=0))
    take(other, 1)
    before = collector.state_dict()
    with pytest.raises(RuntimeError, match="batch dimension mismatch"):
        collector.load_state_dict(other.state_dict())
    after = collector.state_dict()
    assert {name: after[name] for name in ("frames", "iter", "next_traj_id")} == {
        name: before[name] for name in ("frames", "iter", "next_traj_id")
    }
    assert_same(*(TensorDict(state["live_step"], batch_size=[3]) for state in (before, after)))


# --- memory ---


@pytest.mark.parametrize("steps", [1, 8, 20])
@pytest.mark.parametrize("make", ENVS)
def test_batches_share_no_memory_with_each_other_nor_with_the_collector(make, steps):
    pair = [build(FusedCollector, make(4, seed=0, max_steps=3), steps=steps) for _ in range(2)]
    streams = []
    for collector, spoil in zip(pair, (False, True), strict=True):
        experience, kept, seen = iter(collector), [], []
        torch.manual_seed(0)
        for _ in range(3):
            batch = next(experience)
            seen.append(batch.clone())
            kept.append(batch)
            if spoil:
                batch.apply_(lambda leaf: leaf.zero_())
        assert_own_memory(*kept, collector._carrier)
        streams.append(seen)
    assert_same_batches(*streams)


def test_shared_memory_is_found():
    (batch,) = take(build(FusedCollector, CustomEnv(4, seed=0)), 1)
    with pytest.raises(AssertionError):
        assert_own_memory(batch, TensorDict({"last": batch["observation"][:, -1]}))


def test_experience_needs_no_gradient():
    batch = next(iter(build(FusedCollector, CustomEnv(4, seed=0))))
    assert not any(value.requires_grad for value in batch.values(True, True))


# --- weights ---


def changed(policy):
    """The policy of the same layers with other weights."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5)
    return policy


@pytest.mark.parametrize("in_what", ["a module", "a TensorDict", "weights=", "policy="])
def test_weights_are_copied_into_the_policy(in_what):
    env = CustomEnv(4, seed=0)
    learner = changed(agent(env))
    expected = take(build(Collector, env, lambda _: learner))
    collector = build(FusedCollector, CustomEnv(4, seed=0))
    given = {
        "a module": lambda: collector.update_policy_weights_(learner),
        "a TensorDict": lambda: collector.update_policy_weights_(TensorDict.from_module(learner)),
        "weights=": lambda: collector.update_policy_weights_(weights=TensorDict.from_module(learner)),
        "policy=": lambda: collector.update_policy_weights_(policy=learner),
    }
    given[in_what]()
    assert_same_batches(take(collector), expected)
    pairs = list(zip(collector.policy.parameters(), learner.parameters(), strict=True))
    assert all(mine is not theirs and torch.equal(mine, theirs) for mine, theirs in pairs)


def test_weights_that_cannot_be_copied_are_refused():
    collector = build(FusedCollector, CustomEnv(4, seed=0))
    before = [parameter.clone() for parameter in collector.policy.parameters()]
    learner = changed(agent(collector.env))
    with pytest.raises(ValueError, match="more than once, as policy_or_weights and weights"):
        collector.update_policy_weights_(learner, weights=TensorDict.from_module(learner))
    with pytest.raises(TypeError, match=r"as a module or as TensorDict.from_module.*got OrderedDict"):
        collector.update_policy_weights_(learner.state_dict())
    collector.update_policy_weights_()
    assert all(map(torch.equal, before, collector.policy.parameters()))
    with pytest.raises(TypeError, match="a policy of type NoneType has no weights"):
        build(FusedCollector, CustomEnv(4, seed=0), no_policy).update_policy_weights_(nn.Linear(1, 1))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_learners_updates_reach_its_twin(precision):
    env = CustomEnv(4, seed=0)
    torch.manual_seed(0)
    learner = ActorCritic.for_env(env, hidden=(32, 32))
    if precision == "fp8":
        convert(learner, Precision(precision))
    rollout_policy = twin(learner.policy, Precision(precision))
    streams = []
    for kind in (Collector, FusedCollector):
        torch.manual_seed(1)
        start = [parameter.detach().clone() for parameter in learner.parameters()]
        collector = build(kind, CustomEnv(4, seed=0), lambda _: rollout_policy)
        streams.append([*take(collector, 1)])
        changed(learner)
        streams[-1] += take(collector, 2)
        with torch.no_grad():
            for parameter, value in zip(learner.parameters(), start, strict=True):
                parameter.copy_(value)
    assert_same_batches(*streams)
    # The same observation, other weights.
    first, second = streams[0][0]["logits"][0, 0], streams[0][1]["logits"][0, 0]
    assert (first - second).abs().max() > 0.01
