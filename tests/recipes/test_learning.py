"""The default run learns: the bar that the package sets itself, for every seed and precision."""

import pytest

from fp8rl_torchrl import evaluate
from fp8rl_torchrl.recipes import ActorCriticConfig, build

SOLVED = 215.0  # of at most 220


@pytest.mark.learning
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_default_run_solves_custom_env(precision, seed):
    pipeline = build(ActorCriticConfig(precision=precision, seed=seed, device="cpu"))
    before = evaluate(pipeline.agent.policy, pipeline.env, episodes=100)
    for _ in pipeline:
        pass
    result = evaluate(pipeline.agent.policy, pipeline.env, episodes=100)
    print(
        f"{precision} seed {seed}: {before.mean:.2f} -> {result.mean:.2f} ± {result.std:.2f}, {min(result.returns):.2f}"
    )
    assert result.mean >= SOLVED
