"""Search for the options of a recipe: trials of several seeds, chosen by Optuna from the space that --space names.

Run the same command again to go on with a study, also after a kill, or run it several times at once to share it. The
recipe's own options are as in train.py: what is not searched keeps their values. "--algo dqn --help" lists them.
"""

from __future__ import annotations

import functools
import logging
import math
import signal
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
import tyro
from tqdm import tqdm

from fp8rl_torchrl.recipes import RecipeConfig, build
from fp8rl_torchrl.recipes.command_line import starting_config
from fp8rl_torchrl.recipes.search import SearchSpace, read_options, read_space
from fp8rl_torchrl.recipes.study import SharedStudy, make_sampler, require_optuna
from fp8rl_torchrl.recipes.study_plots import plot_history, plot_importance
from fp8rl_torchrl.recipes.trials import check_objective, run_trial
from fp8rl_torchrl.training.loop import Report
from fp8rl_torchrl.training.memory import keep_freed_memory
from fp8rl_torchrl.training.run_folder import made_with, write_json

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Config = TypeVar("Config", bound=RecipeConfig)

MEASURES = {"return": "mean return after training", "frames": "frames to the target return"}
"""What a trial's value is, by objective."""


@dataclass(frozen=True, kw_only=True)
class Options(Generic[Config]):
    """A recipe's options, what to vary, and where the study goes."""

    config: Config
    variant: str | None = None
    """Start from a named set of options instead of the preset: online (actor-critic), guide (dqn), ddpg (td3)."""
    space: tuple[str, ...] = ()
    """What to search, one NAME=LOW:HIGH, NAME=log:LOW:HIGH or NAME=A,B,C for each option: lr=log:1e-4:1e-2
    hidden=64,128,64x64."""
    start: tuple[str, ...] = ()
    """The first trial of a new study, as NAME=VALUE; what it leaves out is sampled."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """tpe learns from earlier trials, random does not, grid takes every combination of choices once."""
    sampler_seed: int | None = None
    """Seed of the sampler; processes that share a study need different ones, which they draw by default."""
    trials: int | None = None
    """Trials of the whole study, over all processes and restarts; by default 30, or every point of the grid."""
    seeds: int = 3
    """Seeds that each trial is trained with, from --seed on; its value is their mean."""
    objective: Literal["return", "frames"] = "return"
    """return: the mean return of the evaluation after training, more is better. frames: the frames of training until
    --target-return is reached, fewer are better; one that never reaches it is charged more than --total-frames."""
    prune: bool = True
    """Give a trial up after a quarter of its first seed or later, where its best estimate so far is below the median
    of others at the same step."""
    study: str | None = None
    """Name of the study; by default <algo>-<env>-<objective>."""
    storage: str | None = None
    """Database, as a URL; by default sqlite:///OUT/study.db."""
    out: str | None = None
    """Folder of the results; by default runs/tune-<study>."""
    heartbeat: int = 10
    """Seconds between the signs of life of a running trial; one without any for three times as long was killed, and its
    parameters are tried again."""


class Progress:
    """A progress bar over the trials of the study, and a line for each that ends here."""

    def __init__(self, shared: SharedStudy, space: SearchSpace, total: int, seeds: int, target: float | None) -> None:
        self.shared, self.seeds, self.target = shared, seeds, target
        self.names = [each.name for each in space.dimensions]
        self.bar = tqdm(total=total, unit=" trials", dynamic_ncols=True)
        self.show("")
        self.bar.write(f"{'trial':>5}  {'state':<8}  {'value':>10}  parameters")

    def show(self, doing: str) -> None:
        """Say what happens now, next to the best value so far."""
        best = self.shared.best
        self.best = "no value yet" if best is None else f"best {best.value:g} (trial {best.number})"
        self.bar.n = min(len(self.shared.ended), self.bar.total)
        self.bar.set_postfix_str(f"{self.best}{doing}")

    def train(self, trial: optuna.Trial, place: int, report: Report) -> None:
        """Say how far a trial is."""
        doing = f"trial {trial.number}, seed {place + 1}/{self.seeds}, {report.frames:,} frames"
        self.bar.set_postfix_str(f"{self.best}; {doing}, return {report.episode_return:.1f}", refresh=False)
        self.bar.update(0)

    def end(self, trial: FrozenTrial) -> None:
        """Write the line of a trial."""
        self.bar.write(self.row(trial))
        self.show("")

    def missed(self, trial: FrozenTrial) -> int:
        """How many of a trial's seeds did not reach the target, where there is one."""
        return 0 if self.target is None else sum(each < self.target for each in trial.user_attrs.get("returns", ()))

    def row(self, trial: FrozenTrial) -> str:
        """A trial in one line."""
        refused, missed = trial.user_attrs.get("refused"), self.missed(trial)
        note = refused or (f"{missed} of {self.seeds} seeds missed the target" if missed else "")
        state = "refused" if refused else {"COMPLETE": "complete", "PRUNED": "pruned"}[trial.state.name]
        value = f"{trial.value:.6g}" if trial.value is not None else ""
        options = "  ".join(f"{name}={_short(trial.params[name])}" for name in self.names if name in trial.params)
        return f"{trial.number:>5}  {state:<8}  {value:>10}  {options}" + (f"  ({note})" if note else "")


def main(argv: list[str]) -> int:
    """Search as the options say.

    Returns:
        The exit code: 0, 2 for bad input or a search in which no trial came to its end, 130 after Ctrl-C or SIGTERM.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    try:
        options = parse(argv)
        require_optuna()
        config, seeds, objective = options.config, options.seeds, options.objective
        space = read_space(config, options.space)
        first = space.encode(read_options(config, options.start))
        sampler = functools.partial(make_sampler, options.sampler, space, options.sampler_seed)
        total = count_trials(options, space)
        check_objective(objective, config)
        torch.set_num_threads(config.num_threads)
        keep_freed_memory()
        build(config).collector.shutdown()  # what cannot be built is told before anything is written
        name = options.study or f"{config.to_dict()['algo']}-{config.env}-{objective}"
        out = Path(options.out or f"runs/tune-{name.replace('/', '-')}")
        refuse_strange(out)
        if options.storage is None:
            out.mkdir(parents=True, exist_ok=True)
        shared = SharedStudy(
            options.storage or f"sqlite:///{out}/study.db",
            name,
            describe(options, space),
            minimize=objective == "frames",
            sampler=sampler,
            prune_after=config.total_frames // 4 if options.prune and config.total_frames else None,
            first=first,
            heartbeat=options.heartbeat,
        )
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def run(trial: optuna.Trial) -> float:
        return evaluate_trial(trial, config, space, seeds, objective, progress)

    def end(trial: FrozenTrial) -> None:
        progress.end(trial)
        write_best(out / "best.json", shared, config, space)

    print(f"study {name} in {out}: {total} trials of {seeds} seeds, {MEASURES[objective]}")
    progress = Progress(shared, space, total, seeds, config.target_return if objective == "frames" else None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        shared.work(run, total, end, lambda running: progress.show(f"; other processes run {running}"))
    except KeyboardInterrupt:
        progress.bar.close()
        print("stopped early; the same command goes on, and begins with the trial that was cut short")
        return 130
    progress.bar.close()
    if shared.best is None:
        reasons = [trial.user_attrs.get("refused", "pruned") for trial in shared.ended]
        print(f"error: no trial came to its end; the last one: {reasons[-1]}", file=sys.stderr)
        return 2
    write_best(out / "best.json", shared, config, space)
    plot_history(shared.study, MEASURES[objective], out / "history.png")
    plotted = ["history.png"]
    if len(shared.trials("COMPLETE")) > 1:
        plot_importance(shared.study, out / "importance.png")
        plotted.append("importance.png")
    summarize(shared, progress, out)
    print(f"pictures: {', '.join(f'{out}/{each}' for each in plotted)}")
    return 0


def parse(argv: list[str]) -> Options[Any]:
    """The options; those of the recipe start from its preset for the task."""
    default = starting_config(argv)
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[Options[type(default)]],
        description=__doc__,
        args=argv,
        default=Options(config=default),
    )


def count_trials(options: Options[Any], space: SearchSpace) -> int:
    """How many trials the study is to have.

    Raises:
        ValueError: If a number is out of range, or a grid has a start.
    """
    for name in ("seeds", "heartbeat", "trials"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be >= 1; got {value}")
    if options.sampler != "grid":
        return options.trials or 30
    if options.start:
        raise ValueError("--start does not go with --sampler grid, which tries every point of the grid")
    points = math.prod(len(labels) for labels in space.grid().values())
    return min(options.trials or points, points)


def refuse_strange(out: Path) -> None:
    """Make sure that the results overwrite nothing.

    Raises:
        ValueError: If the folder is a file, or holds other things.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder by --out")
    if out.is_dir() and any(out.iterdir()) and not any((out / mine).exists() for mine in ("study.db", "best.json")):
        raise ValueError(f"{out} is not empty, and holds no study; name another folder by --out")


def describe(options: Options[Any], space: SearchSpace) -> dict[str, Any]:
    """What decides the value of a trial."""
    config = {name: _plain(value) for name, value in options.config.to_dict().items()}
    for each in ("device", "num_threads", *space.describe()):
        del config[each]
    return {**config, "space": space.describe(), "seeds": options.seeds, "objective": options.objective}


def evaluate_trial(
    trial: optuna.Trial,
    config: RecipeConfig,
    space: SearchSpace,
    seeds: int,
    objective: Literal["return", "frames"],
    progress: Progress,
) -> float:
    """Train what a trial suggests.

    Raises:
        optuna.TrialPruned: If it is not worth going on, or cannot be trained at all; the reason is then kept with it.
    """
    from optuna.exceptions import OptunaError, TrialPruned

    options = space.suggest(trial)

    def estimate(step: int, value: float, more: bool) -> None:
        trial.report(value, step)
        if more and trial.should_prune():
            raise TrialPruned

    try:
        outcome = run_trial(
            replace(config, **options),
            seeds,
            objective,
            estimate,
            lambda place, report: progress.train(trial, place, report),
        )
    except OptunaError:
        raise
    except (ValueError, RuntimeError, ArithmeticError) as error:
        # Refused, out of memory, or numbers beyond use. To the sampler it is a bad trial, which one that failed is not.
        trial.set_user_attr("refused", str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise TrialPruned from error
    trial.set_user_attr("returns", outcome.returns)
    trial.set_user_attr("frames", outcome.frames)
    return outcome.value


def write_best(path: Path, shared: SharedStudy, config: RecipeConfig, space: SearchSpace) -> None:
    """Write the best configuration so far, as ``train.py --config`` takes it."""
    best = shared.best
    if best is None:
        return
    found = {
        "study": shared.study.study_name,
        "trial": best.number,
        "value": best.value,
        "parameters": best.params,
        "returns": best.user_attrs["returns"],
        "frames": best.user_attrs["frames"],
    }
    best_config = replace(config, **space.decode(best.params))
    write_json(path, {"config": best_config.to_dict(), "search": found, "made_with": made_with()})


def summarize(shared: SharedStudy, progress: Progress, out: Path) -> None:
    """Print the best trials, and where everything is."""
    minimize = shared.study.direction.name == "MINIMIZE"
    ranked = sorted(shared.trials("COMPLETE"), key=lambda trial: trial.value or 0.0, reverse=not minimize)
    pruned = shared.trials("PRUNED")
    refused = sum("refused" in trial.user_attrs for trial in pruned)
    print(f"\n{len(ranked)} trials complete, {len(pruned) - refused} pruned, {refused} refused. The best:")
    for trial in ranked[:5]:
        print(progress.row(trial))
    if all(progress.missed(trial) for trial in ranked):
        missed = progress.missed(ranked[0])
        print(f"none reached the target with every seed: the best missed it with {missed} of {progress.seeds}")
    print(f"best configuration: {out}/best.json; train it: python scripts/train.py --config {out}/best.json")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchrl")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before the first trial
        sys.exit(130)
