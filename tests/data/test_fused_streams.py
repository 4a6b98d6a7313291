"""The eager `FusedCollector` yields, bit for bit, what TorchRL's `Collector` yields; broken ones do not."""

from dataclasses import dataclass

import pytest
import torch
from drift import DriftDynamics
from gathering import (
    ENVS,
    POLICIES,
    CartPoleEnv,
    CustomEnv,
    DriftEnv,
    FusedCollector,
    agent,
    assert_chained,
    assert_same,
    assert_same_batches,
    assert_same_layout,
    build,
    in_place,
    no_policy,
    take,
)
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType


def both(make_env, policy=agent, fused=FusedCollector, **options):
    """Three batches of each collector."""
    return [take(build(kind, make_env(), policy, **options)) for kind in (Collector, fused)]


# Episodes of 1, 2 or 3 steps: an environment is reset several times within one block of 8.
@pytest.mark.parametrize(
    ("num_envs", "max_steps", "policy"),
    [(8, 3, policy) for policy in POLICIES] + [(8, 20, agent), (1, 2, agent), (None, 1, agent), (None, 3, in_place)],
)
@pytest.mark.parametrize("make", ENVS)
def test_equals_torchrls_collector(make, num_envs, max_steps, policy):
    expected, got = both(lambda: make(num_envs, seed=0, max_steps=max_steps), policy)
    assert_same_batches(got, expected)
    assert got[0].shape == ((20,) if num_envs is None else (num_envs, 20))
    assert any(batch["next", "done"].any() for batch in got)
    assert_chained(got)


@pytest.mark.parametrize("make", ENVS)
def test_the_modes_of_the_distributions_are_taken(make):
    deterministic = {"exploration_type": ExplorationType.DETERMINISTIC}
    expected, got = both(lambda: make(8, seed=0, max_steps=9), **deterministic)
    assert_same_batches(got, expected)
    if "logits" in got[0].keys():
        assert torch.equal(got[0]["action"], got[0]["logits"].argmax(-1))
    with pytest.raises(AssertionError):  # negative twin: samples
        assert_same_batches(both(lambda: make(8, seed=0, max_steps=9))[1], expected)


@pytest.mark.parametrize("track_traj_ids", [True, False])
def test_new_episodes_at_each_iteration(track_traj_ids):
    options = {"reset_at_each_iter": True, "track_traj_ids": track_traj_ids}
    expected, got = both(lambda: CustomEnv(4, seed=0, max_steps=9), no_policy, **options)
    assert_same_batches(got, expected)
    assert not any(batch["step_count"][:, 0].any() for batch in got)
    # 20 steps are two episodes of 9 and a third that is broken off: no episode is ever begun twice.
    assert [batch["state", "episode"][:, 0].tolist() for batch in got] == [[n] * 4 for n in (1, 4, 7)]


def test_seeding_changes_the_episodes_after_the_running_ones():
    rollouts = []
    for kind in (Collector, FusedCollector):
        collector = build(kind, CartPoleEnv(4, seed=0, max_steps=7), no_policy)
        take(collector, 1)
        following = collector.set_seed(11)
        rollouts.append((following, take(collector)))
    (expected_following, expected), (following, got) = rollouts
    assert following == expected_following
    # The running ones already carry the counters of the new seed, so that they are followed by its first episode.
    for batch in (*expected, *got):
        running = batch["collector", "traj_ids"] <= got[0]["collector", "traj_ids"][:, 0].max()
        for side in (batch, batch["next"]):
            for name in ("seed", "episode"):
                side["state", name][running] = 0
    assert_same_batches(got, expected)
    assert set(got[-1]["state", "seed"].flatten().tolist()) == {11}


def test_seeding_a_collector_that_resets_each_time_starts_with_the_first_episode():
    collectors = [
        build(kind, CustomEnv(4, seed=0, max_steps=9), no_policy, reset_at_each_iter=True)
        for kind in (Collector, FusedCollector)
    ]
    for collector in collectors:
        take(collector, 1)
        collector.set_seed(11)
    expected, got = (take(collector) for collector in collectors)
    assert_same_batches(got, expected)
    assert got[0]["state", "episode"][:, 0].tolist() == [0] * 4


# --- negative twins: the same assertions find what is broken ---


class SameStart(DriftEnv):
    """Every episode starts as the first one did."""

    @dataclass(frozen=True, kw_only=True)
    class Dynamics(DriftDynamics):
        def reset(self, seed, index, episode):
            return DriftDynamics.reset(seed, index, torch.zeros_like(episode))._replace(episode=episode)

    dynamics_type = Dynamics


def test_an_environment_that_ignores_the_episode_is_found():
    expected, got = (take(build(FusedCollector, make(4, seed=0, max_steps=3))) for make in (DriftEnv, SameStart))
    assert_same(got[0][..., :3].exclude("next"), expected[0][..., :3].exclude("next"))  # the first episode
    with pytest.raises(AssertionError, match=r"observation|place|wind|action|loc|scale"):
        assert_same_batches(got, expected)


class ForgetsTheEnd(FusedCollector):
    """The observation after an episode's last step is that of the next episode's start."""

    def rollout(self):
        batch = super().rollout()
        batch["next", "observation"][..., :-1, :] = batch["observation"][..., 1:, :]
        return batch


class CountsBackwards(FusedCollector):
    """Episodes that begin together are numbered from the last environment to the first."""

    def _number(self, *arguments):
        numbers, *live = super()._number(*arguments)
        return torch.where(numbers < 4, numbers, numbers.flip(1)), *live


class Unnumbered(FusedCollector):
    """Begins its numbers anew with each batch."""

    def rollout(self):
        batch = super().rollout()
        batch["collector", "traj_ids"] -= batch["collector", "traj_ids"].min()
        return batch


@pytest.mark.parametrize(
    ("fused", "key"), [(ForgetsTheEnd, "observation"), (CountsBackwards, "traj_ids"), (Unnumbered, "traj_ids")]
)
def test_a_broken_collector_is_found(fused, key):
    expected, got = both(lambda: CustomEnv(4, seed=0, max_steps=6), in_place, fused)
    with pytest.raises(AssertionError, match=key):
        assert_same_batches(got, expected)


def _renamed(td):
    td.names = [None, "steps"]
    return td


@pytest.mark.parametrize(
    "change",
    [
        lambda td: td.exclude(("next", "reward")),
        lambda td: td.set("observation", td["observation"].double()),
        lambda td: td.set("step_count", td["step_count"].squeeze(-1)),
        _renamed,
        lambda td: td[:, :-1],
        lambda td: td.to("cpu"),  # the TensorDict itself then has a device
    ],
)
def test_another_layout_is_found(change):
    (expected,) = take(build(Collector, CustomEnv(4, seed=0)), 1)
    (got,) = take(build(FusedCollector, CustomEnv(4, seed=0)), 1)
    assert_same_layout(got, expected)
    with pytest.raises(AssertionError):
        assert_same_layout(change(got), expected)
