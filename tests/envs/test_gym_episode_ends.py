"""`make`: nothing is lost, added or repeated at the ends of episodes."""

import numpy as np
import pytest
import torch
from counting import Count, Reuses, collect, column
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from fp8rl_torchrl.envs.gym import make
from fp8rl_torchrl.envs.gymnasium_env import CustomGymnasiumVectorEnv

pytestmark = pytest.mark.usefixtures("registered")


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
