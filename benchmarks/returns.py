"""What the shipped presets reach: every recipe on its tasks, over seeds, judged in Gymnasium's own environments.

Every run trains a preset on the native environment, on one core, and is then evaluated deterministically over 100
episodes whose start states are always the same. Every seed must reach the threshold. Runs that are recorded in
OUT.jsonl are not made again, unless the preset, the code, a version or the processor is another: a benchmark that was
stopped goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import judged_run
import resumable
import returns_report
import tyro
from judged_run import Exam
from ledger import digest, package_files
from peers import pinned_core
from resumable import Job

from fp8rl_torchrl.recipes import RecipeConfig, config_class

THRESHOLDS: dict[str, dict[str, float]] = {
    "CartPole-v1": dict.fromkeys(("reinforce", "a2c", "ppo", "dqn", "actor-critic", "sac"), 475.0),
    "Acrobot-v1": {"ppo": -100.0, "dqn": -100.0},
    "Pendulum-v1": {"ppo": -250.0, "sac": -180.0, "td3": -180.0},
    "MountainCarContinuous-v0": {"sac": 90.0, "ppo": 90.0},
    "LunarLander-v3": {"ppo": 200.0, "dqn": 200.0},
}
"""The mean return that each recipe must reach on each task."""
PRESET = "preset"


class Run(NamedTuple):
    """One training run of the table."""

    recipe: str
    task: str
    precision: str
    seed: int
    threshold: float
    config: RecipeConfig


@dataclass(frozen=True, kw_only=True)
class Options(resumable.Options):
    """What to train, and where the results go. Presets were not tuned on the seeds from the first one on."""

    precisions: tuple[str, ...] = (PRESET,)
    """Precisions; "preset" is the one that the preset names."""
    episodes: int = 100
    """Episodes of the evaluation."""
    out: str = "benchmarks/results/returns"
    """Results go to OUT.jsonl (a record a run, appended) and OUT.png."""


def main(argv: list[str]) -> int:
    """Train what is not recorded yet, and show the table.

    Returns:
        The exit code: 0 if every seed reached its threshold, 1 if not, 2 for bad input, 130 after Ctrl-C.
    """
    options = tyro.cli(Options, description=__doc__, args=argv)
    return resumable.conduct(options, jobs_of, returns_report, "every seed reached its threshold")


def plan(options: Options) -> list[Run]:
    """Every run, the table's rows interleaved within each seed, so that a drift of the machine's speed meets all alike.

    Raises:
        ValueError: If an option is out of range, or nothing of the table is left.
    """
    rows, runs = chosen(THRESHOLDS, options.recipes, options.tasks), []
    for seed in options.seed_range:
        for recipe, task in rows:
            for precision in options.precisions:
                given = {} if precision == PRESET else {"precision": precision}
                config = preset(recipe, task, seed, **given)
                runs.append(Run(recipe, task, config.precision, seed, THRESHOLDS[task][recipe], config))
    if len({run[:4] for run in runs}) < len(runs):
        raise ValueError(f"--precisions {' '.join(options.precisions)} names the same precision twice")
    return runs


def chosen(table: Mapping[str, Iterable[str]], recipes: Sequence[str], tasks: Sequence[str]) -> list[tuple[str, str]]:
    """The rows of a table that are left by a choice of recipes and tasks; an empty choice leaves all.

    Args:
        table: The recipes of each task.
        recipes: Some of them.
        tasks: Some of the tasks.

    Raises:
        ValueError: If one is not in the table, or no row is left.
    """
    known = sorted({recipe for each in table.values() for recipe in each})
    for given, names, what in ((recipes, known, "recipe"), (tasks, list(table), "task")):
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"the table has no {what} {', '.join(unknown)}; use some of {', '.join(names)}")
    every = [(recipe, task) for task, each in table.items() for recipe in each]
    rows = [(recipe, task) for recipe, task in every if recipe in (recipes or known) and task in (tasks or table)]
    if not rows:
        raise ValueError(f"the table has no row for {', '.join(recipes)} on {', '.join(tasks)}")
    return rows


def preset(recipe: str, task: str, seed: int, **options: Any) -> RecipeConfig:
    """The (resolved) preset of a recipe for a task, on one core."""
    kind: Any = config_class(recipe)
    return kind.for_task(task, seed=seed, device="cpu", num_threads=1, **options).resolved()


def jobs_of(options: Options) -> dict[Run, Job]:
    """How each run is made and recorded.

    Raises:
        ValueError: If an option is out of range, or nothing of the table is left.
    """
    if options.episodes < 1:
        raise ValueError(f"episodes must be >= 1; got {options.episodes}")
    exam, core = Exam(final_episodes=options.episodes), pinned_core(options.core)
    code = digest([*package_files(), Path(judged_run.__file__)])
    jobs = {}
    for run in plan(options):
        named = {"recipe": run.recipe, "task": run.task, "precision": run.precision, "seed": run.seed}
        jobs[run] = Job(
            named=named,
            run=named | {"config": run.config.to_dict(), "exam": asdict(exam)},
            code=code,
            make=partial(judged_run.run, run.config, exam, core, options.limit),
        )
    return jobs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
