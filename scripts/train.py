"""Train an agent. Without options: the actor-critic on CustomEnv in BF16, about half a minute on a CPU.

--algo takes actor-critic, reinforce, a2c, ppo, dqn, sac or td3; "--algo ppo --help" lists the options of that recipe.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import torch
import tyro
from tqdm import tqdm

from fp8rl_torchrl.data import CollectorState, restores_exactly
from fp8rl_torchrl.recipes import RecipeConfig, build, config_class, resolve_precision
from fp8rl_torchrl.recipes.command_line import peek, starting_config
from fp8rl_torchrl.training.checkpoint import PipelineCheckpoints, latest_checkpoint
from fp8rl_torchrl.training.loop import Pipeline, Report
from fp8rl_torchrl.training.memory import keep_freed_memory
from fp8rl_torchrl.training.metrics import Loggers, require_wandb
from fp8rl_torchrl.training.run import Run
from fp8rl_torchrl.training.run_folder import RunFolder, write_json

Config = TypeVar("Config", bound=RecipeConfig)

EXTENDABLE = ("total_frames", "episodes", "target_return")
"""Options that a resumed run may change: they say when it ends, not how it learns."""


@dataclass(frozen=True, kw_only=True)
class Options(Generic[Config]):
    """A recipe's options, and where the run goes."""

    config: Config
    config_file: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """Start from the configuration in this file, a run's config.json or the best.json of tune.py, instead of the
    preset; other options given are set on top of it."""
    variant: str | None = None
    """Start from a named set of options instead of the preset: online (actor-critic), guide (dqn), ddpg (td3)."""
    run_dir: str | None = None
    """The run folder; by default runs/<algo>-<env>-<precision>-s<seed>-<time>."""
    resume: str | None = None
    """Continue the run in this folder from its newest checkpoint."""
    wandb: str | None = None
    """Log to this Weights & Biases project, too."""


class Progress:
    """A progress bar, and a line of the average return every so many episodes."""

    def __init__(self, config: RecipeConfig) -> None:
        self.config = config
        self.by_frames = config.total_frames is not None

    def start_at(self, frames: int, episodes: int, recent_returns: tuple[float, ...]) -> None:
        """Show the bar, at the place where a resumed run stands."""
        total, unit = self.config.total_frames or self.config.episodes, "frame" if self.by_frames else "episode"
        done = min(frames if self.by_frames else episodes, total)
        # None: no bar where nobody watches it move, in a file or a pipe.
        self.bar = tqdm(
            total=total, initial=done, unit=f" {unit}s", dynamic_ncols=True, unit_scale=self.by_frames, disable=None
        )
        self.episodes = episodes
        unfinished = episodes % self.config.report_every
        self.block = list(recent_returns[-unfinished:]) if unfinished else []
        self.bar.write(f"{'episodes':>9}  {'average return':>14}  {'frames':>10}  {'updates':>8}  {'skipped':>8}")

    def __call__(self, report: Report) -> None:
        """Advance the bar."""
        done = min(report.frames if self.by_frames else report.episodes, self.bar.total)
        self.bar.update(done - self.bar.n)
        if self.episodes or report.episode_returns:
            self.bar.set_postfix_str(f"return {report.episode_return:.1f}", refresh=False)
        for episode_return in report.episode_returns:
            self.episodes += 1
            self.block.append(episode_return)
            if self.episodes % self.config.report_every == 0:
                self._write_row(report.frames, report.updates, report.skipped_steps)

    def close(self, pipeline: Pipeline) -> None:
        """End the bar, with a line of what there is where too few episodes have ended for one."""
        if self.block and self.episodes < self.config.report_every:
            self._write_row(pipeline.frames, int(pipeline.step.updates), int(pipeline.step.skipped_steps))
        self.bar.close()

    def _write_row(self, frames: int, updates: int, skipped: int) -> None:
        mean = sum(self.block) / len(self.block)
        self.bar.write(f"{self.episodes:>9,}  {mean:>14.1f}  {frames:>10,}  {updates:>8,}  {skipped:>8,}")
        self.block.clear()


def main(argv: list[str]) -> int:
    """Train as the options say.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C or SIGTERM.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    try:
        asked, options = parse(argv)
        torch.set_num_threads(asked.num_threads)
        keep_freed_memory()
        asked, auto = resolve_precision(asked)
        config = asked.resolved()
        pipeline = build(config)
        folder = RunFolder(options.resume or options.run_dir or config.default_run_dir())
        if options.wandb is not None:
            require_wandb()
        if options.resume:
            latest_checkpoint(folder.checkpoints)  # nothing is written to a folder that cannot be resumed
        else:
            folder.create(config.to_dict())
            if pipeline.conversion is not None:
                write_json(folder.conversion, pipeline.conversion.to_dict())
            if auto is not None:
                write_json(folder.path / "auto_precision.json", auto.to_dict())
        checkpoints = PipelineCheckpoints(pipeline, CollectorState(pipeline.collector), folder.checkpoints)
        loggers = Loggers(folder.path, options.wandb, config.to_dict())
        progress = Progress(config)
        title = f"{config.env}, {config.precision}, seed {config.seed}"
        run = Run(pipeline, checkpoints, folder, loggers, config, title, progress)
        if options.resume:
            run.resume()
            if not pipeline.finished:
                folder.extend(config.to_dict())
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.resume and not restores_exactly(pipeline.env):
        print(f"{config.env} keeps state that cannot be restored: training resumes at fresh episodes")
    print(f"{title} on {config.device}, run folder {folder.path}")
    for reason in ([] if auto is None else [auto]) + asked.chosen(config.device)[1]:
        print(reason)
    if config.total_frames is not None and (rest := config.total_frames % config.frames_per_collection):
        whole = config.total_frames - rest + config.frames_per_collection
        print(f"trains to {whole:,} frames: in whole collections of {config.frames_per_collection:,}")
    if pipeline.conversion is not None:
        print(f"\n{pipeline.conversion}\n")
    if pipeline.finished:
        print("its budget is spent, so nothing is left to train: extend it with --total-frames or --episodes")
    elif run.target_reached:
        print(f"its target return {config.target_return:g} is reached: go on with a higher --target-return, or None")
    progress.start_at(pipeline.frames, pipeline.episodes, pipeline.recent_returns)
    stopped_by = run.train()
    progress.close(pipeline)
    if stopped_by == "target_return":
        print(f"stopped at the target return: an evaluation has reached {config.target_return:g}")
    summary = run.summarize(stopped_by)
    print_summary(summary, folder)
    if not summary["updates"]:
        learning = "every update was skipped" if summary["skipped_steps"] else f"min_replay is {config.min_replay:,}"
        print(f"nothing was learned: of {summary['frames']:,} frames no update was made ({learning})")
    if config.target_return is not None and summary["best_eval_return"] is None:
        print("the target return was never looked at: no evaluation took place; lower --eval-every")
    if not summary["episodes"]:
        print(f"no training episode has ended: the frames are spread over {config.num_envs} environments")
    if stopped_by == "signal":
        print(f"stopped early; continue with: python scripts/train.py --resume {folder.path}")
        return 130
    return 0


def parse(argv: list[str]) -> tuple[RecipeConfig, Options[Any]]:
    """The configuration and the run's options.

    A resumed run starts from its saved configuration, a new one from --config or the recipe's preset for the task.
    """
    saved, file, variant = (peek(argv, option) for option in ("--resume", "--config", "--variant"))
    if saved is not None and file is not None:
        raise ValueError("--config does not go with --resume: a resumed run keeps its options")
    if variant is not None and (saved is not None or file is not None):
        raise ValueError("--variant does not go with --resume or --config, which bring all options themselves")
    if saved is not None:
        options = RunFolder(saved).read_config()
        algo = options.get("algo", "actor-critic")
        if peek(argv, "--algo") not in (None, algo):
            raise ValueError(_kept(["algo"], saved))
        recipe = config_class(algo)
        default = recipe.from_dict(options)
    elif file is not None:
        default = read_config(file)
        recipe = type(default)
        for name, value in (("algo", default.to_dict().get("algo")), ("env", default.env)):
            if peek(argv, f"--{name}") not in (None, value):
                raise ValueError(f"{file} is a configuration for --{name} {value}: leave out --{name}")
    else:
        recipe = config_class(peek(argv, "--algo") or "actor-critic")
        default = starting_config(argv)

    parsed: Options[Any] = tyro.cli(
        tyro.conf.OmitArgPrefixes[Options[recipe]],
        description=__doc__,
        args=argv,
        default=Options(config=default),
    )
    if peek(argv, "--episodes") is not None and peek(argv, "--total-frames") is None:
        # A budget in episodes takes the place of the preset's, or the saved run's, in frames.
        parsed = replace(parsed, config=replace(parsed.config, total_frames=None))
    if saved is not None:
        if parsed.run_dir is not None:
            raise ValueError("--run-dir does not go with --resume: a resumed run stays in its folder")
        same_end = {name: getattr(default, name) for name in EXTENDABLE}
        ours, theirs = replace(parsed.config, **same_end).to_dict(), default.to_dict()
        if conflicts := [name for name in ours if ours[name] != theirs[name]]:
            raise ValueError(_kept(conflicts, saved))
    return parsed.config, parsed


def read_config(file: str) -> RecipeConfig:
    """The configuration in a file such as a run's ``config.json``.

    Raises:
        ValueError: If there is none that this version knows.
    """
    try:
        options = dict(json.loads(Path(file).read_text())["config"])
    except FileNotFoundError:
        raise ValueError(f"there is no file {file} to take the configuration from") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{file} cannot be read as a configuration: {error}") from error
    return config_class(options.get("algo", "actor-critic")).from_dict(options)


def print_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    """Print how the run ended."""
    best = "none: no periodic evaluation took place"
    if summary["best_eval_return"] is not None:
        best = f"{summary['best_eval_return']:.1f} at {summary['best_frames']:,} frames, kept in {folder.best}"
    rows = {
        "evaluation return": f"{summary['eval_return_mean']:.1f} ± {summary['eval_return_std']:.1f} "
        f"(mean ± std of {summary['eval_episodes']} episodes)",
        "best evaluation": best,
        "trained": f"{summary['frames']:,} frames, {summary['episodes']:,} episodes, {summary['updates']:,} updates",
        "skipped updates": f"{summary['skipped_steps']:,}",
        "training time": f"{summary['train_seconds']:.1f} s, {summary['frames_per_second']:,.0f} frames/s",
        "learning curve": str(folder.curve),
    }
    print()
    for name, value in rows.items():
        print(f"{name:<18} {value}")


def _kept(conflicts: list[str], saved: str) -> str:
    return (
        f"a resumed run keeps its options, as {saved}/config.json has them: leave out {_flags(conflicts)}. "
        f"Only {_flags(EXTENDABLE)} may change"
    )


def _flags(names: Any) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchrl")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before or after training, or a second time while a run comes to its end
        sys.exit(130)
