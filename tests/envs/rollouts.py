"""Policies and rollouts of `CustomEnv` that cross the ends of episodes, and their comparison entry by entry."""

import torch


def push(direction):
    """A policy that always pushes one way: 0 left, 1 right."""
    return lambda td: td.set("action", torch.full(td.batch_size, direction, dtype=torch.int64))


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


def advance(env, steps):
    data = env.reset()
    for _ in range(steps):
        _, data = env.step_and_maybe_reset(seesaw(data))
    return data.exclude("action")
