"""A benchmark of many runs that goes on where it stopped: what is recorded is not made again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ledger import Ledger
from timing import make_room
from tqdm import tqdm

Key = TypeVar("Key")
Asked = TypeVar("Asked", bound="Options")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What benchmarks over recipes, tasks and seeds have in common."""

    out: str
    """Results go to OUT.jsonl (a record a run, appended) and OUT.png."""
    recipes: tuple[str, ...] = ()
    """Some of the table's recipes; by default all."""
    tasks: tuple[str, ...] = ()
    """Some of the table's tasks; by default all."""
    seeds: int = 5
    """Seeds of each, counted from --first-seed."""
    first_seed: int = 1000
    """The first seed."""
    core: int | None = None
    """The core to pin to; default: the last one that this process may use."""
    limit: float = 7200.0
    """Seconds after which a run is ended and counts as failed."""
    report: bool = False
    """Train nothing: show what is recorded, whatever code it was made with."""
    markdown: bool = False
    """Print the table as one for a Markdown file."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.seeds < 1 or not self.limit > 0:
            raise ValueError(f"seeds must be >= 1 and limit > 0; got {self.seeds} and {self.limit:g}")

    @property
    def workers(self) -> int:
        """How many runs are made at a time."""
        return 1

    @property
    def seed_range(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is recorded."""

    named: dict[str, Any]
    """What it is called: part of ``run``, and all that its newest record is found by, whatever made it."""
    run: dict[str, Any]
    """All that the result depends on, but for code, versions and hardware."""
    code: str
    """What stands for the code."""
    make: Callable[[], dict[str, Any]]
    """Makes the run, and returns the result with ``failure``: None or the reason."""


class Report(Protocol[Key]):
    """The module that says what records mean, of which each is None where its run is missing."""

    def table(self, records: dict[Key, Any], as_markdown: bool = False) -> str:
        """The table."""
        ...

    def complaints(self, records: dict[Key, Any]) -> list[str]:
        """What is wrong, in words."""
        ...

    def plot(self, records: dict[Key, Any], path: Path) -> None:
        """Draw the picture; what else there is to write goes beside it."""
        ...


def conduct(options: Asked, jobs_of: Callable[[Asked], dict[Key, Job]], report: Report[Key], well: str) -> int:
    """Make every run that is not recorded yet, and show all; with ``--report`` make none.

    Args:
        options: What is asked for.
        jobs_of: The runs.
        report: Shows them.
        well: What to say where nothing is wrong.

    Returns:
        The exit code: 0 if nothing is wrong, 1 if something is, 2 for bad input, 130 after Ctrl-C.
    """
    out = Path(options.out)
    try:
        jobs = jobs_of(options)
        make_room(out)
        ledger = Ledger(out.with_suffix(".jsonl"))
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    records: dict[Key, Any] = dict.fromkeys(jobs)
    interrupted = False
    if options.report:
        records.update({key: ledger.newest(job.named) for key, job in jobs.items()})
        if not any(records.values()):
            found = "has none of" if ledger.path.exists() else "does not exist, so there are none of"
            print(
                f"error: {ledger.path} {found} the {len(jobs):,} runs asked for; leave out --report to make them",
                file=sys.stderr,
            )
            return 2
    else:
        try:
            complete(jobs, ledger, records, options.workers)
        except KeyboardInterrupt:
            interrupted = True
    print(report.table(records, options.markdown))
    report.plot(records, out.with_suffix(".png"))
    wrong = report.complaints(records)
    print("\n".join(["", *(wrong or [well]), *outdated(jobs, records), f"\nrecords: {ledger.path}"]))
    if interrupted:
        print("stopped; what was done is recorded, and the same command goes on from there")
        return 130
    return 1 if wrong else 0


def complete(jobs: Mapping[Key, Job], ledger: Ledger, records: dict[Key, Any], workers: int = 1) -> None:
    """Put the record of every run in its place: the one that there is, or that of a new run, which is appended.

    Args:
        jobs: The runs, in the order in which they are begun.
        ledger: The records.
        records: Where they are put.
        workers: How many runs are made at a time. A record is appended as soon as its run is done.
    """
    records.update({key: ledger.find(job.run, job.code) for key, job in jobs.items()})
    missing = [key for key, record in records.items() if record is None]
    done = len(records) - len(missing)
    if old := sum(ledger.newest(jobs[key].named) is not None for key in missing):
        reasons = "other code, settings, versions or hardware, or failed"
        print(f"{old} of {len(records)} runs are made again: those that are recorded are of {reasons}")
    bar = tqdm(total=len(records), initial=done, unit=" runs", dynamic_ncols=True)
    with bar, ThreadPoolExecutor(workers) as pool:
        running: dict[Future[dict[str, Any]], Key] = {}
        while missing or running:
            # No more than can run: after a stop, nothing further is begun.
            while missing and len(running) < workers:
                key = missing.pop(0)
                running[pool.submit(jobs[key].make)] = key
                short = (value for value in jobs[key].named.values() if isinstance(value, str | int))
                bar.set_postfix_str(" ".join(map(str, short)))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                records[key] = ledger.add(jobs[key].run, jobs[key].code, future.result())
                bar.update()


def outdated(jobs: Mapping[Key, Job], records: Mapping[Key, Any]) -> list[str]:
    """In words, how many records were not made by the present code and settings, if any."""
    made = [(jobs[key], record) for key, record in records.items() if record is not None]
    old = sum(not Ledger.fits(record, job.run, job.code) for job, record in made)
    return [f"{old} of {len(made)} records are of other code or other settings than the present"] if old else []
