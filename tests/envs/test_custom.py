"""`CustomEnv`: steps worked out by hand, specs that hold, and episodes that are the same however they are driven."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Bounded
from torchrl.envs import Compose, RewardSum, StepCounter, TransformedEnv, check_env_specs
from torchrl.envs.utils import step_mdp

from fp8rl_torchrl.envs.custom import CustomDynamics, CustomEnv, CustomState

EPISODES = 4096
# Constants that are exact in binary, so that the numbers worked out by hand are exact as well.
EXACT = {"dt": 0.5, "force": 2.0, "friction": 0.5, "bound": 4.0, "target": 1.0, "survival_reward": 0.25}
WITHOUT_FRICTION = CustomDynamics(dt=0.5, force=2.0, friction=0.0, bound=4.0)


def state(position, velocity, step_count=0, episode_reward=0.0):
    counter = torch.zeros((), dtype=torch.int64)
    return CustomState(
        position=torch.tensor(position),
        velocity=torch.tensor(velocity),
        step_count=counter + step_count,
        episode_reward=torch.tensor(episode_reward),
        seed=counter,
        index=counter,
        episode=counter,
    )


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


def starts(env, steps=80):
    """The episode numbers and observations [N, T] at which episodes started."""
    rollout = run(env, steps=steps)
    first = rollout["step_count"].squeeze(-1) == 0
    return rollout["observation"][first]


def assert_same(first, second):
    assert set(first.keys(True, True)) == set(second.keys(True, True))
    for key in first.keys(True, True):
        assert torch.equal(first[key], second[key]), key


# --- dynamics ---


def test_one_step_by_hand_exactly():
    # v = 1 + (-2 - 0.5 * 1) * 0.5 = -0.25;  x = -1 - 0.25 * 0.5 = -1.125;  r = 0.25 + 1 - 2.125 / 4 = 0.71875
    dynamics = CustomDynamics(**EXACT)
    left, observation, reward, terminated, truncated = dynamics.step(state(-1.0, 1.0), torch.tensor(0))
    assert observation.tolist() == [-1.125, -0.25]
    assert reward.item() == 0.71875
    assert (left.step_count, left.episode_reward) == (1, 0.71875)
    assert not terminated
    assert not truncated
    # v = 1 + (2 - 0.5) * 0.5 = 1.75;  x = -1 + 1.75 * 0.5 = -0.125;  r = 1.25 - 1.125 / 4 = 0.96875
    _, observation, reward, _, _ = dynamics.step(state(-1.0, 1.0), torch.tensor(1))
    assert observation.tolist() == [-0.125, 1.75]
    assert reward.item() == 0.96875


def test_three_steps_of_the_defaults_by_hand():
    #   right  v = 0 + (1 - 0) * 0.1 = 0.1               x = 0 + 0.1 * 0.1 = 0.01         r = 1.1 - 0.01 / 2.4
    #   left   v = 0.1 + (-1 - 0.01) * 0.1 = -0.001      x = 0.01 - 0.0001 = 0.0099       r = 1.1 - 0.0099 / 2.4
    #   left   v = -0.001 + (-1 + 0.0001) * 0.1          x = 0.0099 - 0.010099            r = 1.1 - 0.000199 / 2.4
    #            = -0.10099                                = -0.000199
    by_hand = [(0.01, 0.1, 1.0958333), (0.0099, -0.001, 1.095875), (-0.000199, -0.10099, 1.0999171)]
    current = state(0.0, 0.0)
    for action, (position, velocity, reward) in zip((1, 0, 0), by_hand, strict=True):
        current, observation, got, _, _ = CustomDynamics().step(current, torch.tensor(action))
        assert observation.tolist() == pytest.approx([position, velocity], abs=1e-7)
        assert got.item() == pytest.approx(reward, abs=2e-7)
    assert current.step_count == 3
    assert current.episode_reward.item() == pytest.approx(1.0958333 + 1.095875 + 1.0999171, abs=1e-6)


def test_the_environment_steps_as_the_pure_function_does():
    env = CustomEnv(num_envs=2, seed=0, **EXACT)
    data = env.reset()
    data["state", "position"], data["state", "velocity"] = torch.full((2,), -1.0), torch.full((2,), 1.0)
    after = env.step(data.set("action", torch.tensor([0, 1])))["next"]
    assert after["observation"].tolist() == [[-1.125, -0.25], [-0.125, 1.75]]
    assert after["reward"].tolist() == [[0.71875], [0.96875]]
    assert after["episode_reward"].tolist() == [[0.71875], [0.96875]]
    assert after["step_count"].tolist() == [[1], [1]]


@pytest.mark.parametrize("side", [1, -1])
def test_terminates_beyond_the_bound_and_not_on_it(side):
    # v = 1 + 2 * 0.5 = 2, x = 3 + 2 * 0.5 = 4.0, the bound itself; 2^-21 is the spacing of float32 above 4.
    action = torch.tensor(int(side > 0))
    _, observation, _, terminated, _ = WITHOUT_FRICTION.step(state(side * 3.0, side * 1.0), action)
    assert observation[0] == side * 4.0
    assert not terminated
    _, observation, _, terminated, _ = WITHOUT_FRICTION.step(state(side * (3.0 + 2**-21), side * 1.0), action)
    assert observation[0] == side * (4.0 + 2**-21)
    assert terminated


@pytest.mark.parametrize(
    ("position", "step_count", "terminated", "truncated"),
    [(0.0, 0, False, False), (3.5, 0, True, False), (0.0, 199, False, True), (3.5, 199, True, True)],
)
def test_the_two_ends_of_an_episode_are_independent(position, step_count, terminated, truncated):
    # v = 1 + 2 * 0.5 = 2, so x = 3.5 leads to 4.5, beyond the bound of 4, and x = 0 to 1.
    env = CustomEnv(seed=0, dt=0.5, force=2.0, friction=0.0, bound=4.0)
    data = env.reset()
    data["state", "position"], data["state", "velocity"] = torch.tensor(position), torch.tensor(1.0)
    data["step_count"] = torch.tensor([step_count])
    after = env.step(data.set("action", torch.tensor(1)))["next"]
    assert (after["terminated"].item(), after["truncated"].item()) == (terminated, truncated)
    assert after["done"].item() == (terminated or truncated)


def test_truncated_at_step_200_and_not_before():
    env = CustomEnv(num_envs=3, seed=0, force=1e-3)  # too weak to leave the bound
    following = run(env, steps=401)["next"]
    truncated = following["truncated"].squeeze(-1)
    assert truncated.nonzero()[:, 1].tolist() == [199, 399] * 3
    assert not following["terminated"].any()
    assert torch.equal(following["done"], following["truncated"])
    assert following["step_count"][0, :, 0].tolist() == [*range(1, 201), *range(1, 201), 1]


def test_starts_fill_their_intervals_and_stay_inside():
    counter = torch.arange(EPISODES)
    start = CustomDynamics.reset(torch.zeros_like(counter), counter, torch.zeros_like(counter))
    for value, limit in ((start.position, 0.5), (start.velocity, 0.05)):
        assert value.abs().max() <= limit
        assert value.min() < -0.99 * limit
        assert value.max() > 0.99 * limit
        # The mean of 4,096 uniform draws in ±limit has a standard deviation of limit / sqrt(3 * 4096).
        assert abs(value.mean()) < 4 * limit / math.sqrt(3 * EPISODES)
    assert abs(torch.corrcoef(torch.stack((start.position, start.velocity)))[0, 1]) < 4 / math.sqrt(EPISODES)
    assert not start.step_count.any()
    assert not start.episode_reward.any()


# --- known returns ---


def returns(policy):
    """Returns of 4,096 first episodes, played by the pure functions."""
    index = torch.arange(EPISODES)
    dynamics, zero = CustomDynamics(), torch.zeros_like(index)
    current, running = dynamics.reset(zero, index, zero), torch.ones(EPISODES, dtype=torch.bool)
    total = torch.zeros(EPISODES, dtype=torch.float64)
    for _ in range(200):
        current, _, reward, terminated, truncated = dynamics.step(current, policy(current))
        total += reward * running
        running &= ~(terminated | truncated)
    assert not running.any()
    return total


def numpy_returns_of_random_actions():
    """The same problem written down a second time, in float64 and with numpy's own noise."""
    noise = np.random.default_rng(0)
    x, v = noise.uniform(-0.5, 0.5, EPISODES), noise.uniform(-0.05, 0.05, EPISODES)
    running, total = np.ones(EPISODES, dtype=bool), np.zeros(EPISODES)
    for _ in range(200):
        v = v + (noise.choice([-1.0, 1.0], EPISODES) - 0.1 * v) * 0.1
        x = x + v * 0.1
        total += np.where(running, 0.1 + (1 - np.abs(x) / 2.4), 0.0)
        running &= np.abs(x) <= 2.4
    return total


def test_random_actions_return_73_5():
    generator = torch.Generator().manual_seed(0)
    values = returns(lambda current: torch.randint(2, current.position.shape, generator=generator)).numpy()
    independent = numpy_returns_of_random_actions()
    standard_error = values.std() / math.sqrt(EPISODES)  # about 0.66
    assert 0.5 < standard_error < 0.8
    assert abs(values.mean() - 73.5) < 3 * standard_error
    assert abs(values.mean() - independent.mean()) < 3 * math.sqrt(2) * standard_error


def test_a_bang_bang_controller_returns_219_05():
    def controller(current):
        # Push against the point at which braking from now on would end, v |v| / (2 force), half a step ahead.
        ahead = current.position + 0.5 * current.velocity * current.velocity.abs() + 0.05 * current.velocity
        return (ahead < 0).long()

    values = returns(controller)
    # The standard deviation over episodes is 0.4, that of the mean 0.006.
    assert values.mean().item() == pytest.approx(219.05, abs=0.03)
    assert values.max() < 220
    # The same controller with its actions swapped runs away.
    assert returns(lambda current: 1 - controller(current)).mean() < 60


# --- specs ---


@pytest.mark.parametrize("num_envs", [None, 1, 7])
def test_torchrl_checks_the_specs(num_envs):
    env = CustomEnv(num_envs=num_envs, seed=0)
    assert env.batch_size == (() if num_envs is None else (num_envs,))
    check_env_specs(env)


@pytest.mark.parametrize("num_envs", [None, 1, 7])
def test_every_entry_has_its_shape_and_dtype(num_envs):
    batch = () if num_envs is None else (num_envs,)
    env = CustomEnv(num_envs=num_envs, seed=0)
    data = env.rand_step(env.reset())
    entries = {
        "observation": ((2,), torch.float32),
        "step_count": ((1,), torch.int64),
        "episode_reward": ((1,), torch.float32),
        "done": ((1,), torch.bool),
        "terminated": ((1,), torch.bool),
        "truncated": ((1,), torch.bool),
        ("state", "position"): ((), torch.float32),
        ("state", "velocity"): ((), torch.float32),
        ("state", "seed"): ((), torch.int64),
        ("state", "index"): ((), torch.int64),
        ("state", "episode"): ((), torch.int64),
    }
    for where, extra in ((data.exclude("next"), {"action"}), (data["next"], {"reward"})):
        assert set(where.keys(True, True)) == set(entries) | extra
        for key, (shape, dtype) in entries.items():
            assert (where[key].shape, where[key].dtype) == (batch + shape, dtype), key
    assert (data["action"].shape, data["action"].dtype) == (batch, torch.int64)
    assert (data["next", "reward"].shape, data["next", "reward"].dtype) == ((*batch, 1), torch.float32)
    assert env.action_spec.n == 2


def assert_stays_in_specs(env, steps):
    for policy in (push(0), push(1), seesaw):
        for data in run(env, policy, steps).unbind(-1):
            assert env.observation_spec.is_in(data.select(*env.observation_spec.keys(True, True)))
            following = data["next"]
            assert env.observation_spec.is_in(following.select(*env.observation_spec.keys(True, True)))
            assert env.reward_spec.is_in(following["reward"])
            assert env.full_done_spec.is_in(following.select(*env.full_done_spec.keys(True, True)))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    dt=st.floats(0.01, 2),
    force=st.floats(1e-3, 100),
    damping=st.floats(0, 1),
    bound=st.floats(0.51, 100),
    target=st.floats(-1, 1),
    survival_reward=st.floats(-5, 5),
    max_steps=st.integers(1, 20),
)
def test_values_stay_in_their_specs_for_any_constants(dt, damping, bound, target, **others):
    env = CustomEnv(
        num_envs=2, seed=0, dt=dt, friction=0.999 * damping / dt, bound=bound, target=target * bound, **others
    )
    assert_stays_in_specs(env, steps=22)


def test_values_stay_in_their_specs_through_a_whole_episode():
    assert_stays_in_specs(CustomEnv(num_envs=2, seed=1), steps=205)


def test_a_bound_without_the_last_step_would_be_too_tight():
    env = CustomEnv(num_envs=2, seed=0)
    positions = run(env, push(1))["next", "state", "position"]
    assert positions.max() > env.dynamics.bound
    spec = env.observation_spec.clone()
    spec["state", "position"] = Bounded(-env.dynamics.bound, env.dynamics.bound, (2,), dtype=torch.float32)
    env.observation_spec = spec
    with pytest.raises(AssertionError):
        assert_stays_in_specs(env, steps=80)


def test_the_spec_of_the_return_has_room_for_the_rounding_of_a_long_sum():
    # 4,000 times 1.1 in float32 is 4400.1 by then; the bound of one reward times 4,000 is 4400.04.
    env = CustomEnv(seed=0, dt=1e-6, bound=1e9, max_steps=4000)
    reward, total = torch.tensor(1.1), torch.tensor(0.0)
    for _ in range(4000):
        total = total + reward
    assert total > 4000 * (1.1 + 1e-5)
    assert env.observation_spec["episode_reward"].is_in(total.reshape(1))


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"dt": 0.0}, "dt must be > 0"),
        ({"dt": float("nan")}, "dt must be > 0"),
        ({"force": -1.0}, "force must be > 0"),
        ({"friction": 20.0}, "friction must be >= 0 and friction \\* dt at most 1"),
        ({"bound": 0.4}, "bound must be > 0.5"),
        ({"target": 3.0}, "target must lie within the bound"),
        ({"max_steps": 0}, "max_steps must be an integer >= 1"),
        ({"num_envs": 0}, "num_envs must be a positive integer, or None"),
        ({"num_envs": -3}, "num_envs must be .* got -3"),
        ({"num_envs": 2.0}, "num_envs must be .* got 2.0"),
        ({"num_envs": True}, "num_envs must be .* got True"),
    ],
)
def test_bad_arguments_are_refused_by_name(constants, message):
    with pytest.raises(ValueError, match=message):
        CustomEnv(**constants)


def test_unknown_constants_are_refused_by_name():
    with pytest.raises(TypeError, match="no argument gravity; its constants are dt, force, friction"):
        CustomEnv(gravity=9.81)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_everything_lives_on_the_device(device):
    env = CustomEnv(num_envs=2, device=device, seed=0)
    rollout = run(env, steps=40)
    assert env.device.type == rollout.device.type == torch.device(device).type
    assert all(leaf.device.type == env.device.type for leaf in rollout.values(True, True))
    assert env.fresh().device == env.device
    assert torch.equal(rollout["observation"][:, 0].cpu(), CustomEnv(num_envs=2, seed=0).reset()["observation"])


# --- seeds and resets ---


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


def test_a_seed_uses_no_global_randomness():
    before = torch.get_rng_state()
    run(CustomEnv(num_envs=2, seed=0))
    assert torch.equal(before, torch.get_rng_state())


def advance(env, steps):
    data = env.reset()
    for _ in range(steps):
        _, data = env.step_and_maybe_reset(seesaw(data))
    return data.exclude("action")


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

    def _remember(self, state):
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


# --- the same episodes, however they are driven ---

LENGTH = 90


def by_rollout(env):
    return run(env, steps=LENGTH)


def by_collector(env):
    frames = LENGTH * env.batch_size.numel()
    collector = Collector(env, seesaw, frames_per_batch=frames, total_frames=-1, auto_register_policy_transforms=False)
    rollout = next(iter(collector))
    collector.shutdown()
    return rollout


def by_hand(env):
    data, steps = env.reset(), []
    for _ in range(LENGTH):
        steps.append(env.step(seesaw(data)))
        data = step_mdp(steps[-1])
        if data["done"].any():
            data = env.reset(data.set("_reset", data["done"].clone()))
            data.pop("_reset", None)
    return torch.stack([step.clone() for step in steps], 1)


def by_transformed_env(env):
    return by_rollout(
        TransformedEnv(
            env, Compose(RewardSum(in_keys=["reward"], out_keys=["sum"]), StepCounter(step_count_key="steps"))
        )
    )


def by_pure_functions(env, **compile_options):
    def step_and_reset(current, observation):
        action = choose(observation, current.step_count)
        following, after, reward, terminated, truncated = env.pure_step(current, action)
        done = terminated | truncated
        new = env.pure_reset(current.seed, current.index, current.episode + done)
        start = torch.stack((new.position, new.velocity), -1)
        merged = [torch.where(done, fresh, kept) for fresh, kept in zip(new, following, strict=True)]
        row = {
            "observation": observation,
            "step_count": current.step_count.unsqueeze(-1),
            "action": action,
            "next": {"observation": after, "reward": reward.unsqueeze(-1), "done": done.unsqueeze(-1)},
        }
        return CustomState(*merged), torch.where(done.unsqueeze(-1), start, after), row

    if compile_options:
        step_and_reset = torch.compile(step_and_reset, fullgraph=True, **compile_options)
    index = torch.arange(env.num_envs)
    current = env.pure_reset(torch.full_like(index, 11), index, torch.zeros_like(index))
    observation, rows = torch.stack((current.position, current.velocity), -1), []
    for _ in range(LENGTH):
        current, observation, row = step_and_reset(current, observation)
        rows.append(TensorDict(row, batch_size=[env.num_envs]))
    return torch.stack(rows, 1)


def compiled_pure_functions(env):
    torch.compiler.reset()
    return by_pure_functions(env, backend="eager")


def assert_drives_the_same_episodes(drive, env):
    expected, got = by_rollout(CustomEnv(num_envs=3, seed=11)), drive(env)
    assert expected["next", "done"].sum() > 6
    for key in ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "done")):
        assert torch.equal(got[key], expected[key]), key


@pytest.mark.parametrize(
    "drive", [by_collector, by_hand, by_transformed_env, by_pure_functions, compiled_pure_functions]
)
def test_the_same_episodes_however_they_are_driven(drive):
    assert_drives_the_same_episodes(drive, CustomEnv(num_envs=3, seed=11))


class DrawsFromAGenerator(CustomEnv):
    """Draws starts in the order in which resets happen to be called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        generator = torch.Generator().manual_seed(11)

        def pure_reset(seed, index, episode):
            start = CustomDynamics.reset(seed, index, episode)
            return start._replace(position=torch.rand(index.shape, generator=generator) - 0.5)

        self.pure_reset = pure_reset


@pytest.mark.parametrize("drive", [by_rollout, by_hand, by_pure_functions])
def test_starts_from_a_generator_would_depend_on_how_they_are_driven(drive):
    with pytest.raises(AssertionError):
        assert_drives_the_same_episodes(drive, DrawsFromAGenerator(num_envs=3, seed=11))


@pytest.mark.slow
def test_the_same_episodes_when_inductor_generates_the_code():
    torch.compiler.reset()
    expected = by_rollout(CustomEnv(num_envs=3, seed=11))
    got = by_pure_functions(CustomEnv(num_envs=3, seed=11), backend="inductor")
    first = expected["step_count"].squeeze(-1) == 0
    assert torch.equal(got["step_count"], expected["step_count"])
    assert torch.equal(got["observation"][first], expected["observation"][first])
    # Generated code may contract a product and a sum into one rounding.
    torch.testing.assert_close(got["next", "observation"], expected["next", "observation"], rtol=0, atol=1e-5)
    torch.testing.assert_close(got["next", "reward"], expected["next", "reward"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_step_of_the_environment_is_the_same():
    torch.compiler.reset()
    env, compiled = CustomEnv(num_envs=3, seed=11), CustomEnv(num_envs=3, seed=11)
    step = torch.compile(compiled.step, backend="eager")
    data, other = env.reset(), compiled.reset()
    for _ in range(30):
        data, other = env.step(seesaw(data)), step(seesaw(other))
        assert_same(data, other)
        data, other = env.maybe_reset(step_mdp(data)), compiled.maybe_reset(step_mdp(other))


# --- state in the TensorDict ---


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
