"""What `make` refuses, and the advice that it gives."""

import pytest

from fp8rl_torchrl.envs.gym import make


@pytest.mark.parametrize("num_envs", [None, 2])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPoole-v1", r"no environment 'CartPoole-v1'.*Did you mean: `CartPole`"),
        ("CartPole-v99", r"no environment 'CartPole-v99'"),
        ("nowhere/CartPole-v1", "Namespace nowhere not found"),
        ("no_such_package:CartPole-v1", "no_such_package"),
        ("not an id", "cannot be made: Malformed"),
    ],
)
def test_unknown_names_are_refused_with_advice(name, message, num_envs):
    with pytest.raises(ValueError, match=message):
        make(name, num_envs)


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


def test_arguments_of_gymnasiums_own_are_refused_for_a_native_one_with_advice():
    with pytest.raises(TypeError, match=r"CartPoleEnv has no argument sutton_barto_reward;.*native=False makes Gym"):
        make("CartPole-v1", sutton_barto_reward=True)
    assert make("CartPole-v1", native=False, sutton_barto_reward=True).batch_size == ()
