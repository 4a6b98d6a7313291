"""Trials: their value by hand, the steps of their estimates, and that they train as a run does."""

import dataclasses
import math

import pytest

from fp8rl_torchrl.recipes import A2CConfig, build, trials
from fp8rl_torchrl.recipes.trials import Outcome, check_objective, run_trial, score
from fp8rl_torchrl.training.evaluate import EvalResult, evaluate

SMALL = A2CConfig(
    env="CartPole-v1",
    total_frames=512,
    num_envs=4,
    frames_per_collection=64,
    hidden=(8,),
    eval_every=128,
    eval_episodes=2,
    final_eval_episodes=3,
    device="cpu",
)


@pytest.mark.parametrize(
    ("objective", "target", "frames", "mean_return", "expected"),
    [
        ("return", None, 1000, 42.0, 42.0),
        ("return", 400.0, 1000, 42.0, 42.0),
        ("frames", 400.0, 250, 400.0, 250.0),
        ("frames", 400.0, 250, 500.0, 250.0),
        ("frames", 400.0, 1000, 300.0, 1250.0),  # a quarter of the target lacks: a quarter more than the budget
        ("frames", 400.0, 250, 0.0, 2000.0),  # stopped early by luck that the last evaluation does not confirm
        ("frames", -100.0, 1000, -150.0, 1500.0),
        ("frames", 0.0, 1000, -2.0, 3000.0),  # a target of 0 counts as 1
    ],
)
def test_scores_by_hand(objective, target, frames, mean_return, expected):
    config = dataclasses.replace(SMALL, total_frames=1000, target_return=target)
    assert score(objective, config, frames, mean_return) == expected


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="equal numbers of environment steps: give --total-frames"):
        check_objective("return", dataclasses.replace(SMALL, total_frames=None))
    with pytest.raises(ValueError, match="until --target-return is reached: give that, too"):
        check_objective("frames", SMALL)
    check_objective("return", SMALL)


class Evaluations:
    """Returns of evaluations as planned, in place of `evaluate`."""

    def __init__(self, *means):
        self.means, self.episodes = list(means), []

    def __call__(self, policy, env, episodes):
        self.episodes.append(episodes)
        return EvalResult(returns=(self.means.pop(0),), lengths=(1,))


def planned(monkeypatch, config, seeds, objective, *means):
    """The estimates and the outcome of a trial whose evaluations have these returns."""
    evaluations = Evaluations(*means)
    monkeypatch.setattr(trials, "evaluate", evaluations)
    estimates = []
    outcome = run_trial(config, seeds, objective, lambda *each: estimates.append(each))
    assert not evaluations.means, "all were needed"
    return estimates, outcome, evaluations.episodes


def test_estimates_stand_at_fixed_steps_and_average_over_seeds(monkeypatch):
    # 512 frames, evaluated every 128: at 128, 256, 384, once more at 512 because it is due, and at the end.
    one, other = (10.0, 20.0, 30.0, 99.0, 40.0), (1.0, 2.0, 3.0, 99.0, 4.0)
    estimates, outcome, episodes = planned(monkeypatch, SMALL, 2, "return", *one, *other)
    assert estimates == [
        (128, 10.0, True),
        (256, 20.0, True),
        (384, 30.0, True),
        (512, 40.0, True),
        (512 + 128, (40.0 + 1.0) / 2, True),
        (512 + 256, (40.0 + 2.0) / 2, True),
        (512 + 384, (40.0 + 3.0) / 2, True),
        (512 + 512, (40.0 + 4.0) / 2, False),
    ]
    assert outcome == Outcome(value=22.0, returns=(40.0, 4.0), frames=(512, 512))
    assert episodes == [2, 2, 2, 2, 3] * 2


def test_a_seed_that_reaches_the_target_ends_and_speaks_for_its_other_steps(monkeypatch):
    config = dataclasses.replace(SMALL, target_return=100.0)
    first = (50.0, 100.0, 110.0)  # reached at 256, and confirmed
    second = (0.0, 0.0, 0.0, 0.0, 50.0)
    estimates, outcome, _ = planned(monkeypatch, config, 2, "frames", *first, *second)
    assert estimates == [
        (128, 512 * 1.5, True),
        (384, 256.0, True),
        (512, 256.0, True),
        (512 + 128, (256 + 512 * 2) / 2, True),
        (512 + 256, (256 + 512 * 2) / 2, True),
        (512 + 384, (256 + 512 * 2) / 2, True),
        (512 + 512, (256 + 512 * 1.5) / 2, False),
    ]
    assert outcome == Outcome(value=512.0, returns=(110.0, 50.0), frames=(256, 512))


def test_without_periodic_evaluations_there_is_one_at_the_end(monkeypatch):
    estimates, outcome, episodes = planned(monkeypatch, dataclasses.replace(SMALL, eval_every=0), 1, "return", 7.0)
    assert (estimates, outcome.value, episodes) == ([(512, 7.0, False)], 7.0, [3])


def test_a_collection_longer_than_the_interval_leaves_steps_out(monkeypatch):
    config = dataclasses.replace(SMALL, eval_every=128, frames_per_collection=192, total_frames=576)
    estimates, _, _ = planned(monkeypatch, config, 1, "return", 1.0, 2.0, 9.0, 3.0)
    assert estimates == [(128, 1.0, True), (384, 2.0, True), (576, 3.0, False)]  # after 192, 384 and 576 frames


def test_no_number_is_no_value(monkeypatch):
    monkeypatch.setattr(trials, "evaluate", Evaluations(math.nan))
    with pytest.raises(ValueError, match="not a number"):
        run_trial(SMALL, 1)


def test_an_exception_ends_the_trial_and_closes_its_environment(monkeypatch):
    built = []

    def build_and_note(config):
        built.append(build(config))
        return built[-1]

    monkeypatch.setattr(trials, "build", build_and_note)

    def give_up(step, value, more):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run_trial(SMALL, 3, "return", give_up)
    assert [(pipeline.frames, pipeline.env.is_closed) for pipeline in built] == [(128, True)]


def test_a_trial_is_the_runs_of_its_seeds():
    config = dataclasses.replace(SMALL, eval_every=0, total_frames=256)
    seen = []
    outcome = run_trial(config, 2, on_report=lambda place, report: seen.append((place, report.frames)))
    expected = []
    for seed in (0, 1):
        pipeline = build(dataclasses.replace(config, seed=seed))
        for _ in pipeline:
            pass
        expected.append(evaluate(pipeline.agent.policy, pipeline.env, 3).mean)
    assert outcome.returns == tuple(expected)
    assert expected[0] != expected[1], "or the seeds would not matter"
    assert outcome.value == sum(expected) / 2
    assert seen == [(place, frames) for place in (0, 1) for frames in (64, 128, 192, 256)]
