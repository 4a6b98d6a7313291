"""A judged run: when it is evaluated, when it stops, and what its time is."""

import json
import math
from types import SimpleNamespace

import judged_run
import pytest
import torch
from judged_run import Clock, Exam, passes, train

from fp8rl_torchrl.recipes import A2CConfig, PPOConfig
from fp8rl_torchrl.training.evaluate import EvalResult

SMALL = {"num_envs": 4, "hidden": (16,), "device": "cpu", "compile": "off", "collector": "torchrl", "precision": "fp32"}
CONFIG = A2CConfig(env="CartPole-v1", frames_per_collection=64, total_frames=64 * 5, **SMALL)


@pytest.fixture
def returns(monkeypatch):
    """Evaluations that find the returns that a test puts here, and a list of what was asked of them."""
    following, asked = [], []

    def evaluate(policy, env, episodes, **options):
        asked.append((type(env).__name__, episodes, options.get("seed")))
        each = following.pop(0)
        return EvalResult(returns=tuple(each if isinstance(each, list) else [each]), lengths=(1,))

    monkeypatch.setattr(judged_run, "evaluate", evaluate)
    return SimpleNamespace(following=following, asked=asked)


def test_multiples_that_are_passed():
    assert [passes(100, before, now) for before, now in ((0, 99), (0, 100), (100, 199), (199, 200), (90, 350))] == [
        False,
        True,
        False,
        True,
        True,
    ]
    assert not passes(0, 0, 10**9)


def test_the_final_policy_is_judged_in_gymnasiums_own_environment(returns):
    returns.following[:] = [[1.0, 5.0, 6.0]]
    result = train(CONFIG, Exam(final_episodes=3, seed=7))
    assert returns.asked == [("GymnasiumEnv", 3, 7)]
    assert (result["return_mean"], result["return_min"]) == (4.0, 1.0)
    assert result["return_std"] == pytest.approx(math.sqrt((9 + 1 + 4) / 3))
    assert (result["frames"], result["updates"], result["skipped_steps"]) == (320, 5, 0)
    assert (result["stopped_by"], result["evaluations"]) == ("budget", [])


def test_it_stops_at_the_first_evaluation_that_reaches_the_threshold(returns):
    # Multiples of 100 are passed at 128, 256 and 320 frames.
    returns.following[:] = [9.0, 10.0]
    result = train(CONFIG, Exam(every=100, episodes=4, threshold=10.0))
    assert [(frames, mean) for frames, mean, _ in result["evaluations"]] == [(128, 9.0), (256, 10.0)]
    assert (result["stopped_by"], result["frames"], result["passed"]) == ("threshold", 256, True)
    assert "return_mean" not in result
    assert returns.asked == [("GymnasiumEnv", 4, 1_000_003)] * 2
    seconds = [each for _, _, each in result["evaluations"]]
    assert 0 < seconds[0] < seconds[1] == result["seconds"]

    returns.following[:] = [9.0, 9.9, 9.8]
    never = train(CONFIG, Exam(every=100, threshold=10.0))
    assert (never["stopped_by"], never["frames"], len(never["evaluations"]), never["passed"]) == (
        "budget",
        320,
        3,
        False,
    )


def test_a_preset_that_stops_at_a_target_is_evaluated_as_in_training(returns):
    options = {"env": "CartPole-v1", "frames_per_collection": 64, "total_frames": 640, "batch_size": 64} | SMALL
    config = PPOConfig(eval_every=100, eval_episodes=2, target_return=50.0, **options)
    returns.following[:] = [49.0, 50.0, 321.0]
    result = train(config, Exam(final_episodes=5))
    assert (result["stopped_by"], result["frames"], result["return_mean"]) == ("target_return", 256, 321.0)
    assert returns.asked == [("CartPoleEnv", 2, None)] * 2 + [("GymnasiumEnv", 5, 1_000_003)]


def test_the_clock_runs_in_training_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(judged_run.time, "process_time", lambda: now[0])

    class Pipeline:
        def __iter__(self):
            for _ in range(3):
                now[0] += 2.0
                yield "report"
            now[0] += 0.5  # what comes after the last report

    clock, seen = Clock(), []
    for _ in clock.timed(Pipeline()):
        seen.append(clock.seconds)
        now[0] += 10.0  # as an evaluation takes
    assert seen == [2.0, 4.0, 6.0]
    assert (clock.seconds, clock.compile_seconds) == (6.5, 0.0)


def test_compilation_is_told_apart():
    class Pipeline:
        def __iter__(self):
            yield torch.compile(lambda x: (x + 1).relu(), backend="eager")(torch.ones(3))

    clock = Clock()
    list(clock.timed(Pipeline()))
    assert clock.compile_seconds > 0
    before = clock.compile_seconds
    torch._dynamo.reset()
    torch.compile(lambda x: (x + 2).relu(), backend="eager")(torch.ones(3))
    assert clock.compile_seconds == before, "what is compiled elsewhere is not its own"


def test_a_process_of_its_own_trains_the_same(tmp_path):
    result = judged_run.run(CONFIG, Exam(final_episodes=2), core=None, limit=120)
    assert result["failure"] is None
    assert result["return_mean"] == train(CONFIG, Exam(final_episodes=2))["return_mean"]
    assert "not done after" in judged_run.run(CONFIG, Exam(), core=None, limit=0.1)["failure"]


def test_a_failure_is_a_result(capsys):
    wrong = CONFIG.to_dict() | {"precision": "fp8", "hidden": (8,)}
    assert judged_run.main([json.dumps({"config": wrong, "exam": {}})]) == 0
    (failure,) = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert "nothing to convert" in failure
