"""The compiled `FusedCollector`, and the captured one: the same environments' streams, the same actions or their law.

Compiling a block takes 15 to 30 seconds on a CPU, so each test shows several things of one collector.
"""

import functools
import math

import pytest
import torch
from gathering import (
    CartPoleEnv,
    CustomEnv,
    DriftEnv,
    FusedCollector,
    agent,
    assert_chained,
    assert_own_memory,
    assert_same_layout,
    build,
    no_policy,
    take,
)
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType

from fp8rl_torchrl import Precision, convert, twin
from fp8rl_torchrl.models.actor_critic import ActorCritic

ULPS = 4
"""How far a fused multiply-add and another order of additions may move a float32, of its scale, within a few steps."""

compiled = functools.partial(build, FusedCollector, compile=True)


def assert_close(first, second, ulps=ULPS):
    """The layout, integers and flags exact, and floats within some ulp of their column's scale."""
    assert_same_layout(first, second)
    for key in first.keys(True, True):
        one, other = first[key], second[key]
        if one.is_floating_point():
            assert (one - other).abs().max() <= ulps * 2.0**-23 * other.abs().max(), key
        else:
            assert torch.equal(one, other), key


def assert_close_batches(first, second, ulps=ULPS):
    for one, other in zip(first, second, strict=True):
        assert_close(one, other, ulps)


def assert_exact_starts(batches, env):
    """Bit for bit what the pure reset says, eagerly, of every episode begun."""
    for batch in batches:
        starts = batch[batch["step_count"].squeeze(-1) == 0]
        counters = [starts["state", name].cpu() for name in ("seed", "index", "episode")]
        assert torch.equal(starts["observation"].cpu(), env.observe(env.pure_reset(*counters)))


def test_one_action_that_differs_is_found():
    (batch,) = take(build(FusedCollector, CustomEnv(4, seed=0)), 1)
    other = batch.clone()
    other["observation"] *= 1 + 2.0**-23
    assert_close(other, batch)
    for key, change in {"action": 1, "observation": 1e-5}.items():
        other = batch.clone()
        other[key][0, 3] += change
        with pytest.raises(AssertionError, match=key):
            assert_close(other, batch)


def test_another_start_is_found():
    env = CustomEnv(4, seed=0, max_steps=3)
    batches = take(build(FusedCollector, env), 2)
    assert_exact_starts(batches, env)
    batches[1]["observation"] *= 1 + 2.0**-23
    with pytest.raises(AssertionError):
        assert_exact_starts(batches, env)


# --- compiled on a CPU ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "num_envs", "max_steps"), [(CustomEnv, 8, 3), (CartPoleEnv, 8, 1), (DriftEnv, None, 2)]
)
def test_random_actions_and_their_streams_are_exact(make, num_envs, max_steps):
    expected, got = (
        take(kind(make(num_envs, seed=0, max_steps=max_steps), no_policy))
        for kind in (functools.partial(build, Collector), compiled)
    )
    assert_close_batches(got, expected)
    assert_exact_starts(got, make(num_envs, max_steps=max_steps))
    assert_chained(got)


# The random numbers of both are equal, so an action differs only where a draw falls between two probabilities that are
# 1e-9 apart: never, in 5,000 draws of a stated seed.
@pytest.mark.slow
@pytest.mark.parametrize("make", [CustomEnv, DriftEnv])
def test_sampled_actions_are_the_same_and_follow_the_learner(make):
    envs = [make(16, seed=0, max_steps=5) for _ in range(2)]
    policies = [agent(env) for env in envs]
    collectors = [kind(env, lambda _, p=p: p) for kind, env, p in zip((_eager, compiled), envs, policies, strict=True)]
    kept = []
    for seed in range(4):
        (expected,), (got,) = take(collectors[0], 1, seed), take(collectors[1], 1, seed)
        assert_close(got, expected, ulps=32)
        kept.append(got)
        for policy in policies:  # the learner's update, in place
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(-1.5).add_(0.01)
    assert_chained(kept)
    torch.manual_seed(0)
    batches = [next(iter(collectors[1])) for _ in range(2)]
    assert_own_memory(*batches, collectors[1]._carrier)


def _eager(env, policy, **options):
    return build(FusedCollector, env, policy, **options)


@pytest.mark.slow
def test_a_single_block_shares_no_memory_and_takes_modes():
    options = {"steps": 5, "exploration_type": ExplorationType.DETERMINISTIC}
    expected = take(_eager(CustomEnv(8, seed=0, max_steps=2), agent, **options))
    collector = compiled(CustomEnv(8, seed=0, max_steps=2), agent, **options)
    batches = [next(iter(collector)) for _ in range(3)]
    assert_own_memory(*batches, collector._carrier)
    assert_close_batches(batches, expected, ulps=32)
    assert torch.equal(batches[0]["action"], batches[0]["logits"].argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_twin_runs_in_its_precision(precision):
    torch.manual_seed(0)
    learner = ActorCritic.for_env(CustomEnv(16), hidden=(32, 32))
    if precision == "fp8":
        convert(learner, Precision(precision))
    policy = twin(learner.policy, Precision(precision))
    for batch in take(compiled(CustomEnv(16, seed=0, max_steps=5), lambda _: policy, steps=8), 2):
        assert_computed_by(policy, batch)
        with pytest.raises(AssertionError):  # negative twin: the learner's own precision
            assert_computed_by(learner.policy, batch)


def assert_computed_by(policy, batch):
    """The stored logits are those that the policy gives the stored observations, up to few float32 roundings."""
    with torch.no_grad():
        expected = policy(batch.select("observation").reshape(-1))["logits"].reshape(batch["logits"].shape)
    assert (batch["logits"] - expected).norm() <= 1e-4 * expected.norm()


# --- the law of the actions ---


def assert_frequency(actions, probability):
    """Independent draws: within 4 standard deviations."""
    deviation = math.sqrt(probability * (1 - probability) / actions.numel())
    assert abs(actions.double().mean().item() - probability) < 4 * deviation


def assert_same_law(first, second):
    """Two samples: the 0.999 quantile of the scaled Kolmogorov-Smirnov distance is 1.95."""
    points = torch.cat((first, second)).sort().values
    shares = [torch.searchsorted(each.sort().values, points, right=True) / each.numel() for each in (first, second)]
    scale = math.sqrt(first.numel() * second.numel() / (first.numel() + second.numel()))
    assert (shares[0] - shares[1]).abs().max().item() * scale < 1.95


def biased(env):
    """Action 1 with probability 0.3, whatever is observed."""
    policy = agent(env)
    for parameter in policy.parameters():
        parameter.data.zero_()
    list(policy.parameters())[-1].data.copy_(torch.tensor([0.7, 0.3]).log())
    return policy


def assert_laws(kind, device):
    """Actions of 8,192 independent draws, of another seed than the eager ones."""
    (batch,) = take(kind(CustomEnv(1024, device, seed=0), biased, steps=8), 1, seed=1)
    assert_frequency(batch["action"], 0.3)
    assert len(batch["action"].T.unique(dim=0)) == 8  # each step draws its own
    # Episodes of one step: all observations, and so all actions, are independent.
    (expected,) = take(_eager(DriftEnv(1024, seed=0, max_steps=1), agent, steps=8), 1, seed=2)
    (got,) = take(kind(DriftEnv(1024, device, seed=1, max_steps=1), agent, steps=8), 1, seed=3)
    assert_same_law(got["action"].flatten().cpu(), expected["action"].flatten())


def test_actions_have_the_stated_law():
    assert_laws(_eager, "cpu")
    (batch,) = take(_eager(CustomEnv(1024, seed=0), biased, steps=8), 1, seed=1)
    with pytest.raises(AssertionError):  # negative twins: another probability, another width
        assert_frequency(batch["action"], 0.27)
    (drift,) = take(_eager(DriftEnv(1024, seed=0, max_steps=1), agent, steps=8), 1, seed=2)
    with pytest.raises(AssertionError):
        assert_same_law(drift["action"].flatten(), 0.9 * drift["action"].flatten())


@pytest.mark.slow
def test_compiled_actions_have_the_stated_law():
    assert_laws(compiled, "cpu")


# --- captured on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [8, 20])
def test_a_captured_collection_has_the_same_layout_and_streams(steps):
    expected = take(build(Collector, CustomEnv(8, "cuda", seed=0, max_steps=3), steps=steps))
    collector = compiled(CustomEnv(8, "cuda", seed=0, max_steps=3), steps=steps)
    assert collector.captured
    experience = iter(collector)
    batches = [next(experience) for _ in range(5)]  # some before the capture, some replayed
    assert_own_memory(*batches, collector._carrier)
    assert_same_layout(batches[-1], expected[-1])
    assert_exact_starts(batches, CustomEnv(8, max_steps=3))
    assert_chained(batches)
    assert [batch["collector", "traj_ids"].unique().numel() for batch in batches] == [
        batch["collector", "traj_ids"].unique().numel()
        for batch in take(_eager(collector.env.fresh(seed=0), agent, steps=steps), 5)
    ]


@pytest.mark.gpu
def test_a_captured_collection_follows_the_learner():
    deterministic = {"exploration_type": ExplorationType.DETERMINISTIC}
    streams = []
    for kind in (_eager, compiled):
        env = CustomEnv(8, "cuda", seed=0, max_steps=5)
        policy = agent(env)
        collector, batches = kind(env, lambda _, p=policy: p, **deterministic), []
        for _ in range(5):
            batches += take(collector, 1)
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(-1.5).add_(0.01)
        streams.append(batches)
    assert_close_batches(streams[1], streams[0], ulps=64)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cudagraph": False}])
def test_captured_actions_have_the_stated_law(options):
    assert_laws(functools.partial(compiled, **options), "cuda")
