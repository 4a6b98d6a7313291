"""The default run learns: the bar that the package sets itself, for every seed and precision."""

import pytest

from fp8rl_torchrl import evaluate
from fp8rl_torchrl.envs import make
from fp8rl_torchrl.recipes import A2CConfig, ActorCriticConfig, PPOConfig, build

SOLVED = 215.0  # of at most 220
BALANCED = 475.0  # of at most 500: the bar that Gymnasium sets for CartPole-v1


def train_and_evaluate(make_config=ActorCriticConfig, judge=None, **options):
    """The mean return after training, in an environment of the judge's; prints it, as every seed counts."""
    pipeline = build(make_config(**options, device="cpu"))
    env = judge or pipeline.env
    before = evaluate(pipeline.agent.policy, env, episodes=100)
    for _ in pipeline:
        pass
    result = evaluate(pipeline.agent.policy, env, episodes=100)
    print(f"{options}: {before.mean:.2f} -> {result.mean:.2f} ± {result.std:.2f}, {min(result.returns):.2f}")
    return result.mean


@pytest.mark.learning
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_the_default_run_solves_custom_env(precision, seed):
    assert train_and_evaluate(precision=precision, seed=seed) >= SOLVED


# The records of benchmarks/results hold ten seeds of every recipe at both sizes.
@pytest.mark.learning
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("precision", ["fp8-tensorwise", "fp8-rowwise-gw-hp"])
def test_so_do_the_other_recipes(precision, seed):
    assert train_and_evaluate(precision=precision, seed=seed) >= SOLVED


@pytest.mark.learning
@pytest.mark.parametrize("seed", range(3))
def test_so_does_a_network_that_is_nearly_all_fp8(seed):
    assert train_and_evaluate(precision="fp8", hidden=(256, 256, 256), seed=seed) >= SOLVED


@pytest.mark.learning
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("precision", "collector"), [("fp32", "fused"), ("fp32", "torchrl"), ("bf16", "fused")])
def test_a2c_solves_custom_env(precision, collector, seed):
    config = A2CConfig.for_task
    options = {"precision": precision, "collector": collector, "seed": seed}
    assert train_and_evaluate(lambda **options: config("CustomEnv", **options), **options) >= SOLVED


@pytest.mark.learning
@pytest.mark.parametrize("seed", range(5))
def test_ppo_balances_gymnasiums_cartpole(seed):
    """It learns on the native environment, and is judged on Gymnasium's own."""
    judge = make("CartPole-v1", num_envs=20, native=False)
    config = PPOConfig.for_task
    assert train_and_evaluate(lambda **options: config("CartPole-v1", **options), judge, seed=seed) >= BALANCED
