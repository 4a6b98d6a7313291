"""`make`: Gymnasium environments in TorchRL, with nothing lost, added or repeated at the ends of episodes."""

import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import FlattenObservation
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, TransformedEnv, check_env_specs

from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.envs.gym import GymnasiumEnv, make
from fp8rl_torchrl.envs.gymnasium_env import ENV_ID, CustomGymnasiumVectorEnv

CONTROL = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "FrozenLake-v1"]
BOX = spaces.Box(0, 1000, (1,), np.float32)


class Count(gymnasium.Env):
    """Observes 100 * episode + step, episodes counted from 1, so that every observation tells where it comes from."""

    observation_space = BOX
    action_space = spaces.Discrete(2)

    def __init__(self, length=3, truncates=False):
        self.length, self.truncates, self.episode = length, truncates, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        self.step_count += 1
        over = self.step_count >= self.length
        return self._observe(), 1.0, over and not self.truncates, over and self.truncates, {}

    def _observe(self):
        return np.array([100 * self.episode + self.step_count], dtype=np.float32)


class Spaces(gymnasium.Env):
    """Random observations of any space; remembers the actions it was given."""

    def __init__(self, observation=BOX, action=None):
        self.observation_space = observation
        self.action_space = spaces.Discrete(2) if action is None else action
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.actions.append(action)
        return self.observation_space.sample(), 0.0, False, False, {}


class Reuses(Count):
    """Writes every observation into the same array."""

    def __init__(self):
        super().__init__(length=100)
        self.buffer = np.zeros(1, dtype=np.float32)

    def _observe(self):
        self.buffer[:] = super()._observe()
        return self.buffer


@pytest.fixture(autouse=True)
def _registered():
    for name, creator in {"Count-v0": Count, "Spaces-v0": Spaces, "Reuses-v0": Reuses}.items():
        gymnasium.register(f"test/{name}", creator, disable_env_checker=True)
    yield
    for name in [name for name in gymnasium.registry if name.startswith("test/")]:
        del gymnasium.registry[name]


def collect(env, frames, batches=1):
    """Batches of transitions ``[N, T]`` of a TorchRL collector with random actions, joined along time."""
    collector = Collector(env, None, frames_per_batch=frames, total_frames=frames * batches)
    data = torch.cat([batch.clone() for batch in collector], -1)
    collector.shutdown(close_env=False)
    return data


def column(data, *key):
    return data[key].squeeze(-1).tolist()


# ---- native where we have one


@pytest.mark.parametrize("name", ["CustomEnv", ENV_ID, f"fp8rl_torchrl.envs:{ENV_ID}"])
def test_our_own_environment_is_native(name):
    env = make(name, num_envs=3, seed=5, max_steps=7)
    assert type(env) is CustomEnv
    assert env.dynamics.max_steps == 7
    expected = CustomEnv(num_envs=3, seed=5).reset()["observation"]
    torch.testing.assert_close(env.reset()["observation"], expected)
    assert make(name).batch_size == ()


# ---- Gymnasium's own


@pytest.mark.parametrize("num_envs", [None, 1, 4])
@pytest.mark.parametrize("name", CONTROL)
def test_control_environments_run_in_a_collector(name, num_envs):
    env = make(name, num_envs, seed=0)
    assert isinstance(env, GymnasiumEnv)
    assert env.batch_size == (() if num_envs is None else (num_envs,))
    check_env_specs(env)
    data = collect(env, frames=60, batches=2)
    assert data["observation"].dtype == data["next", "reward"].dtype == data["next", "episode_reward"].dtype
    assert data["observation"].dtype == torch.float32
    assert data["step_count"].dtype == torch.int64
    single = gymnasium.make(name)
    if isinstance(single.action_space, spaces.Discrete):
        assert data["action"].dtype == torch.int64
        assert data["action"].shape == data.batch_size  # categorical, not one-hot
        assert set(data["action"].flatten().tolist()) == set(range(single.action_space.n))
    else:
        assert data["action"].dtype == torch.float32
        assert data["action"].shape == (*data.batch_size, *single.action_space.shape)
    for key in ("reward", "done", "terminated", "truncated", "step_count", "episode_reward"):
        assert data["next", key].shape == (*data.batch_size, 1)


@pytest.mark.parametrize("num_envs", [None, 2])
def test_bookkeeping_of_whole_episodes(num_envs):
    data = collect(make("CartPole-v1", num_envs, seed=0), frames=400)
    rows = data if num_envs else data[None]
    assert rows["next", "done"].sum() >= 10
    for row in rows:
        expected, total = 0, 0.0
        for step in row:
            assert step["step_count"].item() == expected
            expected, total = expected + 1, total + step["next", "reward"].item()
            assert step["next", "step_count"].item() == expected
            assert step["next", "episode_reward"].item() == total
            if step["next", "done"].item():
                expected, total = 0, 0.0


def test_a_discrete_observation_is_one_hot():
    data = collect(make("FrozenLake-v1", 2, seed=0, is_slippery=False), frames=200)
    observation = data["observation"]
    assert observation.shape == (2, 100, 16)
    assert (observation.sum(-1) == 1).all()
    starts = data["step_count"].squeeze(-1) == 0
    assert (observation[starts].argmax(-1) == 0).all()
    # left 0, down 1, right 2, up 3 on a 4 x 4 grid: right of field 0 is field 1
    moved = starts & (data["action"] == 2)
    assert moved.any()
    assert (data["next", "observation"][moved].argmax(-1) == 1).all()


@pytest.mark.parametrize("num_envs", [None, 3])
def test_seeds(num_envs):
    def episodes(seed):
        env = make("CartPole-v1", num_envs, seed=seed)
        torch.manual_seed(0)  # of the random actions
        return collect(env, frames=90)["observation"]

    torch.testing.assert_close(episodes(3), episodes(3), rtol=0, atol=0)
    assert not torch.isclose(episodes(3), episodes(4)).all(-1).any()
    if num_envs:
        first = make("CartPole-v1", num_envs, seed=3).reset()["observation"]
        assert len({tuple(row) for row in first.tolist()}) == num_envs


def test_without_a_seed_torch_decides():
    def first(torch_seed):
        torch.manual_seed(torch_seed)
        return make("CartPole-v1").reset()["observation"].tolist()

    assert first(0) == first(0) != first(1)


# ---- the ends of episodes


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_last_observations_survive_and_resets_are_no_steps(mode):
    env = make(SyncVectorEnv([lambda: Count(3), lambda: Count(2, truncates=True)], autoreset_mode=mode))
    data = collect(env, frames=12, batches=2)
    # episodes of 3 steps and of 2; both end together after 6 steps; a batch ends in mid-episode
    assert column(data, "observation") == [
        [100, 101, 102, 200, 201, 202, 300, 301, 302, 400, 401, 402],
        [100, 101, 200, 201, 300, 301, 400, 401, 500, 501, 600, 601],
    ]
    assert column(data, "next", "observation") == [
        [101, 102, 103, 201, 202, 203, 301, 302, 303, 401, 402, 403],
        [101, 102, 201, 202, 301, 302, 401, 402, 501, 502, 601, 602],
    ]
    assert column(data, "next", "terminated") == [[False, False, True] * 4, [False] * 12]
    assert column(data, "next", "truncated") == [[False] * 12, [False, True] * 6]
    assert column(data, "next", "step_count") == [[1, 2, 3] * 4, [1, 2] * 6]
    assert column(data, "next", "episode_reward") == [[1, 2, 3] * 4, [1, 2] * 6]
    assert column(data, "next", "reward") == [[1] * 12] * 2  # a dummy step would have reward 0


@pytest.mark.parametrize("num_envs", [None, 2])
def test_last_observations_survive_in_what_make_builds(num_envs):
    data = collect(make("test/Count-v0", num_envs, length=2), frames=12)
    row = data if num_envs is None else data[1]
    first = row["observation"][0].item()
    expected = [first + 100 * (step // 2) + step % 2 for step in range(len(row))]
    assert column(row, "observation") == expected
    assert column(row, "next", "observation") == [value + 1 for value in expected]
    assert column(row, "next", "done") == [False, True] * (len(row) // 2)


def test_what_next_step_mode_would_do_to_the_data():
    """The negative twin: the raw environment hands out a step that is a mere reset, with reward 0."""
    env = SyncVectorEnv([lambda: Count(2)], autoreset_mode=AutoresetMode.NEXT_STEP)
    env.reset()
    steps = [env.step(np.array([0])) for _ in range(4)]
    assert [step[0].item() for step in steps] == [101, 102, 200, 201]
    assert [step[1].item() for step in steps] == [1, 1, 0, 1]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_our_vector_environment_in_every_mode(mode):
    env = make(CustomGymnasiumVectorEnv(3, autoreset_mode=mode, max_steps=5), seed=0)
    data = collect(env, frames=60)
    assert data["next", "done"][:, 4::5].all()
    assert data["next", "done"].sum() == 3 * 4
    root, following = data["observation"][:, 1:], data["next", "observation"][:, :-1]
    ended = data["next", "done"][:, :-1].squeeze(-1)
    torch.testing.assert_close(root[~ended], following[~ended], rtol=0, atol=0)
    # a step moves by at most 0.1 * (0.05 + 5 * 0.1), and never exactly onto the next start
    assert ((data["next", "observation"] - data["observation"])[..., 0].abs() < 0.06).all()
    assert (root[ended] != following[ended]).all()
    assert (data["step_count"][:, 1:].squeeze(-1)[ended] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_processes_of_a_callers_own_in_every_mode(mode):
    env = make(AsyncVectorEnv([lambda: Count(3), lambda: Count(2)], autoreset_mode=mode))
    data = collect(env, frames=12)
    env.close()
    assert column(data, "next", "observation") == [[101, 102, 103, 201, 202, 203], [101, 102, 201, 202, 301, 302]]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_reset_in_mid_episode_touches_no_other_environment(mode):
    env = make(SyncVectorEnv([lambda: Count(3), lambda: Count(2), lambda: Count(9)], autoreset_mode=mode))
    action = torch.zeros(3, dtype=torch.int64)
    data = env.reset()
    for _ in range(2):
        data = env.step(data.set("action", action))["next"]
    # the second environment is done, the first is interrupted, the third goes on
    mask = torch.tensor([[True], [True], [False]])
    data = env.reset(data.set("_reset", mask))
    assert data["observation"].squeeze(-1).tolist() == [200, 200, 102]
    assert data["step_count"].squeeze(-1).tolist() == [0, 0, 2]
    data = env.step(data.set("action", action))["next"]
    assert data["observation"].squeeze(-1).tolist() == [201, 201, 103]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_full_reset_starts_all_anew(mode):
    env = make(SyncVectorEnv([lambda: Count(3), lambda: Count(2)], autoreset_mode=mode))
    data = env.rollout(2, break_when_any_done=False)
    assert env.reset(data[:, -1]["next"].exclude("_reset"))["observation"].min() >= 200  # a TensorDict without a mask
    assert env.reset()["observation"].min() >= 300
    assert env.rollout(1)["step_count"].sum() == 0


def test_observations_are_never_overwritten():
    for env in (make("test/Reuses-v0"), make(SyncVectorEnv([Reuses], copy=False, autoreset_mode="Disabled"))):
        first = env.reset()
        before = first["observation"].clone()
        second = env.step(env.rand_action(first))["next"]
        torch.testing.assert_close(first["observation"], before)
        assert second["observation"].item() == before.item() + 1


# ---- an existing environment


def test_an_existing_single_environment():
    env = make(gymnasium.make("CartPole-v1"), seed=0)
    expected = make("CartPole-v1", seed=0)
    torch.testing.assert_close(env.reset()["observation"], expected.reset()["observation"])
    assert type(env.fresh(num_envs=2, seed=1)) is GymnasiumEnv
    assert env.fresh(num_envs=2).batch_size == (2,)
    assert make(gymnasium.spec("CartPole-v1"), num_envs=2).batch_size == (2,)


class Batch(VectorEnv):
    """Two counting environments of lengths 3 and 2, of somebody else's making: no subclass that we know."""

    def __init__(self, mode):
        self.env = SyncVectorEnv([lambda: Count(3), lambda: Count(2)], autoreset_mode=mode)
        self.metadata, self.num_envs = self.env.metadata, 2
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space
        self.single_observation_space, self.single_action_space = BOX, spaces.Discrete(2)
        self.masked = self.env.autoreset_mode == AutoresetMode.DISABLED

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options=options if self.masked else None)

    def step(self, actions):
        return self.env.step(actions)


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("wrap", [lambda env: env, RecordEpisodeStatistics])
def test_a_batch_of_somebody_elses(mode, wrap):
    env = make(wrap(Batch(mode)))
    data = collect(env, frames=12)
    assert column(data, "observation") == [[100, 101, 102, 200, 201, 202], [100, 101, 200, 201, 300, 301]]
    assert column(data, "next", "observation") == [[101, 102, 103, 201, 202, 203], [101, 102, 201, 202, 301, 302]]
    start = env.reset()
    before = start["observation"].clone()
    interrupted = start.set("_reset", torch.tensor([[True], [False]]))
    if mode == AutoresetMode.DISABLED:
        assert (env.reset(interrupted)["observation"] - before).tolist() == [[100], [0]]
    else:
        with pytest.raises(RuntimeError, match=r"cannot reset environments \[0\] in mid-episode"):
            env.reset(interrupted)


def test_existing_environments_that_are_refused():
    with pytest.raises(ValueError, match="cannot be reset one environment at a time"):
        make(Batch(AutoresetMode.NEXT_STEP))
    with pytest.raises(ValueError, match=r"CartPoleVectorEnv.*cannot be reset one environment at a time.*pass its id"):
        make(gymnasium.make_vec("CartPole-v1", num_envs=2))  # Gymnasium's own batch ignores a mask
    with pytest.raises(ValueError, match="exists already, with 2"):
        make(SyncVectorEnv([Count, Count]), num_envs=3)
    with pytest.raises(ValueError, match="length: arguments of an environment cannot be set"):
        make(Count(), length=3)
    with pytest.raises(TypeError, match="got int"):
        make(3)
    with pytest.raises(RuntimeError, match="pass make\\(\\) the id"):
        make(Count()).fresh()


# ---- fresh copies


@pytest.mark.parametrize("num_envs", [None, 2])
def test_a_fresh_copy_is_independent(num_envs):
    env = make("CartPole-v1", num_envs, seed=0)
    twin = make("CartPole-v1", num_envs, seed=0)
    start = env.reset()
    twin.reset()
    copy = env.fresh(seed=9)
    assert copy.batch_size == env.batch_size
    torch.testing.assert_close(
        copy.reset()["observation"], make("CartPole-v1", num_envs, seed=9).reset()["observation"]
    )
    copy.rollout(30, break_when_any_done=False)
    action = torch.ones(env.batch_size, dtype=torch.int64)
    for _ in range(40):  # across ends of episodes: the copy has drawn nothing from this one's random streams
        step, expected = env.step(start.set("action", action)), twin.step(start.clone().set("action", action))
        torch.testing.assert_close(step["next", "observation"], expected["next", "observation"], rtol=0, atol=0)
        start = env.step_mdp(step) if not step["next", "done"].any() else env.reset()
        if step["next", "done"].any():
            twin.reset()
    assert env.fresh(num_envs=5).batch_size == (5,)
    assert not getattr(env, "stateless", False)


def test_a_wrapped_environment_can_have_what_an_id_cannot():
    pair = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Discrete(3)})
    env = make(FlattenObservation(gymnasium.make("test/Spaces-v0", observation=pair)))
    assert collect(env, frames=4)["observation"].shape == (4, 5)
    assert env.fresh(num_envs=2, seed=0).reset()["observation"].shape == (2, 5)


def test_a_fresh_copy_keeps_the_arguments():
    env = make("test/Count-v0", num_envs=2, length=4)
    assert env.fresh(num_envs=1).rollout(10)["next", "done"].shape[1] == 4


# ---- spaces


@pytest.mark.parametrize(
    ("observation", "named"),
    [
        (spaces.Dict({"a": BOX}), "Dict"),
        (spaces.Tuple([BOX]), "Tuple"),
        (spaces.MultiDiscrete([2, 3]), "MultiDiscrete"),
        (spaces.MultiBinary(3), "MultiBinary"),
        (spaces.Text(3), "Text"),
        (spaces.Sequence(BOX), "Sequence"),
    ],
)
@pytest.mark.parametrize("num_envs", [None, 2])
def test_unsupported_observations_are_refused_by_name(observation, named, num_envs):
    with pytest.raises(ValueError, match=f"test/Spaces-v0: observations of the space {named} are not supported"):
        make("test/Spaces-v0", num_envs, observation=observation)


@pytest.mark.parametrize(
    "action",
    [
        spaces.MultiDiscrete([2, 3]),
        spaces.Dict({"a": BOX}),
        spaces.Tuple([BOX]),
        spaces.MultiBinary(2),
        spaces.Box(0, 5, (2,), np.int64),
    ],
)
@pytest.mark.parametrize("num_envs", [None, 2])
def test_unsupported_actions_are_refused_by_name(action, num_envs):
    with pytest.raises(
        ValueError, match=f"test/Spaces-v0: actions of the space {type(action).__name__}.* are not supported"
    ):
        make("test/Spaces-v0", num_envs, action=action)
    with pytest.raises(ValueError, match="actions of the space"):
        make(SyncVectorEnv([lambda: Spaces(action=action)]))


def test_a_refused_environment_is_not_touched():
    env = Spaces(action=spaces.MultiBinary(2))
    env.reset = env.close = None
    with pytest.raises(ValueError, match="MultiBinary"):
        make(env)
    assert env.actions == []
    for space in (spaces.Discrete(3), spaces.Dict({"a": BOX})):
        with pytest.raises(ValueError, match="exists already"):
            make(SyncVectorEnv([lambda space=space: Spaces(space)]))


@pytest.mark.parametrize("num_envs", [None, 1, 2])
@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (3,), np.float64),
        spaces.Box(0, 255, (4,), np.uint8),
        spaces.Box(-5, 5, (2,), np.int64),
        spaces.Box(-np.inf, np.inf, (3,), np.float16),
        spaces.Box(-1, 1, (), np.float32),
        spaces.Discrete(5, start=2),
    ],
)
def test_vector_observations_become_float32(space, num_envs):
    env = make("test/Spaces-v0", num_envs, observation=space)
    check_env_specs(env)
    data = collect(env, frames=12)
    assert data["observation"].dtype == torch.float32
    size = 5 if isinstance(space, spaces.Discrete) else int(np.prod(space.shape))
    assert data["observation"].shape[-1] == size
    assert env.observation_spec["observation"].shape[-1] == size


@pytest.mark.parametrize("num_envs", [None, 2])
def test_images_pass_unchanged(num_envs):
    env = make("test/Spaces-v0", num_envs, observation=spaces.Box(0, 255, (8, 8, 3), np.uint8))
    check_env_specs(env)
    data = collect(env, frames=4)
    assert data["observation"].dtype == torch.uint8
    assert data["observation"].shape[-3:] == (8, 8, 3)
    assert data["observation"].float().std() > 30


@pytest.mark.parametrize("num_envs", [None, 2])
def test_actions_arrive_as_the_environment_wants_them(num_envs):
    class Wants(Spaces):
        def step(self, action):
            assert self.action_space.contains(action), (action, self.action_space)
            return super().step(action)

    for action in (
        spaces.Discrete(3, start=4),
        spaces.Box(-2, 2, (3,), np.float64),
        spaces.Box(-1, 1, (1,), np.float32),
    ):
        gymnasium.register("test/Wants-v0", Wants, disable_env_checker=True)
        env = make("test/Wants-v0", num_envs, action=action)
        assert env.action_spec.dtype == (torch.int64 if isinstance(action, spaces.Discrete) else torch.float32)
        collect(env, frames=20)
        del gymnasium.registry["test/Wants-v0"]


# ---- what is refused


@pytest.mark.parametrize("num_envs", [None, 2])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPoole-v1", r"no environment 'CartPoole-v1'.*Did you mean: `CartPole`"),
        ("LunarLander-v2", "LunarLander-v3"),
        ("CartPole-v99", r"no environment 'CartPole-v99'"),
        ("nowhere/CartPole-v1", "Namespace nowhere not found"),
        ("no_such_package:CartPole-v1", "no_such_package"),
        ("not an id", "cannot be made: Malformed"),
    ],
)
def test_unknown_names_are_refused_with_advice(name, message, num_envs):
    with pytest.raises(ValueError, match=message):
        make(name, num_envs)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ValueError, match=r"LunarLander-v3.*pip install \"fp8rl_torchrl\[box2d\]\""):
        make("LunarLander-v3")


@pytest.mark.parametrize("num_envs", [0, -1, 2.0, True, "3"])
@pytest.mark.parametrize("name", ["CustomEnv", "CartPole-v1"])
def test_wrong_numbers_of_environments_are_refused(name, num_envs):
    with pytest.raises(ValueError, match="num_envs must be a positive integer, or None"):
        make(name, num_envs)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True])
def test_wrong_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed must be an integer >= 0, or None"):
        make("CartPole-v1", seed=seed)


@pytest.mark.parametrize("device", ["cuda:97", "gpu", "banana", None])
@pytest.mark.parametrize("name", ["CustomEnv", "CartPole-v1"])
def test_missing_devices_are_refused(name, device):
    with pytest.raises(ValueError, match=rf"there is no device '?{device}'? here.*'cpu' always works"):
        make(name, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("num_envs", [None, 3])
def test_tensors_live_on_the_device(num_envs):
    data = collect(make("test/Count-v0", num_envs, device="cuda"), frames=12)
    assert data["observation"].device.type == "cuda"
    assert data["next", "done"].sum() >= 2


def test_what_make_returns_is_a_torchrl_environment():
    env = make("CartPole-v1", 2)
    assert isinstance(env, EnvBase)
    assert isinstance(env, TransformedEnv)
    env.close()
