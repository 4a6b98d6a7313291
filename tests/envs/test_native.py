"""What `NativeEnv` gives every native environment, on the ones of this package and on one of a user's making."""

from dataclasses import dataclass, replace

import pytest
import torch
from drift import DriftDynamics, DriftEnv
from rollouts import assert_same, run
from torchrl.data import Bounded, Categorical
from torchrl.envs import EnvBase

from fp8rl_torchrl.envs import AcrobotEnv, CartPoleEnv, CustomEnv, EnvConformanceError, PendulumEnv, check_env

ENVS = [CustomEnv, CartPoleEnv, DriftEnv, AcrobotEnv, PendulumEnv]


def same_way(td):
    """Actions that end episodes: the same way for eight steps, then once the other."""
    way = (td["step_count"].squeeze(-1) % 9 == 8).long()
    return td.set("action", way)


def act(env, steps):
    """A rollout [N, T] with the same actions every time."""
    if env.action_spec.dtype == torch.int64:
        return run(env, same_way, steps)
    return run(env, lambda td: td.set("action", torch.full((*td.batch_size, 1), 0.7)), steps)


def advance_to(env, steps):
    """The TensorDict after so many steps."""
    return act(env, steps)[..., -1]["next"]


# --- conformance ---


@pytest.mark.parametrize("num_envs", [None, 1, 8])
@pytest.mark.parametrize("make", ENVS)
def test_passes_every_check(make, num_envs):
    report = check_env(lambda: make(num_envs, max_steps=15), max_steps=40)
    partial = {"partial_reset_isolated", "partial_reset_applied"}
    assert set(report.not_reached) == (set() if num_envs == 8 else partial)


class SharesMemory(DriftEnv):
    """Negative twin: what a step passes on is the same tensor in the next TensorDict."""

    def write(self, state, observation, terminated, truncated):
        written = super().write(state, observation, terminated, truncated)
        written["state"].set("wind", state.wind)
        return written

    def _step(self, tensordict):
        stepped = super()._step(tensordict)
        tensordict["state", "wind"].zero_()
        return stepped


class TooTight(DriftEnv):
    """Negative twin: limits that an episode leaves."""

    @dataclass(frozen=True, kw_only=True)
    class Dynamics(DriftDynamics):
        limits = property(lambda self: replace(super().limits, observation=((-2.0, 2.0),)))

    dynamics_type = Dynamics


@pytest.mark.parametrize(("make", "check"), [(SharesMemory, "input_unchanged"), (TooTight, "bounds")])
def test_a_broken_one_fails(make, check):
    with pytest.raises(EnvConformanceError) as raised:
        check_env(lambda: make(2), max_steps=30)
    assert check in raised.value.report.failed


# --- specs and arguments ---


def test_the_specs_are_made_of_the_limits():
    env = DriftEnv(3, max_steps=5)
    assert isinstance(env, EnvBase)
    assert isinstance(env.action_spec, Bounded)
    assert env.action_spec.shape == (3, 1)
    assert env.observation_spec["observation"].shape == (3, 1)
    assert env.observation_spec["observation"].space.low.tolist() == [[-6.0]] * 3
    assert env.observation_spec["state", "wind"].space.high.tolist() == [1.0] * 3
    assert env.observation_spec["step_count"].space.high.tolist() == [[5]] * 3
    assert env.reward_spec.space.low.tolist() == [[-6.0]] * 3
    assert env.observation_spec["episode_reward"].space.low.flatten().tolist() == pytest.approx([-30.0] * 3)
    assert list(env.state_spec.keys()) == ["step_count", "episode_reward", "state"]
    assert env.full_done_spec["terminated"].dtype == torch.bool
    assert isinstance(CartPoleEnv().action_spec, Categorical)


@pytest.mark.parametrize("make", ENVS)
def test_bad_arguments_are_refused_by_name(make):
    with pytest.raises(TypeError, match=f"{make.__name__} has no argument colour; its constants are .*max_steps"):
        make(colour=3)
    for num_envs in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"num_envs must be a positive integer, .*got {num_envs}"):
            make(num_envs)


@pytest.mark.parametrize("make", ENVS)
def test_a_fresh_one_is_of_the_same_class_with_the_same_constants(make):
    env = make(3, seed=5, max_steps=7)
    fresh = env.fresh(num_envs=2, seed=1)
    assert type(fresh) is make
    assert fresh.batch_size == (2,)
    assert fresh.dynamics == env.dynamics
    assert env.fresh(seed=1).batch_size == (3,)
    assert_same(env.fresh(seed=5).reset(), make(3, seed=5).reset())


# --- read, write and the pure functions ---


@pytest.mark.parametrize("num_envs", [None, 4])
@pytest.mark.parametrize("make", ENVS)
def test_read_gives_what_write_was_given(make, num_envs):
    env = make(num_envs, seed=0)
    data = act(env, 3)[..., -1]["next"]
    state = env.read(data)
    assert type(state) is make.state_type
    assert all(value.shape == env.batch_size for value in state)
    written = env.write(state, data["observation"], data["terminated"].squeeze(-1), data["truncated"].squeeze(-1))
    assert_same(written, data.exclude("reward"))
    assert written.batch_size == env.batch_size
    assert torch.equal(env.observe(state), data["observation"])


def written_and_entries(env):
    """The same arguments given to `write` and to `entries`, and these arguments' tensors."""
    data = advance_to(env, 3)
    given = env.read(data), data["observation"], *(data[name].squeeze(-1) for name in ("terminated", "truncated"))
    return env.write(*given), env.entries(*given), [*given[0], *given[1:]]


def assert_written_as_listed(env):
    written, entries, _ = written_and_entries(env)
    assert set(entries) == set(written.keys(True, True))
    for key, value in entries.items():
        assert torch.equal(written[key], value), key
        assert written[key].dtype == value.dtype


@pytest.mark.parametrize("num_envs", [None, 4])
@pytest.mark.parametrize("make", ENVS)
def test_what_is_written_is_what_entries_lists(make, num_envs):
    assert_written_as_listed(make(num_envs, seed=0))


class LeavesOut(DriftEnv):
    """Negative twin: writes an entry that is not listed."""

    def entries(self, *arguments):
        return {key: value for key, value in super().entries(*arguments).items() if key != "step_count"}

    def write(self, state, *arguments):
        return super().write(state, *arguments).set("step_count", state.step_count.unsqueeze(-1))


def test_an_entry_that_is_not_listed_is_found():
    with pytest.raises(AssertionError):
        assert_written_as_listed(LeavesOut(4, seed=0))


def assert_written_apart(env):
    """No two entries share memory, and the physics and counters share none with the state either."""
    written, _, given = written_and_entries(env)
    pointers = [leaf.untyped_storage().data_ptr() for leaf in written.values(True, True)]
    assert len(set(pointers)) == len(pointers)
    inner = {leaf.untyped_storage().data_ptr() for leaf in written["state"].values()}
    assert not inner & {tensor.untyped_storage().data_ptr() for tensor in given}


class Shares(DriftEnv):
    """Negative twin: the listed entries themselves, which may be views of one another."""

    def write(self, state, *arguments):
        return super().write(state, *arguments).set(("state", "wind"), state.wind)


@pytest.mark.parametrize("num_envs", [None, 4])
@pytest.mark.parametrize("make", ENVS)
def test_what_is_written_shares_no_memory(make, num_envs):
    assert_written_apart(make(num_envs, seed=0))
    with pytest.raises(AssertionError):
        assert_written_apart(Shares(num_envs, seed=0))


@pytest.mark.parametrize("make", ENVS)
def test_a_step_of_the_environment_is_the_pure_step_read_and_written(make):
    env = make(4, seed=0)
    for row in act(env, 40).unbind(-1):
        state, observation, reward, terminated, truncated = env.pure_step(env.read(row), row["action"])
        assert_same(env.write(state, observation, terminated, truncated), row["next"].exclude("reward"))
        assert torch.equal(reward.unsqueeze(-1), row["next", "reward"])
        assert torch.equal(env.observe(state), observation)


@pytest.mark.parametrize("make", ENVS)
def test_an_episode_starts_as_the_pure_reset_says(make):
    env = make(4, seed=11, max_steps=20)
    rollout = act(env, 60)
    starts = rollout[rollout["step_count"].squeeze(-1) == 0]
    assert starts["state", "episode"].max() >= 2
    state = starts["state"]
    start = env.pure_reset(*(state[name] for name in ("seed", "index", "episode")))
    assert torch.equal(env.observe(start), starts["observation"])
    assert set(state["seed"].tolist()) == {11}


@pytest.mark.parametrize("make", ENVS)
def test_a_compiled_step_and_reset_has_no_graph_break_and_shares_no_memory(make):
    env = make(4, seed=0, max_steps=3)

    def step_and_reset(state, action):
        state, observation, _, terminated, truncated = env.pure_step(state, action)
        row = env.write(state, observation, terminated, truncated)
        done = terminated | truncated
        start = env.pure_reset(state.seed, state.index, state.episode + done)
        state = type(state)(*(torch.where(done, new, old) for new, old in zip(start, state, strict=True)))
        return row, env.write(state, env.observe(state), done & ~done, done & ~done)

    torch.compiler.reset()
    arguments = env.read(advance_to(env, 2)), env.action_spec.zero()
    compiled = torch.compile(step_and_reset, fullgraph=True, backend="aot_eager")(*arguments)
    eager = step_and_reset(*arguments)
    assert eager[0]["truncated"].all()
    assert not eager[1]["step_count"].any()
    for rows in (compiled, eager):
        pointers = [leaf.data_ptr() for row in rows for leaf in row.values(True, True)]
        pointers += [value.data_ptr() for value in arguments[0]]
        assert len(set(pointers)) == len(pointers)
    for got, expected in zip(compiled, eager, strict=True):
        assert_same(got, expected)


# --- seeds and partial resets ---


@pytest.mark.parametrize("make", ENVS)
def test_the_same_seed_gives_the_same_episodes_and_another_one_others(make):
    first = act(make(3, seed=4), 40)
    assert_same(first, act(make(3, seed=4), 40))
    assert not torch.isclose(first["observation"], act(make(3, seed=5), 40)["observation"]).all(-1).any()
    assert_same(first[1], act(make(2, seed=4), 40)[1])  # whatever the size of the batch
    env = make(3, seed=0)
    act(env, 20)
    env.set_seed(4)
    assert_same(act(env, 40), first)


@pytest.mark.parametrize("make", ENVS)
def test_a_partial_reset_touches_no_other_environment(make):
    env = make(3, seed=2)
    data = advance_to(env, 5).exclude("reward")
    data["_reset"] = torch.tensor([[True], [False], [False]])
    after = env.reset(data.clone())
    assert_same(after[1:].exclude("_reset"), data[1:].exclude("_reset"))
    assert after["step_count"].flatten().tolist() == [0, *data["step_count"].flatten().tolist()[1:]]
    before = data["state", "episode"]
    assert (after["state", "episode"] - before).tolist() == [1, 0, 0]
    start = env.pure_reset(*(torch.tensor([counter]) for counter in (2, 0, before[0].item() + 1)))
    assert torch.equal(after["observation"][:1], env.observe(start))
