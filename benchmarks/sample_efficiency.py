"""How many frames until a task is solved: the shipped presets beside Stable-Baselines3's tuned settings.

Both are evaluated every so many frames of training, deterministically, over the same episodes of Gymnasium's own
environment; solved is the first evaluation whose mean return is at least the threshold. Each has the budget that its
settings name. Every run is in a process of its own, on one core; frames/s are of training alone. Runs that are recorded
in OUT.jsonl are not made again, unless the settings, the code, a version or the processor is another.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import judged_run
import resumable
import sample_efficiency_report
import sb3_tuned
import tyro
from judged_run import Exam
from ledger import digest, package_files
from peers import pinned_core, take_turn
from resumable import Job
from returns import THRESHOLDS, chosen, preset

EVERY = {
    "CartPole-v1": 1000,
    "Acrobot-v1": 2000,
    "Pendulum-v1": 1000,
    "MountainCarContinuous-v0": 1000,
    "LunarLander-v3": 5000,
}
"""Frames between two evaluations."""
LIBRARIES = ("ours", "sb3")


class Run(NamedTuple):
    """One training run."""

    recipe: str
    task: str
    library: str
    seed: int
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Options(resumable.Options):
    """What to compare, and where the results go."""

    libraries: tuple[str, ...] = LIBRARIES
    """ours, sb3 or both."""
    every: int | None = None
    """Frames between two evaluations; by default 1,000 to 5,000, by task."""
    episodes: int = 20
    """Episodes of each evaluation."""
    out: str = "benchmarks/results/sample_efficiency"
    """Results go to OUT.jsonl (a record a run, appended) and OUT.png."""


def main(argv: list[str]) -> int:
    """Train what is not recorded yet, and compare.

    Returns:
        The exit code: 0 if ours is nowhere worse, 1 if it is or a run is missing, 2 for bad input, 130 after Ctrl-C.
    """
    options = tyro.cli(Options, description=__doc__, args=argv)
    return resumable.conduct(
        options,
        jobs_of,
        sample_efficiency_report,
        "ours needs no more frames and trains no fewer a second than the other",
    )


def jobs_of(options: Options) -> dict[Run, Job]:
    """Every run: libraries interleaved within each seed and task, so that a drift of the machine meets both alike.

    Raises:
        ValueError: If an option is out of range, nothing is left to compare, or a library is not installed.
    """
    if options.episodes < 1 or (options.every is not None and options.every < 1):
        raise ValueError("episodes and every must be >= 1")
    if not options.libraries or set(options.libraries) - set(LIBRARIES):
        raise ValueError(
            f"libraries takes some of {', '.join(LIBRARIES)}; got {', '.join(options.libraries) or 'none'}"
        )
    pairs: dict[str, list[str]] = {}
    for recipe, task in sb3_tuned.SETTINGS:
        pairs.setdefault(task, []).append(recipe)
    core, jobs = pinned_core(options.core), {}
    makers: dict[str, Callable[..., Job]] = {"ours": _ours, "sb3": _theirs}
    for seed in options.seed_range:
        for recipe, task in chosen(pairs, options.recipes, options.tasks):
            threshold = THRESHOLDS[task][recipe]
            exam = Exam(every=options.every or EVERY[task], episodes=options.episodes, threshold=threshold)
            for library in options.libraries:
                run = Run(recipe, task, library, seed, threshold)
                jobs[run] = makers[library](run, exam, core, options.limit)
    return jobs


def _named(run: Run) -> dict[str, Any]:
    return {"recipe": run.recipe, "task": run.task, "library": run.library, "seed": run.seed}


def _ours(run: Run, exam: Exam, core: int | None, limit: float) -> Job:
    config = preset(run.recipe, run.task, run.seed)
    return Job(
        named=_named(run),
        run=_named(run) | {"config": config.to_dict(), "exam": asdict(exam)},
        code=digest([*package_files(), Path(judged_run.__file__)]),
        make=partial(judged_run.run, config, exam, core, limit),
    )


def _theirs(run: Run, exam: Exam, core: int | None, limit: float) -> Job:
    try:
        installed = version("stable_baselines3")
    except PackageNotFoundError:
        raise ValueError("Stable-Baselines3 is not installed; run: pip install stable-baselines3") from None
    program = Path(__file__).with_name("sb3_tuned.py")
    # Of the package, only what judges can change the result; the rest may change without training theirs again.
    judges = [file for file in package_files() if file.parts[-2:] in (("training", "evaluate.py"), ("envs", "gym.py"))]
    settings = sb3_tuned.SETTINGS[run.recipe, run.task]
    job = {"recipe": run.recipe, "task": run.task, "settings": settings, "seed": run.seed, "exam": asdict(exam)}
    return Job(
        named=_named(run),
        run=_named(run) | {"settings": settings, "stable_baselines3": installed, "exam": asdict(exam)},
        code=digest([*judges, program, Path(judged_run.__file__)]),
        make=partial(take_turn, [sys.executable, str(program), json.dumps(job)], core, limit),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
