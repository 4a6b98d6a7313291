"""`run_trial`: train one configuration with several seeds, and say how good it is."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from fp8rl_torchrl.recipes import build
from fp8rl_torchrl.recipes.config import RecipeConfig
from fp8rl_torchrl.training.evaluate import evaluate
from fp8rl_torchrl.training.loop import Pipeline, Report

Objective: TypeAlias = Literal["return", "frames"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial came to, one entry a seed."""

    value: float
    """Mean over the seeds of their `score`."""
    returns: tuple[float, ...]
    """Mean return of the evaluation after training."""
    frames: tuple[int, ...]
    """Environment steps trained."""


def check_objective(objective: Objective, config: RecipeConfig) -> None:
    """Make sure that trials of a configuration can be compared.

    Raises:
        ValueError: If they cannot.
    """
    if config.total_frames is None:
        raise ValueError("trials are compared after equal numbers of environment steps: give --total-frames")
    if objective == "frames" and config.target_return is None:
        raise ValueError("--objective frames counts the frames until --target-return is reached: give that, too")


def score(objective: Objective, config: RecipeConfig, frames: int, mean_return: float) -> float:
    """How good a policy is that was trained for some frames and was then evaluated.

    Args:
        objective: ``"return"``: its mean return, more is better. ``"frames"``: the environment steps it took to reach
            the target return, fewer are better. One that has not reached it is charged the whole budget, and as much
            again for every |target| that it lacks, so that of two failures the nearer one is better.
        config: Its configuration.
        frames: Environment steps trained.
        mean_return: Mean return of the evaluation.
    """
    if objective == "return":
        return mean_return
    target, budget = config.target_return, _budget(config)
    assert target is not None, "see check_objective"
    if mean_return >= target:
        return float(frames)
    return budget * (1 + (target - mean_return) / max(1.0, abs(target)))


def run_trial(
    config: RecipeConfig,
    seeds: int,
    objective: Objective = "return",
    on_estimate: Callable[[int, float, bool], None] = lambda step, value, more: None,
    on_report: Callable[[int, Report], None] = lambda place, report: None,
) -> Outcome:
    """Train a configuration with several seeds, one after the other, as ``scripts/train.py`` would.

    A run ends when its budget is spent or a periodic evaluation reaches ``config.target_return``, and is then evaluated
    on ``config.final_eval_episodes`` episodes, which decide. On the way, an estimate of the trial's value is given at
    fixed steps, the same ones for every trial: step ``k * total_frames + n * eval_every`` is the n-th evaluation of the
    k-th seed. The estimate is the mean over the finished seeds' scores and the score of the policy as it stands; a seed
    that ended early gives the remaining ones of its steps its score.

    Args:
        config: What to train; its seed is the first.
        seeds: How many seeds.
        objective: What is measured (see `score`).
        on_estimate: Called with a step, the estimate, and whether there is more to train; what it raises ends the
            trial.
        on_report: Called with the place of a seed, from 0, and each of its reports.

    Returns:
        The value, and what it is made of.

    Raises:
        ValueError: If the recipe refuses the configuration, or an evaluation's return is not a number.
        RuntimeError: If an episode does not end, or a computation fails.
    """
    check_objective(objective, config)
    scores: list[float] = []
    ends: list[_Evaluation] = []
    for place in range(seeds):
        seeded = replace(config, seed=config.seed + place)
        evaluations = _evaluations(seeded, lambda report, place=place: on_report(place, report))
        with contextlib.closing(evaluations):
            for each in evaluations:
                values = [*scores, score(objective, config, each.frames, each.mean_return)]
                more = not each.final or place + 1 < seeds
                for step in each.steps:
                    on_estimate(place * _budget(config) + step, math.fsum(values) / len(values), more)
        scores, ends = values, [*ends, each]
        gc.collect()  # a pipeline holds itself, and its replay buffer, until it is found to be garbage
    return Outcome(
        value=math.fsum(scores) / seeds,
        returns=tuple(end.mean_return for end in ends),
        frames=tuple(end.frames for end in ends),
    )


class _Evaluation(NamedTuple):
    frames: int
    mean_return: float
    steps: list[int]
    """The steps of the seed that it speaks for."""
    final: bool


def _evaluations(config: RecipeConfig, on_report: Callable[[Report], None]) -> Generator[_Evaluation, None, None]:
    """Train; the periodic evaluations of a run that goes on after them, and the one at its end."""
    every, budget, target = config.eval_every, _budget(config), config.target_return
    pipeline = build(config)
    try:
        evaluated = 0
        for report in pipeline:
            on_report(report)
            if not config.evaluates(evaluated, report.frames):
                continue
            evaluated = report.frames
            mean_return = _mean_return(pipeline, config.eval_episodes)
            if target is not None and mean_return >= target:
                break
            if not pipeline.finished:
                yield _Evaluation(report.frames, mean_return, [evaluated // every * every], False)
        grid = [*range(every, budget, every), budget] if every else [budget]
        steps = [step for step in grid if step > pipeline.frames] or [budget]
        yield _Evaluation(pipeline.frames, _mean_return(pipeline, config.final_eval_episodes), steps, True)
    finally:
        pipeline.collector.shutdown()


def _budget(config: RecipeConfig) -> int:
    assert config.total_frames is not None, "see check_objective"
    return config.total_frames


def _mean_return(pipeline: Pipeline, episodes: int) -> float:
    mean_return = evaluate(pipeline.agent.policy, pipeline.env, episodes).mean
    if math.isnan(mean_return):
        raise ValueError("the return of an evaluation is not a number")
    return mean_return
