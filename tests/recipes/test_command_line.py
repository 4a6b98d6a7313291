"""What is read of a command line before it is parsed."""

import pytest

from fp8rl_torchrl.recipes import ActorCriticConfig, DQNConfig, PPOConfig
from fp8rl_torchrl.recipes.command_line import peek, starting_config


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--algo", "ppo"], "ppo"),
        (["--seed=1", "--algo=ppo"], "ppo"),
        (["--algo="], ""),
        (["--algo"], None),
        (["--algorithm", "ppo"], None),
        ([], None),
    ],
)
def test_the_value_of_an_option(argv, value):
    assert peek(argv, "--algo") == value


@pytest.mark.parametrize(
    ("argv", "config"),
    [
        ([], ActorCriticConfig()),
        (["--algo=ppo", "--env", "CartPole-v1", "--seed=3"], PPOConfig.for_task("CartPole-v1")),
        (["--algo=dqn", "--env=Acrobot-v1", "--variant=guide"], DQNConfig.guide("Acrobot-v1")),
    ],
)
def test_the_preset_or_the_variant_of_the_task(argv, config):
    assert starting_config(argv) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--algo=a3c"], "unknown algo 'a3c'"), (["--algo=dqn", "--variant=ddpg"], "no variant 'ddpg' of DQNConfig")],
)
def test_what_there_is_not_is_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        starting_config(argv)
