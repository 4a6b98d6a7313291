"""`CustomEnv`: what a seed decides, and resets that touch what they should alone."""

import pytest
import torch
from rollouts import advance, assert_same, push, run, seesaw
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.envs.utils import step_mdp

from fp8rl_torchrl.envs.custom import CustomDynamics, CustomEnv


def starts(env, steps=80):
    """The episode numbers and observations [N, T] at which episodes started."""
    rollout = run(env, steps=steps)
    first = rollout["step_count"].squeeze(-1) == 0
    return rollout["observation"][first]


def test_the_same_seed_gives_the_same_episodes():
    assert_same(run(CustomEnv(num_envs=3, seed=4)), run(CustomEnv(num_envs=3, seed=4)))


def assert_no_start_repeats(make_env):
    """Different seeds, environments and episodes start differently."""
    found = torch.cat([starts(make_env(seed)) for seed in (0, 1, 2**32, 2**62)])
    assert len(found) > 40
    assert len(found.unique(dim=0)) == len(found)


class ForgetsTheEpisode(CustomEnv):
    """Starts every episode of an environment alike."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.pure_reset = lambda seed, index, episode: CustomDynamics.reset(seed, index, 0 * episode)._replace(
            episode=episode
        )


def test_different_seeds_environments_and_episodes_start_differently():
    assert_no_start_repeats(lambda seed: CustomEnv(num_envs=3, seed=seed))
    with pytest.raises(AssertionError):
        assert_no_start_repeats(lambda seed: ForgetsTheEpisode(num_envs=3, seed=seed))


def test_each_environment_of_a_batch_is_independent_of_the_size_of_the_batch():
    many, few = run(CustomEnv(num_envs=5, seed=3)), run(CustomEnv(num_envs=2, seed=3))
    assert_same(many[:2], few)
    assert_same(many[0], run(CustomEnv(seed=3)))


def test_set_seed_starts_over():
    env = CustomEnv(num_envs=3, seed=9)
    run(env)
    env.set_seed(4)
    assert_same(run(env), run(CustomEnv(num_envs=3, seed=4)))
    env.set_seed(4)
    assert_same(run(env), run(CustomEnv(num_envs=3, seed=4)))


def test_set_seed_holds_although_running_episodes_carry_the_old_seed():
    env, other = CustomEnv(num_envs=2, seed=0), CustomEnv(num_envs=2, seed=7)
    running = env.rand_step(env.reset())
    env.set_seed(7)
    _, data = env.step_and_maybe_reset(seesaw(step_mdp(running)))
    assert data["state", "seed"].tolist() == [0, 0]  # the running episode ends as it began
    assert_same(env.reset(data.exclude("action")), other.reset())
    assert_same(env.reset(), other.reset())


def test_a_collector_can_be_seeded_after_it_was_built():
    env = CustomEnv(num_envs=2, seed=0)
    collector = Collector(env, push(1), frames_per_batch=160, total_frames=-1, auto_register_policy_transforms=False)
    collector.set_seed(7)
    rollout = next(iter(collector))
    collector.shutdown()
    first = rollout["step_count"].squeeze(-1) == 0
    again = run(CustomEnv(num_envs=2, seed=7), push(1))
    for place in range(2):
        later = rollout["observation"][place][first[place]][1:]  # all but the episodes that were running already
        expected = again["observation"][place][again["step_count"][place].squeeze(-1) == 0]
        assert len(later) >= 2
        assert torch.equal(later[:2], expected[:2])


def test_without_a_seed_starts_follow_the_global_generator():
    torch.manual_seed(0)
    first, second = CustomEnv(num_envs=2).reset(), CustomEnv(num_envs=2).reset()
    assert not torch.equal(first["observation"], second["observation"])
    torch.manual_seed(0)
    assert_same(first, CustomEnv(num_envs=2).reset())


@pytest.mark.parametrize("seed", ["a", 1.5, True])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(ValueError, match=f"seed must be an integer, or None for one that torch draws; got {seed!r}"):
        CustomEnv(4, seed=seed)


def test_a_seed_uses_no_global_randomness():
    before = torch.get_rng_state()
    run(CustomEnv(num_envs=2, seed=0))
    assert torch.equal(before, torch.get_rng_state())


def reset_first(env, data, how):
    """Reset environment 0 alone, giving `reset` the mask with or without the rest of the TensorDict."""
    mask = torch.tensor([[True], [False], [False]])
    if how == "mask only":
        return env.reset(TensorDict({"_reset": mask}, batch_size=[3]))
    return env.reset(data.clone().set("_reset", mask))


def assert_partial_reset_touches_one(make_env, how):
    env, undisturbed = make_env(), make_env()
    data, reference = advance(env, 7), advance(undisturbed, 7)
    after = reset_first(env, data, how)
    if how == "mask only":  # what was not reset is not in the answer: go on from what there was
        after = torch.stack((after[0], data[1], data[2]))
    assert_same(after.exclude("_reset")[1:], reference[1:])
    assert after["state", "episode"].tolist() == [1, 0, 0]
    assert after["step_count"].flatten().tolist() == [0, 7, 7]
    assert after["observation"][0].tolist() == env.fresh_start(0, 1)
    # The others, and their later episodes, go on as if nothing had happened.
    for _ in range(120):
        _, after = env.step_and_maybe_reset(seesaw(after))
        _, reference = undisturbed.step_and_maybe_reset(seesaw(reference))
        assert_same(after.exclude("_reset")[1:], reference[1:])
    assert (reference["state", "episode"][1:] >= 1).all()


class Observed(CustomEnv):
    """`CustomEnv` with seed 2, that tells where an episode starts."""

    def __init__(self):
        super().__init__(num_envs=3, seed=2)

    @staticmethod
    def fresh_start(index, episode):
        start = CustomDynamics.reset(*(torch.tensor(counter) for counter in (2, index, episode)))
        return [start.position.item(), start.velocity.item()]


class CountsForAll(Observed):
    """Counts on the instance, and a new episode for every environment whenever one is reset."""

    def remember(self, state):
        pass

    def _reset(self, tensordict=None, **kwargs):
        return super()._reset(None)


@pytest.mark.parametrize(
    "wrap", [lambda env: env, lambda env: TransformedEnv(env, StepCounter(step_count_key="steps"))]
)
def test_a_partial_reset_touches_no_other_environment(wrap):
    assert_partial_reset_touches_one(lambda: wrap(Observed()), "whole TensorDict")


def test_a_partial_reset_works_with_the_mask_alone():
    assert_partial_reset_touches_one(Observed, "mask only")
    with pytest.raises(AssertionError):
        assert_partial_reset_touches_one(CountsForAll, "mask only")
