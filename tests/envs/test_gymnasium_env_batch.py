"""The batch of the custom environment for Gymnasium, against a batch of Gymnasium's own."""

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fp8rl_torchrl.envs.gymnasium_env import (
    ENV_ID,
    CustomGymnasiumEnv,
    CustomGymnasiumVectorEnv,
    register,
)

register()


def sync_env(num_envs, mode, **constants):
    return SyncVectorEnv([lambda: CustomGymnasiumEnv(**constants)] * num_envs, autoreset_mode=mode)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("seed", [7, [3, 11, 2, 2]])
def test_the_batch_equals_a_sync_vector_env(mode, seed):
    constants = {"max_steps": 9, "force": 8.0, "bound": 1.5}  # ends of both kinds, all the time
    ours = CustomGymnasiumVectorEnv(4, autoreset_mode=mode, **constants)
    theirs = sync_env(4, mode, **constants)
    assert ours.metadata["autoreset_mode"] == mode
    generator = np.random.default_rng(0)

    def compare(left, right):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype

    compare(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0])
    ends = np.zeros(2, dtype=int)
    for _ in range(120):
        actions = generator.integers(0, 2, size=4)
        (observation, reward, *flags, info), expected = ours.step(actions), theirs.step(actions)
        compare(observation, expected[0])
        np.testing.assert_array_equal(reward, expected[1])
        compare(flags[0], expected[2])
        compare(flags[1], expected[3])
        assert info.keys() == expected[4].keys()
        for key in {"_final_obs", "_final_info"} & info.keys():
            compare(info[key], expected[4][key])
        for index in np.flatnonzero(info.get("_final_obs", [])):
            compare(info["final_obs"][index], expected[4]["final_obs"][index])
        ends += [flag.sum() for flag in flags]
        done = flags[0] | flags[1]
        if mode == AutoresetMode.DISABLED and done.any():
            masks = [{"reset_mask": done.copy()} for _ in range(2)]
            compare(ours.reset(options=masks[0])[0], theirs.reset(options=masks[1])[0])
            assert "reset_mask" in masks[0]  # the caller's dict is left alone
    assert (ends > 10).all()
    assert [rng.bit_generator.state for rng in ours.np_random] == [rng.bit_generator.state for rng in theirs.np_random]
    assert ours.np_random_seed == theirs.np_random_seed


def test_other_seeds_give_another_batch():
    ours, theirs = CustomGymnasiumVectorEnv(3), sync_env(3, AutoresetMode.NEXT_STEP)
    assert not np.isclose(ours.reset(seed=1)[0], theirs.reset(seed=4)[0]).any()
    starts = ours.reset(seed=1)[0]
    assert len({start.tobytes() for start in starts}) == 3
    np.testing.assert_array_equal(starts[2], CustomGymnasiumEnv().reset(seed=3)[0])


def test_make_vec_takes_the_batch():
    for kwargs in ({}, {"vectorization_mode": "vector_entry_point"}):
        env = gymnasium.make_vec(ENV_ID, num_envs=8, **kwargs)
        assert type(env) is CustomGymnasiumVectorEnv
        assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        assert env.reset(seed=0)[0].shape == (8, 2)
    assert gymnasium.make_vec(ENV_ID, num_envs=2, autoreset_mode="Disabled").autoreset_mode == AutoresetMode.DISABLED
    assert isinstance(gymnasium.make_vec(ENV_ID, num_envs=2, vectorization_mode="sync"), SyncVectorEnv)
    assert CustomGymnasiumVectorEnv.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP

    env = gymnasium.make_vec(ENV_ID, num_envs=2, max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step([0, 1])[3].all() for _ in range(3)] == [False, False, True]


def test_a_masked_reset_touches_no_other_environment():
    env = CustomGymnasiumVectorEnv(3, autoreset_mode="Disabled", max_steps=5)
    env.reset(seed=0)
    before, *_ = env.step([0, 1, 0])
    after, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert (np.abs(after[1]) <= [0.5, 0.05]).all()
    assert after[1, 0] != before[1, 0]
    flags = [env.step([0, 1, 0])[3].tolist() for _ in range(4)]
    assert flags[-1] == [True, False, True]  # the second started one step later
    with pytest.raises(ResetNeeded, match=r"environments \[0, 2\] are over"):
        env.step([0, 1, 0])
    env.reset(options={"reset_mask": np.array([True, False, True])})
    env.step([0, 1, 0])


def test_states_can_be_given_to_the_batch():
    env = CustomGymnasiumVectorEnv(2)
    np.testing.assert_array_equal(env.reset(options={"state": [1, 0]})[0], [[1, 0], [1, 0]])
    np.testing.assert_array_equal(env.reset(options={"state": [[1, 0], [2, 0]]})[0], [[1, 0], [2, 0]])
    mask = np.array([False, True])
    np.testing.assert_array_equal(env.reset(options={"state": [0, 3], "reset_mask": mask})[0], [[1, 0], [0, 3]])


def test_what_the_batch_refuses():
    for num_envs in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="num_envs must be a positive integer"):
            CustomGymnasiumVectorEnv(num_envs)
    with pytest.raises(ValueError, match=r"\['NextStep', 'SameStep', 'Disabled'\]; got 'Sometimes'"):
        CustomGymnasiumVectorEnv(2, autoreset_mode="Sometimes")
    env = CustomGymnasiumVectorEnv(2)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step([0, 0])
    with pytest.raises(ResetNeeded, match="first reset"):
        env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ValueError, match="one for each of the 2 envs; got 3"):
        env.reset(seed=[1, 2, 3])
    for mask in ([True, False], np.array([1, 0]), np.array([True]), np.array([False, False])):
        with pytest.raises(ValueError, match="reset_mask"):
            env.reset(options={"reset_mask": mask})
    env.reset()
    for actions in ([0], [0, 2], [0.0, 1.0], 1, [[0, 1]]):
        with pytest.raises(InvalidAction, match="2 integers"):
            env.step(actions)


def test_render_needs_a_mode_and_a_state():
    for env in (CustomGymnasiumEnv(), CustomGymnasiumVectorEnv(2)):
        env.reset(seed=0)
        with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
            assert env.render() is None
    for env in (CustomGymnasiumEnv("rgb_array"), CustomGymnasiumVectorEnv(2, "rgb_array")):
        with pytest.raises(ResetNeeded, match="nothing to render"):
            env.render()


def test_the_batch_renders_what_its_members_would():
    env = CustomGymnasiumVectorEnv(2, "rgb_array", max_steps=2)
    single = CustomGymnasiumEnv("rgb_array", max_steps=2)
    env.reset(seed=4)
    single.reset(seed=5)
    np.testing.assert_array_equal(env.render()[1], single.render())
    for _ in range(2):
        env.step([1, 0])
        single.step(0)
        np.testing.assert_array_equal(env.render()[1], single.render())
    env.step([1, 0])
    single.reset()
    np.testing.assert_array_equal(env.render()[1], single.render())
