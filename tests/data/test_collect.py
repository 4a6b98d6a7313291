"""Collecting: what arrives, and that a stopped collector continues exactly where the environment allows it."""

import itertools

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv

from fp8rl_torchrl.data.collect import CollectorState, make_collector, restores_exactly
from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.envs.gym import make
from fp8rl_torchrl.models.actor_critic import ActorCritic


def custom_env():
    return CustomEnv(num_envs=3, seed=0)


def single_env():
    return CustomEnv(seed=0)


def transformed_env(**constants):
    transforms = Compose(RewardSum(in_keys=["reward"], out_keys=["sum"]), StepCounter(step_count_key="steps"))
    return TransformedEnv(CustomEnv(num_envs=3, seed=0, **constants), transforms)


def short_episodes():
    return CustomEnv(num_envs=3, seed=0, max_steps=7)


def short_transformed():
    return transformed_env(max_steps=7)


def cart_pole():
    return make("CartPole-v1", num_envs=3, seed=0, native=False)


def build(make_env, frames=60, **options):
    """A collector and its policy, both the same at every call."""
    torch.manual_seed(0)
    env = make_env()
    return make_collector(env, ActorCritic.for_env(env).policy, frames, **options)


def assert_same(first, second):
    assert set(first.keys(True, True)) == set(second.keys(True, True))
    for key in first.keys(True, True):
        assert torch.equal(first[key], second[key]), key


class BothStateDicts:
    """What TorchRL's collector saves by itself, in the place of `CollectorState`."""

    def __init__(self, collector):
        self.collector = collector

    def state_dict(self):
        return self.collector.state_dict()

    def load_state_dict(self, state):
        self.collector.load_state_dict(state, strict=False)


def assert_continues_exactly(make_env, keeper, tmp_path, **options):
    """Stop after two collections, restore in a new collector, and compare the next three with an unbroken run."""
    whole = build(make_env, **options)
    experience = iter(whole)
    for _ in range(2):
        next(experience)
    saved = {"collector": keeper(whole).state_dict(), "random": torch.get_rng_state()}
    torch.save(saved, tmp_path / "state.pt")
    expected = [next(experience).clone() for _ in range(3)]
    # The saved state is its own: going on has not changed it.
    loaded = torch.load(tmp_path / "state.pt", weights_only=False)

    resumed = build(make_env, **options)
    next(iter(resumed))  # whatever happened before is overwritten
    keeper(resumed).load_state_dict(loaded["collector"])
    torch.set_rng_state(loaded["random"])
    experience = iter(resumed)
    for batch in expected:
        assert_same(next(experience), batch)
    assert any(batch["next", "done"].any() for batch in expected)
    assert resumed._frames == whole._frames


@pytest.mark.parametrize("make_env", [custom_env, single_env, transformed_env])
def test_a_stopped_collector_continues_bit_for_bit(make_env, tmp_path):
    assert_continues_exactly(make_env, CollectorState, tmp_path)


@pytest.mark.parametrize("make_env", [short_episodes, short_transformed])
def test_a_collector_that_always_begins_anew_continues_bit_for_bit(make_env, tmp_path):
    assert_continues_exactly(make_env, CollectorState, tmp_path, reset_at_each_iter=True)


def test_what_torchrl_saves_by_itself_is_not_enough(tmp_path):
    with pytest.raises(AssertionError):
        assert_continues_exactly(custom_env, BothStateDicts, tmp_path)


def test_the_saved_state_holds_tensors_of_its_own():
    collector = build(custom_env)
    experience = iter(collector)
    next(experience)
    state = CollectorState(collector).state_dict()
    before = TensorDict(state["live_step"], batch_size=[3]).clone()
    next(experience)
    collector.reset()  # works in place
    assert_same(TensorDict(state["live_step"], batch_size=[3]), before)
    CollectorState(collector).load_state_dict(state)
    collector.reset()
    assert_same(TensorDict(state["live_step"], batch_size=[3]), before)


def test_restoring_twice_from_one_state_gives_the_same():
    collector = build(custom_env)
    experience = iter(collector)
    next(experience)
    keeper, random_state = CollectorState(collector), torch.get_rng_state()
    state, batches = keeper.state_dict(), []
    for _ in range(2):
        keeper.load_state_dict(state)
        torch.set_rng_state(random_state)
        batches.append(next(experience).clone())
    assert_same(*batches)


def test_an_environment_that_cannot_be_read_restarts():
    collector = build(cart_pole, frames=90)
    next(iter(collector))
    state = CollectorState(collector).state_dict()
    assert "live_step" not in state
    seen = collector._carrier["collector", "traj_ids"].max().item()

    resumed = build(cart_pole, frames=90)
    next(iter(resumed))
    assert resumed._carrier["step_count"].any()  # in the middle of episodes
    CollectorState(resumed).load_state_dict(state)
    batch = next(iter(resumed))
    assert batch["step_count"][:, 0].flatten().tolist() == [0, 0, 0]
    assert batch["observation"][:, 0].abs().max() <= 0.05  # where CartPole starts
    assert resumed._frames == 180
    # The new episodes are not taken for those that were running.
    assert batch["collector", "traj_ids"].min().item() > seen


@pytest.mark.parametrize(
    ("make_env", "exact"), [(custom_env, True), (single_env, True), (transformed_env, True), (cart_pole, False)]
)
def test_which_environments_continue_exactly(make_env, exact):
    assert restores_exactly(make_env()) is exact


def test_the_collector_is_torchrls_and_has_no_end():
    collector = build(custom_env, frames=30)
    assert type(collector) is Collector
    experience = iter(collector)
    batches = [next(experience).clone() for _ in range(3)]
    assert all(batch.shape == (3, 10) for batch in batches)
    # Each batch starts where the one before ended.
    for before, after in itertools.pairwise(batches):
        running = ~before["next", "done"][:, -1, 0]
        assert torch.equal(before["next", "observation"][running, -1], after["observation"][running, 0])


def test_other_options_are_the_collectors():
    env = custom_env()
    policy, seen = ActorCritic.for_env(env).policy, []
    collector = make_collector(
        env, policy, 30, reset_at_each_iter=True, track_traj_ids=False, postproc=lambda td: seen.append(td) or td
    )
    experience = iter(collector)
    batches = [next(experience).clone() for _ in range(2)]
    assert len(seen) == 2
    for batch in batches:
        assert "collector" not in batch.keys()
        assert not batch["step_count"][:, 0].any()
    with pytest.raises(TypeError, match="banana"):
        make_collector(env, policy, 30, banana=True)


@pytest.mark.parametrize("make_env", [short_episodes, short_transformed])
def test_the_environment_of_a_restored_collector_goes_on_with_the_next_episodes(make_env):
    collector = build(make_env)
    next(iter(collector))
    state = CollectorState(collector).state_dict()
    running = TensorDict(state["live_step"], batch_size=collector.env.batch_size)["state", "episode"]
    expected = collector.env.reset()  # knows nothing but what the environment remembers
    assert torch.equal(expected["state", "episode"], running + 1)
    assert (running == 2).all()  # 20 steps in episodes of 7

    resumed = build(make_env)
    # Negative twin: one that was not told begins at its own first episodes.
    assert not torch.equal(resumed.env.reset()["state", "episode"], running + 1)
    CollectorState(resumed).load_state_dict(state)
    found = resumed.env.reset()
    for key in ("observation", ("state", "episode"), ("state", "seed"), ("state", "index")):
        assert torch.equal(found[key], expected[key]), key


def test_the_experience_is_that_of_a_rollout():
    collector = build(custom_env, frames=60)
    torch.manual_seed(1)
    batch = next(iter(collector))
    env = custom_env()
    torch.manual_seed(1)
    rollout = env.rollout(20, collector.policy)
    for key in ("observation", "action", "action_log_prob", ("next", "observation"), ("next", "reward")):
        assert torch.equal(batch[key], rollout[key]), key


def test_the_features_are_not_stored():
    keys = next(iter(build(custom_env))).keys(True)
    assert not any(str(key).startswith("_") for key in keys)


def test_experience_needs_no_gradient():
    assert not any(value.requires_grad for value in next(iter(build(custom_env))).values(True, True))
