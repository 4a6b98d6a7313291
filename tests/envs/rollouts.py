"""Policies and rollouts that cross the ends of episodes, their comparison entry by entry, and with the specs."""

import torch
from torchrl.data import Bounded


def push(direction):
    """A policy that always pushes one way: 0 left, 1 right."""
    return lambda td: td.set("action", torch.full(td.batch_size, direction, dtype=torch.int64))


def always(*action):
    """A policy of one continuous action."""
    return lambda td: td.set("action", torch.tensor(action).expand(*td.batch_size, -1).clone())


def choose(observation, step_count):
    """Actions that depend on the observation and the time, and leave the bound on either side."""
    return (observation[..., 0] > 0).long() ^ (step_count % 8 == 0).long()


def seesaw(td):
    return td.set("action", choose(td["observation"], td["step_count"].squeeze(-1)))


def run(env, policy=seesaw, steps=80):
    """A rollout [N, T] through several episodes."""
    return env.rollout(steps, policy, break_when_any_done=False)


def assert_same(first, second):
    assert set(first.keys(True, True)) == set(second.keys(True, True))
    for key in first.keys(True, True):
        assert torch.equal(first[key], second[key]), key


def assert_in_specs(env, policy, steps):
    """Every number of a rollout is finite, and within the bounds of its spec where it has some.

    Returns:
        The rollout's ``next`` entries, [N, T].
    """
    following = run(env, policy, steps)["next"]
    specs = {**dict(env.observation_spec.items(True, True)), "reward": env.reward_spec}
    for key, spec in specs.items():
        values = following[key]
        assert values.isfinite().all(), key
        if isinstance(spec, Bounded):
            low, high = (bound.unsqueeze(len(env.batch_size)) for bound in (spec.space.low, spec.space.high))
            assert ((low <= values) & (values <= high)).all(), key
    return following


def advance(env, steps):
    data = env.reset()
    for _ in range(steps):
        _, data = env.step_and_maybe_reset(seesaw(data))
    return data.exclude("action")
