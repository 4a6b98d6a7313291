"""What a comparison's records say of a task: scores, areas, seconds and bytes, by mode and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scores import area, iqm_interval, normalized
from verdicts import ModeRuns, TaskVerdict


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """All that is known of a task."""

    task: str
    recipe: str
    runs: Mapping[str, ModeRuns]
    """By mode."""
    records: Mapping[str, Sequence[Mapping[str, Any]]]
    """By mode, in the order of the seeds."""
    verdict: TaskVerdict
    margin: float
    sensitive_words: str
    """Whether the task can tell good precisions from bad."""

    @property
    def reference(self) -> str:
        """The mode that the others are compared with."""
        return next(each.mode for each in self.verdict.verdicts if each.kind == "reference")

    @property
    def hidden(self) -> str:
        """The widths of the hidden layers, such as ``64-64``."""
        return "-".join(map(str, self.records[self.reference][0]["run"]["hidden"]))

    @property
    def emulated(self) -> bool:
        """Whether some of its FP8 products were emulated."""
        every = [each for own in self.records.values() for each in own]
        return any((each["conversion"] or {}).get("backend") == "emulated" for each in every)


def mode_runs(task: str, seeds: Sequence[int], records: Sequence[Mapping[str, Any]]) -> ModeRuns:
    """The runs of a mode on a task from their records."""
    finals = [record["final"]["mean"] if record["final"] else float("nan") for record in records]
    return ModeRuns(
        seeds=tuple(seeds),
        final=tuple(normalized(task, finals).tolist()),
        areas=tuple(area(*curve_of(task, record)) for record in records),
        frames_per_second=tuple(record["frames"] / training_seconds(record) for record in records),
        memory=tuple(float(sum(record["memory"].values())) for record in records),
        diverged=sum(record["diverged"] is not None for record in records),
    )


def curve_of(task: str, record: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Frames and scores of a learning curve; what is not finite scores 0."""
    frames, returns = zip(*record["curve"], strict=True)
    return list(frames), normalized(task, [float("nan") if each is None else each for each in returns]).tolist()


def training_seconds(record: Mapping[str, Any]) -> float:
    """Seconds of training, without evaluations and without the recorder."""
    return sum(seconds for part, seconds in record["seconds"].items() if part != "recorder")


def fp8_share(record: Mapping[str, Any]) -> float:
    """The part of the linear layers' products that ran in FP8, by multiply-adds."""
    return sum(share for formats, share in record["products"].items() if formats.startswith(("e4m3", "e5m2")))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The bootstrap interval of the interquartile mean; of a single value, that value."""
    return iqm_interval([values]) if len(values) > 1 else (values[0], values[0])


def seconds_to(task: str, record: Mapping[str, Any], score: float) -> float | None:
    """Seconds of training until an evaluation reaches a score; None if none does."""
    frames, scores = curve_of(task, record)
    reached = next((at for at, value in zip(frames, scores, strict=True) if value >= score), None)
    return None if reached is None else training_seconds(record) * reached / max(record["frames"], 1)


def median_seconds(record: Sequence[Mapping[str, Any]], part: str) -> float:
    """Microseconds a frame of a part of training, the median over seeds."""
    return median(1e6 * each["seconds"][part] / max(each["frames"], 1) for each in record)
