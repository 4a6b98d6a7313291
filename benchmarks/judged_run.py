"""One training run of a recipe, judged in Gymnasium's own environment, in a process of its own.

It runs on one thread. Its time is processor time of collecting and updating: imports, construction and evaluations do
not count, and compilation is told apart. Run as a program, this trains what its argument describes and prints a line
of JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peers import take_turn
from tensordict import TensorDictBase
from timing import attempt

from fp8rl_torchrl import Pipeline, envs, evaluate
from fp8rl_torchrl.recipes import RecipeConfig, build, config_class
from fp8rl_torchrl.training.evaluate import EvalResult
from fp8rl_torchrl.training.loop import Report
from fp8rl_torchrl.training.memory import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class Exam:
    """How a policy is judged: deterministically, in Gymnasium's own environment, always from the same start states."""

    final_episodes: int = 0
    """Episodes at the end of training; 0 leaves this out."""
    every: int = 0
    """Frames between evaluations during training; 0 makes none."""
    episodes: int = 20
    """Episodes of each evaluation during training."""
    threshold: float | None = None
    """Training ends at the first evaluation whose mean return is at least this."""
    seed: int = 1_000_003
    """Of the episodes."""


class Examiner:
    """Judges a policy while it is trained, and at the end.

    Attributes:
        evaluations: Those made during training: frames, mean return, and the seconds that training had taken.
        passed: Whether the last of them reached the threshold.
    """

    def __init__(self, task: str, policy: Callable[[TensorDictBase], TensorDictBase], exam: Exam) -> None:
        self.policy, self.exam = policy, exam
        self.judge = envs.make(task, num_envs=20, native=False)
        self.evaluations: list[tuple[int, float, float]] = []
        self.passed = False
        self._before = 0

    def look(self, frames: int, seconds: float) -> bool:
        """Evaluate if it is time, after so many frames and seconds of training.

        Returns:
            Whether the threshold is reached, so that training ends.
        """
        if passes(self.exam.every, self._before, frames):
            mean = self._evaluate(self.exam.episodes).mean
            self.evaluations.append((frames, mean, seconds))
            self.passed = self.exam.threshold is not None and mean >= self.exam.threshold
        self._before = frames
        return self.passed

    def results(self) -> dict[str, Any]:
        """``evaluations``; ``passed`` if there is a threshold; the final one's mean, standard deviation and minimum."""
        results: dict[str, Any] = {"evaluations": self.evaluations}
        if self.exam.threshold is not None:
            results["passed"] = self.passed
        if self.exam.final_episodes:
            final = self._evaluate(self.exam.final_episodes)
            results |= {"return_mean": final.mean, "return_std": final.std, "return_min": min(final.returns)}
        self.judge.close(raise_if_closed=False)
        return results

    def _evaluate(self, episodes: int) -> EvalResult:
        return evaluate(self.policy, self.judge, episodes, seed=self.exam.seed)


class Clock:
    """Processor time of this process, in s: of training without compilation, and of compilation."""

    def __init__(self) -> None:
        self.seconds = self.compile_seconds = 0.0

    def timed(self, pipeline: Pipeline) -> Iterator[Report]:
        """Train, and let the clock run while no one looks at a report."""
        reports = iter(pipeline)
        while True:
            started, compiled = time.process_time(), self.compile_seconds
            with self._compilation():
                report = next(reports, None)
            self.seconds += time.process_time() - started - (self.compile_seconds - compiled)
            if report is None:
                return
            yield report

    @contextlib.contextmanager
    def _compilation(self) -> Iterator[None]:
        from torch._dynamo.callback import callback_handler

        started = 0.0

        def start(_: object) -> None:
            nonlocal started
            started = time.process_time()

        def end(_: object) -> None:
            self.compile_seconds += time.process_time() - started

        callback_handler.register_start_callback(start)
        callback_handler.register_end_callback(end)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(start)
            callback_handler.remove_end_callback(end)


def passes(every: int, before: int, now: int) -> bool:
    """Whether a multiple of ``every`` frames lies beyond ``before`` and not beyond ``now``; never for 0."""
    return every > 0 and now // every > before // every


def train(config: RecipeConfig, exam: Exam) -> dict[str, Any]:
    """Train until the budget is spent, or until the threshold or the configuration's own target is reached.

    That target (``target_return``) counts where there is no threshold. It is compared with evaluations like those of
    ``scripts/train.py``, which the preset was made for.

    Returns:
        What `Examiner.results` returned, and what training took.
    """
    keep_freed_memory()
    pipeline, clock = build(config), Clock()
    examiner = Examiner(config.env, pipeline.agent.policy, exam)
    before, stopped_by = 0, "budget"
    for report in clock.timed(pipeline):
        if examiner.look(report.frames, clock.seconds):
            stopped_by = "threshold"
            break
        if exam.threshold is None and config.target_return is not None:
            own = passes(config.eval_every, before, report.frames)
            if own and evaluate(pipeline.agent.policy, pipeline.env, config.eval_episodes).mean >= config.target_return:
                stopped_by = "target_return"
                break
        before = report.frames
    return {
        **examiner.results(),
        "stopped_by": stopped_by,
        "frames": pipeline.frames,
        "episodes": pipeline.episodes,
        "updates": int(pipeline.step.updates),
        "skipped_steps": int(pipeline.step.skipped_steps),
        "seconds": clock.seconds,
        "compile_seconds": clock.compile_seconds,
        "wall_seconds": pipeline.seconds,
    }


def run(config: RecipeConfig, exam: Exam, core: int | None, limit: float) -> dict[str, Any]:
    """Train in a process of its own.

    Args:
        config: What to train.
        exam: How it is judged.
        core: The core to pin to; None does not pin.
        limit: Seconds after which it is ended.

    Returns:
        What `train` returned and ``failure``, which is None; or ``failure`` alone, with the reason.
    """
    job = {"config": config.to_dict(), "exam": asdict(exam)}
    return take_turn([sys.executable, str(Path(__file__)), json.dumps(job)], core, limit)


def main(argv: list[str]) -> int:
    """Train what the argument describes, and print the result."""
    job = json.loads(argv[0])
    options = job["config"]
    return tell(lambda: train(config_class(options["algo"]).from_dict(options), Exam(**job["exam"])))


def tell(work: Callable[[], dict[str, Any]]) -> int:
    """Do the work of a process, on one thread, and print the result, or why it failed, as a line of JSON."""
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchrl")
    torch.set_num_threads(1)
    result, failure = attempt(work)
    print(json.dumps((result or {}) | {"failure": failure}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
