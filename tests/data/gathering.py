"""Collectors of either kind on the same environments and policies, and the comparison of what they yield."""

import itertools

import torch
from drift import DriftEnv
from tensordict import TensorDict
from torchrl.collectors import Collector

from fp8rl_torchrl.data.fused import FusedCollector
from fp8rl_torchrl.envs import AcrobotEnv, CartPoleEnv, CustomEnv, PendulumEnv
from fp8rl_torchrl.models.actor_critic import ActorCritic

ENVS = [CustomEnv, CartPoleEnv, DriftEnv, AcrobotEnv, PendulumEnv]
STEPS = 20  # two blocks and a half


def agent(env):
    """A sampling policy, the same at every call."""
    torch.manual_seed(0)
    return ActorCritic.for_env(env, hidden=(16,)).policy


def no_policy(env):
    """Random actions."""


def in_place(env):
    """A plain function that writes into what it is given: actions of the observation's sign."""
    return lambda td: td.set("action", _sign(env, td["observation"]))


def apart(env):
    """A plain function that returns a TensorDict of its own, with one entry more."""

    def policy(td):
        entries = {"action": _sign(env, -td["observation"]), "extra": td["observation"].square()}
        return TensorDict(entries, batch_size=td.batch_size)

    return policy


def _sign(env, observation):
    if env.action_spec.dtype == torch.int64:
        return (observation[..., 0] > 0).long()
    return observation[..., :1].sign() * 0.4


POLICIES = [agent, no_policy, in_place, apart]


def build(kind, env, policy=agent, steps=STEPS, **options):
    """A collector of ``steps`` steps of each environment; a fused one runs eagerly unless told otherwise."""
    if kind is Collector:
        options["auto_register_policy_transforms"] = False
        options.pop("compile", None)
    else:
        options = {"compile": False} | options
    return kind(env, policy(env), frames_per_batch=steps * env.batch_size.numel(), **options)


def take(collector, count=3, seed=7):
    """So many batches, copied, from the given place of the random stream on."""
    experience = iter(collector)
    torch.manual_seed(seed)
    return [batch.clone() for batch in itertools.islice(experience, count)]


def assert_same_layout(first, second):
    """Keys, shapes, dtypes, devices, batch sizes and names, of every TensorDict in the tree."""
    assert set(first.keys(True)) == set(second.keys(True))
    for tree in ((first, second), *((first[key], second[key]) for key in first.keys(True))):
        kinds = [isinstance(each, TensorDict) for each in tree]
        assert kinds[0] == kinds[1]
        for what in ("batch_size", "names", "device") if kinds[0] else ("shape", "dtype", "device"):
            assert getattr(tree[0], what) == getattr(tree[1], what), what


def assert_same(first, second):
    """The layout, and every value bit for bit."""
    assert_same_layout(first, second)
    for key in first.keys(True, True):
        assert torch.equal(first[key], second[key]), key


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert_same(one, other)


def assert_own_memory(*batches):
    """No two entries, of one batch or of several, share memory."""
    pointers = [leaf.untyped_storage().data_ptr() for batch in batches for leaf in batch.values(True, True)]
    assert len(set(pointers)) == len(pointers)


def assert_chained(batches):
    """Each step starts where the one before led, or at the start of the next episode."""
    for before, after in itertools.pairwise(row for batch in batches for row in batch.unbind(-1)):
        done, start = before["next", "done"].squeeze(-1), before["state", "episode"] + 1
        assert torch.equal(after["state", "episode"], torch.where(done, start, before["state", "episode"]))
        assert not after["step_count"].squeeze(-1)[done].any()
        for key in ("observation", "step_count", "episode_reward"):
            assert torch.equal(after[key][~done], before["next", key][~done]), key


__all__ = ["CartPoleEnv", "CustomEnv", "DriftEnv", "FusedCollector"]
