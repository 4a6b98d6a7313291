"""A training run in its folder: reports, evaluations, checkpoints, and an orderly stop."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from fp8rl_torchrl.training.checkpoint import BestPolicy, PipelineCheckpoints
from fp8rl_torchrl.training.evaluate import EvalResult, evaluate
from fp8rl_torchrl.training.loop import Pipeline, Report
from fp8rl_torchrl.training.metrics import Loggers, MetricsFile, plot_learning_curve, report_row
from fp8rl_torchrl.training.run_folder import RunFolder, write_json


@dataclass(frozen=True, kw_only=True)
class RunSchedule:
    """How often a run is evaluated and saved.

    Raises:
        ValueError: If a number is out of range.
    """

    eval_every: int = 40_000
    """Evaluate after this many environment steps; 0 evaluates at the end only."""
    eval_episodes: int = 20
    """Episodes of each evaluation during training."""
    final_eval_episodes: int = 100
    """Episodes of the evaluation at the end."""
    checkpoint_every: int = 2000
    """Save after this many updates, between two collections."""
    target_return: float | None = None
    """Stop as soon as a periodic evaluation reaches this mean return; None trains until the budget is spent."""

    def __post_init__(self) -> None:
        """Refuse schedules that cannot be kept."""
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be >= 0; got {self.eval_every}")
        for name in ("eval_episodes", "final_eval_episodes", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if self.target_return is not None:
            if not math.isfinite(self.target_return):
                raise ValueError(f"target_return must be a finite number; got {self.target_return}")
            if not self.eval_every:
                raise ValueError("target_return is compared with periodic evaluations, and eval_every=0 makes none")

    def evaluates(self, before: int, now: int) -> bool:
        """Whether an evaluation is due after ``now`` environment steps, if the last look was after ``before``."""
        return self.eval_every > 0 and now // self.eval_every > before // self.eval_every


class Run:
    """Trains a pipeline in a run folder until its budget is spent, its target is reached or a signal stops it.

    The best policy of all periodic evaluations is kept in ``best/``, together with a checkpoint of the run: what was
    kept is not lost where a resumed run takes another course. None of it changes the run.

    Args:
        pipeline: The pipeline to train.
        checkpoints: Saves the pipeline.
        folder: An existing run folder.
        loggers: Where each report goes besides ``metrics.csv``.
        schedule: How often to evaluate and to save.
        title: What runs, for the picture.
        on_report: Called with each `Report`, for progress bars and tables.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        checkpoints: PipelineCheckpoints,
        folder: RunFolder,
        loggers: Loggers,
        schedule: RunSchedule,
        title: str,
        on_report: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self.pipeline, self.checkpoints, self.folder = pipeline, checkpoints, folder
        self.loggers, self.schedule, self.title, self.on_report = loggers, schedule, title, on_report
        self.metrics = MetricsFile(folder.metrics)
        self.best = BestPolicy(pipeline.agent, folder.best)

    @property
    def target_reached(self) -> bool:
        """Whether a periodic evaluation has reached the target return."""
        target, best = self.schedule.target_return, self.best.eval_return
        return target is not None and best is not None and best >= target

    def resume(self) -> None:
        """Go back to the newest checkpoint, and cut ``metrics.csv`` and ``best/`` back to it.

        The best policy is then the one that was the best when the checkpoint was saved. A better one that was found
        after it is forgotten: only a run that was killed while it saved the two can have left such a one.

        Raises:
            CheckpointError: If there is none, or it does not fit the pipeline.
        """
        self.checkpoints.load_latest()
        self.metrics.cut_back(self.pipeline.frames)
        self.best.cut_back(self.pipeline.frames)

    def train(self) -> str:
        """Train, and write the picture of the learning curve.

        Returns:
            Why it stopped: ``"episodes"`` or ``"total_frames"`` (the budget is spent), ``"target_return"`` (a periodic
            evaluation has reached it, perhaps before the run was resumed), or ``"signal"`` after SIGINT or SIGTERM. A
            checkpoint is saved in each case.
        """
        pipeline, schedule = self.pipeline, self.schedule
        # A new run is saved after its first collection: TorchRL cannot save a buffer that holds nothing yet.
        saved_at = int(pipeline.step.updates) if pipeline.frames else -schedule.checkpoint_every
        evaluated_at = pipeline.frames
        with _signals_noted() as stop:
            for report in () if self.target_reached else pipeline:
                eval_return, improved = math.nan, False
                if schedule.evaluates(evaluated_at, report.frames):
                    evaluated_at = report.frames
                    eval_return = self.evaluate(schedule.eval_episodes).mean
                    improved = self.best.offer(eval_return, report.frames)
                row = report_row(report, eval_return)
                self.metrics.append(row)
                self.loggers.log(row)
                self.on_report(report)
                due = report.updates - saved_at >= schedule.checkpoint_every
                if pipeline.finished or stop or improved or due:
                    self.checkpoints.save(report.frames)
                    saved_at = report.updates
                if stop or self.target_reached:
                    break
        self.loggers.close()
        plot_learning_curve(self.metrics.rows, self.title, self.folder.curve)
        if stop:
            return "signal"
        if self.target_reached:
            return "target_return"
        return "episodes" if pipeline.config.total_frames is None else "total_frames"

    def evaluate(self, episodes: int) -> EvalResult:
        """Evaluate the current policy, deterministically, on fresh episodes."""
        return evaluate(self.pipeline.agent.policy, self.pipeline.env, episodes)

    def summarize(self, stopped_by: str) -> dict[str, Any]:
        """Evaluate the final policy and write ``summary.json``.

        Args:
            stopped_by: What `train` returned.

        Returns:
            The summary; ``best_eval_return`` and ``best_frames`` are None where no periodic evaluation took place.
        """
        result, pipeline = self.evaluate(self.schedule.final_eval_episodes), self.pipeline
        summary = {
            "eval_return_mean": result.mean,
            "eval_return_std": result.std,
            "eval_episodes": len(result.returns),
            "best_eval_return": self.best.eval_return,
            "best_frames": self.best.frames,
            "frames": pipeline.frames,
            "episodes": pipeline.episodes,
            "updates": int(pipeline.step.updates),
            "train_seconds": pipeline.seconds,
            "frames_per_second": pipeline.frames / max(pipeline.seconds, 1e-9),
            "skipped_steps": int(pipeline.step.skipped_steps),
            "stopped_by": stopped_by,
        }
        write_json(self.folder.summary, summary)
        # Once more, with the evaluation at the end.
        last = {**(self.metrics.rows[-1] if self.metrics.rows else {}), "frames": pipeline.frames}
        rows = [*self.metrics.rows, {"episode_return": math.nan, **last, "eval_return": result.mean}]
        plot_learning_curve(rows, self.title, self.folder.curve)
        return summary


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Turn the first SIGINT or SIGTERM into an entry of a list; the second one interrupts at once."""
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in before:
            signal.signal(number, note)
    except ValueError:  # only the main thread may set handlers
        yield noted
        return
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
