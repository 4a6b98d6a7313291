"""Which precision should I use? Train the same tasks in each mode, over seeds, and say what each costs and gains.

Every cell (a task, a recipe, a mode, a seed) trains in a process of its own, pinned to a core of its own; seeds are
interleaved over the modes, so that a drift of the machine's speed meets all of them alike. A comparison that was
stopped goes on where it stopped. OUT.html is the answer on one page; OUT.jsonl holds a record a cell.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mode_cell
import negative_controls
import precision_report
import resumable
import tyro
from ledger import digest, package_files
from mode_cell import Watch
from negative_controls import CONTROLS, configured
from resumable import Job
from scores import RANDOM_TO_SOLVED

from fp8rl_torchrl import Precision
from fp8rl_torchrl.recipes import RecipeConfig, config_class

RECIPES = {
    "CustomEnv": "ppo",
    "CartPole-v1": "ppo",
    "Acrobot-v1": "ppo",
    "Pendulum-v1": "ppo",
    "MountainCarContinuous-v0": "ppo",
    "LunarLander-v3": "ppo",
}
"""What each task is learned by, unless --recipes says otherwise."""
SETTINGS: dict[str, dict[str, Any]] = {
    "CustomEnv": {
        "total_frames": 65_536,
        "num_envs": 16,
        "frames_per_collection": 1024,
        "batch_size": 256,
        "lr": 1e-3,
        "entropy_coeff": 0.0,
        "reward_scale": 0.05,
        "normalize_observation": True,
        "collector": "fused",
    },
    "CartPole-v1": {
        "total_frames": 65_536,
        "num_envs": 32,
        "frames_per_collection": 1024,
        "lr": 1e-3,
        # Their running statistics follow the policy, and what it has learned moves away under it.
        "normalize_observation": False,
    },
    "Acrobot-v1": {"total_frames": 98_304, "num_envs": 32, "frames_per_collection": 2048, "epochs": 6},
    "Pendulum-v1": {"total_frames": 40_960},
}
"""How a task is trained by its recipe of `RECIPES`, where that differs from the preset: presets are tuned to reach a
solution soon, and a cost of precision is seen only where every run in FP32 also stays there."""
WIDE_FRAMES = {"Pendulum-v1": 24_576}
"""How long networks of a given width are trained where that differs: they learn in fewer frames, which cost more."""
DEPTH = 3
"""Layers of a network whose width is given: two of them are wide on both sides, so that they run in FP8."""
USUAL_WIDTH = 64
"""What presets are tuned for."""


class Cell(NamedTuple):
    """One run of the comparison."""

    task: str
    recipe: str
    mode: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Options(resumable.Options):
    """What to compare, and where the results go."""

    tasks: tuple[str, ...] = ("CustomEnv", "CartPole-v1", "Acrobot-v1", "Pendulum-v1")
    """Tasks."""
    recipes: tuple[str, ...] = ()
    """The recipe of each task, in order, or one for all; by default one that fits."""
    modes: tuple[str, ...] = ("fp32", "bf16", "fp16", "fp8", "fp8-tensorwise", "fp16-naive", "fp8-unscaled")
    """Precisions, and the negative controls fp16-naive and fp8-unscaled. The first is what others are compared with."""
    seeds: int = 10
    """Seeds of each mode, counted from --first-seed; a claim needs 10."""
    width: int | None = None
    """Width of the networks, which then have three layers, with the learning rate lowered in proportion; by default as
    the preset says."""
    batch: int | None = None
    """Transitions in a batch, where the recipe has batches; by default as the preset says."""
    total_frames: int | None = None
    """Frames of each run; by default several times what FP32 takes, or as the preset says."""
    margin: float = 0.05
    """Of equivalence: this part of the way from random to solved."""
    watch: Watch = field(default_factory=Watch)
    """What is looked at while a cell trains."""
    cores: tuple[int, ...] = ()
    """The cores to use, one for each cell that runs; by default all that this process may use; with a GPU, which cells
    would share, the last one."""
    device: str = "cpu"
    """Where to run: cpu or cuda."""
    layers: str = "benchmarks/results/linear_cpu.jsonl"
    """Records of linear.py, for the page's map of widths and batches, if there are any."""
    figures: str | None = None
    """A folder for every figure of the page as PNG and SVG."""
    out: str = "runs/precision_modes"
    """Results go to OUT.jsonl (a record a cell, appended), OUT.html, and OUT.png and .svg: each mode's
    difference from the first."""

    @property
    def workers(self) -> int:
        """As many as there are cores."""
        return len(cores_of(self.cores, self.device))

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        super().__post_init__()
        for mode in self.modes:
            if mode not in CONTROLS:
                Precision(mode)
        if len(self.modes) < 2 or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"--modes takes at least two different ones; got {' '.join(self.modes)}")
        if self.modes[0] in CONTROLS:
            raise ValueError(f"the first of --modes is the reference; {self.modes[0]} is a negative control")
        if unknown := [task for task in self.tasks if task not in RANDOM_TO_SOLVED]:
            raise ValueError(
                f"it is not known what {', '.join(unknown)} scores at random and solved; use some of "
                f"{', '.join(RANDOM_TO_SOLVED)}"
            )
        if len(self.recipes) not in (0, 1, len(self.tasks)):
            raise ValueError(f"--recipes takes one, or one for each of the {len(self.tasks)} tasks")
        for name in ("width", "batch", "total_frames"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if not self.margin > 0:
            raise ValueError(f"margin must be > 0; got {self.margin:g}")


def main(argv: list[str]) -> int:
    """Train what is not recorded yet, and write the report.

    Returns:
        The exit code: 0, 1 if a cell failed, 2 for bad input, 130 after Ctrl-C.
    """
    options = tyro.cli(Options, description=__doc__, args=argv)
    report = precision_report.Report(
        reference=options.modes[0],
        controls=tuple(CONTROLS),
        margin=options.margin,
        command=_command(argv),
        layers=Path(options.layers),
        figures=None if options.figures is None else Path(options.figures),
    )
    return resumable.conduct(options, jobs_of, report, "every cell is there")


def plan(options: Options) -> dict[Cell, RecipeConfig]:
    """The (resolved) configuration of every cell, modes interleaved within each seed.

    Raises:
        ValueError: If an option is out of range.
    """
    names = options.recipes or tuple(RECIPES.get(task, "ppo") for task in options.tasks)
    recipes = names * len(options.tasks) if len(names) == 1 else names
    cells = {}
    for seed in options.seed_range:
        for task, recipe in zip(options.tasks, recipes, strict=True):
            for mode in options.modes:
                cells[Cell(task, recipe, mode, seed)] = configured(mode, _base(options, task, recipe, seed)).resolved()
    return cells


def _base(options: Options, task: str, recipe: str, seed: int) -> RecipeConfig:
    kind: Any = config_class(recipe)
    setting = SETTINGS.get(task, {}) if recipe == RECIPES.get(task) else {}
    config = kind.for_task(task, **{**setting, "seed": seed, "device": options.device, "num_threads": 1})
    frames = options.total_frames or config.total_frames
    if options.width is not None and options.total_frames is None and setting:
        frames = WIDE_FRAMES.get(task, frames)
    changes: dict[str, Any] = {"total_frames": frames}
    if frames is None:
        raise ValueError(f"the preset of {recipe} on {task} counts episodes: give --total-frames")
    if options.width is not None:
        lr = (config.lr or 1e-3) * min(1.0, USUAL_WIDTH / options.width)
        changes |= {"hidden": (options.width,) * DEPTH, "lr": lr}
    if options.batch is not None:
        if not hasattr(config, "batch_size"):
            raise ValueError(f"{recipe} learns from whole collections: it has no --batch")
        changes["batch_size"] = options.batch
    return replace(config, **changes)


def jobs_of(options: Options) -> dict[Cell, Job]:
    """How each cell is made and recorded.

    Raises:
        ValueError: If an option is out of range.
    """
    free: queue.Queue[int | None] = queue.Queue()
    for core in cores_of(options.cores, options.device):
        free.put(core)

    def on_a_free_core(config: RecipeConfig, mode: str) -> dict[str, Any]:
        core = free.get()
        try:
            return mode_cell.run(config, mode, options.watch, core, options.limit)
        finally:
            free.put(core)

    code = digest([*package_files(), Path(mode_cell.__file__), Path(negative_controls.__file__)])
    jobs = {}
    for cell, config in plan(options).items():
        sizes = {"hidden": list(config.hidden), "batch_size": getattr(config, "batch_size", None)}
        run = {**cell._asdict(), **sizes, "config": config.to_dict(), "watch": asdict(options.watch)}
        run = json.loads(json.dumps(run))  # as records have it
        jobs[cell] = Job(
            # Runs of other settings are no seeds of this one.
            named=run,
            run=run,
            code=code,
            make=partial(on_a_free_core, config, cell.mode),
        )
    return jobs


def cores_of(wanted: Sequence[int], device: str = "cpu") -> list[int | None]:
    """The cores to pin to; a single None where the system cannot pin.

    Args:
        wanted: Some of this process's; empty takes all, or the last one where cells would share a GPU.
        device: Where cells run.

    Raises:
        ValueError: If this process may not use one that is wanted.
    """
    if not hasattr(os, "sched_setaffinity"):
        return [None]
    usable = os.sched_getaffinity(0)
    if unknown := sorted(set(wanted) - usable):
        raise ValueError(f"cores {unknown} cannot be used here; there are {', '.join(map(str, sorted(usable)))}")
    return [*(wanted or sorted(usable)[0 if device == "cpu" else -1 :])]


def _command(argv: Sequence[str]) -> str:
    return " ".join(["python benchmarks/precision_modes.py", *(a for a in argv if a not in ("--report", "--markdown"))])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
