"""`CustomEnv` keeps its state in the TensorDict: steps repeat, copies are independent, sums are right."""

import copy
import pickle

import pytest
import torch
from rollouts import advance, assert_same, push, run, seesaw
from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv

from fp8rl_torchrl.envs.custom import CustomEnv


def test_a_saved_tensordict_can_be_stepped_again():
    env = CustomEnv(num_envs=3, seed=5)
    saved = seesaw(advance(env, 9)).clone()
    first, next_first = env.step_and_maybe_reset(saved.clone())
    continued = []
    for _ in range(60):
        _, next_first = env.step_and_maybe_reset(seesaw(next_first))
        continued.append(next_first.clone())
    run(env)  # something else in between
    # In the same environment and in another one, of another seed.
    for again in (env, CustomEnv(num_envs=3, seed=99)):
        second, following = again.step_and_maybe_reset(saved.clone())
        assert_same(first, second)
        for expected in continued:
            _, following = again.step_and_maybe_reset(seesaw(following))
            assert_same(following, expected)
    assert (continued[-1]["state", "episode"] >= 1).all()  # also the starts after it


def test_a_step_changes_no_earlier_tensordict():
    env = CustomEnv(num_envs=3, seed=5)
    data = seesaw(advance(env, 3))
    before = data.clone()
    stepped = env.step(data)
    kept = stepped.clone()
    for _ in range(40):
        _, data = env.step_and_maybe_reset(seesaw(data))
    assert_same(stepped, kept)
    assert_same(before, kept.exclude("next"))


def test_no_two_entries_share_memory():
    env = CustomEnv(num_envs=3, seed=5)
    rollout = env.rand_step(env.reset())
    pointers = [leaf.data_ptr() for leaf in rollout.values(True, True)]
    assert len(set(pointers)) == len(pointers)


def test_two_environments_in_one_process_are_independent():
    alone = run(CustomEnv(num_envs=2, seed=0))
    env, other = CustomEnv(num_envs=2, seed=0), CustomEnv(num_envs=2, seed=1)
    data, beside, rows = env.reset(), other.reset(), []
    for _ in range(80):
        row, data = env.step_and_maybe_reset(seesaw(data))
        _, beside = other.step_and_maybe_reset(push(0)(beside))
        other.reset()
        rows.append(row.clone())
    assert_same(torch.stack(rows, 1), alone)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_duplicate_continues_alike_and_independently(duplicate):
    env = CustomEnv(num_envs=3, seed=5, target=0.5)
    run(env)
    twin = duplicate(env)
    first = run(env)
    assert_same(run(twin), first)
    assert twin.dynamics == env.dynamics
    assert not torch.equal(run(twin)["observation"], first["observation"])


def test_fresh_makes_an_independent_environment_with_the_same_constants():
    env = CustomEnv(num_envs=3, seed=5, target=0.5, max_steps=7)
    expected = run(CustomEnv(num_envs=3, seed=5, target=0.5, max_steps=7))
    env.reset()
    fresh = env.fresh(num_envs=2, seed=1)
    assert fresh.batch_size == (2,)
    assert fresh.dynamics == env.dynamics
    run(fresh)
    env.set_seed(5)
    assert_same(run(env), expected)
    assert env.fresh(seed=1).batch_size == env.batch_size
    assert CustomEnv(seed=0).fresh(seed=1).batch_size == ()


def test_step_count_and_episode_reward_equal_those_of_torchrl():
    transforms = Compose(RewardSum(in_keys=["reward"], out_keys=["sum"]), StepCounter(step_count_key="steps"))
    rollout = run(TransformedEnv(CustomEnv(num_envs=4, seed=0), transforms), steps=250)
    assert rollout["next", "done"].sum() > 20
    for where in (rollout, rollout["next"]):
        assert torch.equal(where["step_count"], where["steps"])
        assert torch.equal(where["episode_reward"], where["sum"])


def test_an_episode_reward_is_the_sum_of_the_rewards_of_the_episode():
    rollout = run(CustomEnv(num_envs=1, seed=0), steps=80)[0]["next"]
    ends = rollout["done"].squeeze(-1).nonzero().flatten().tolist()
    assert len(ends) > 2
    begin = 0
    for end in ends:
        rewards = rollout["reward"][begin : end + 1].double()
        assert rollout["episode_reward"][end].item() == pytest.approx(rewards.sum().item(), rel=1e-6)
        assert rollout["step_count"][end].item() == end + 1 - begin
        begin = end + 1
