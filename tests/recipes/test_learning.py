"""The default run learns: the bar that the package sets itself, for every seed and precision."""

import pytest

from fp8rl_torchrl import evaluate
from fp8rl_torchrl.envs import make
from fp8rl_torchrl.recipes import A2CConfig, ActorCriticConfig, build, config_class

SOLVED = 215.0  # of at most 220


def train_and_evaluate(make_config=ActorCriticConfig, judge=None, **options):
    """The mean return after training, in an environment of the judge's; prints it, as every seed counts."""
    pipeline = build(make_config(**options, device="cpu"))
    env, config = judge or pipeline.env, pipeline.config
    before = evaluate(pipeline.agent.policy, env, episodes=100)
    looked = 0
    for report in pipeline:
        if config.target_return is not None and config.evaluates(looked, report.frames):
            looked = report.frames
            if evaluate(pipeline.agent.policy, pipeline.env, config.eval_episodes).mean >= config.target_return:
                break
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


# The record of benchmarks/results holds five seeds of each.
@pytest.mark.learning
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("algo", "task", "threshold"),
    [
        *((algo, "CartPole-v1", 475.0) for algo in ("reinforce", "a2c", "ppo", "dqn", "actor-critic", "sac")),
        *((algo, "Acrobot-v1", -100.0) for algo in ("ppo", "dqn")),
        ("ppo", "Pendulum-v1", -250.0),
        *((algo, "Pendulum-v1", -180.0) for algo in ("sac", "td3")),
        *((algo, "MountainCarContinuous-v0", 90.0) for algo in ("ppo", "sac")),
    ],
)
def test_presets_solve_gymnasiums_tasks(algo, task, threshold, seed):
    """They learn on the native environment, and are judged on Gymnasium's own."""
    judge = make(task, num_envs=20, native=False)
    preset = config_class(algo).for_task
    assert train_and_evaluate(lambda **options: preset(task, **options), judge, seed=seed) >= threshold
