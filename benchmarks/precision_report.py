"""From the records of a comparison of precisions to its verdicts, a table, figures and a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import precision_figures
import precision_page
from matplotlib.figure import Figure
from precision_records import TaskResults, fp8_share, interval, mode_runs
from scores import LEVEL, iqm
from tables import markdown
from timing import aligned
from verdicts import MIN_SEEDS, TaskVerdict, judge


@dataclass(frozen=True, kw_only=True)
class Report:
    """Shows the records of a comparison (see `resumable.Report`)."""

    reference: str
    """The mode that others are compared with."""
    controls: tuple[str, ...]
    """The modes that must come out worse."""
    margin: float
    """Of equivalence."""
    command: str
    """What remakes the page."""
    layers: Path
    """Records of ``linear.py``, for the map of widths and batches; it need not exist."""
    figures: Path | None = None
    """A folder for every figure of the page."""

    def results(self, records: Mapping[Any, Any]) -> list[TaskResults]:
        """What the records say of each task; only seeds that every mode has count."""
        found = []
        for task, recipe in dict.fromkeys((cell.task, cell.recipe) for cell in records):
            cells = [cell for cell in records if (cell.task, cell.recipe) == (task, recipe)]
            modes = list(dict.fromkeys(cell.mode for cell in cells))
            made = {
                (cell.mode, cell.seed): records[cell]
                for cell in cells
                if records[cell] is not None and records[cell]["failure"] is None
            }
            seeds = [seed for seed in sorted({s for _, s in made}) if all((mode, seed) in made for mode in modes)]
            if not seeds:
                continue
            own = {mode: [made[mode, seed] for seed in seeds] for mode in modes}
            runs = {mode: mode_runs(task, seeds, own[mode]) for mode in modes}
            verdict = judge(runs, self.reference, self.controls, self.margin)
            found.append(
                TaskResults(
                    task=task,
                    recipe=recipe,
                    runs=runs,
                    records=own,
                    verdict=verdict,
                    margin=self.margin,
                    sensitive_words=_sensitive(verdict, self.controls),
                )
            )
        return found

    def table(self, records: Mapping[Any, Any], as_markdown: bool = False) -> str:
        """A row a mode, and a sentence of advice for each task. FLOPs are those of the linear layers' products."""
        costs = ("speed", "memory", "FLOPs in FP8")
        header = ("task", "mode", "seeds", "score: IQM", "95 %", "area", *costs, "p, equivalence", "verdict")
        rows, advice = [], []
        for result in self.results(records):
            for verdict in result.verdict.verdicts:
                runs = result.runs[verdict.mode]
                low, high = interval(runs.final)
                few = len(runs.seeds) < MIN_SEEDS
                rows.append(
                    (
                        result.task,
                        verdict.mode,
                        str(len(runs.seeds)),
                        f"{iqm(runs.final):.3f}",
                        "-" if len(runs.seeds) == 1 else f"{low:.3f} to {high:.3f}",
                        f"{iqm(runs.areas):.3f}",
                        f"{verdict.speed:.2f}×",
                        f"{verdict.memory:.2f}×",
                        f"{fp8_share(result.records[verdict.mode][0]):.0%}",
                        "-" if few or verdict.kind == "reference" else f"{verdict.equivalence:.3f}",
                        verdict.words,
                    )
                )
            advice.append(f"{result.task}: {result.verdict.advice}")
        if not rows:
            return "there is no seed yet that every mode has"
        shown = markdown(header, rows) if as_markdown else aligned(header, rows)
        return "\n".join([shown, "", *advice])

    def complaints(self, records: Mapping[Any, Any]) -> list[str]:
        """Cells that are missing or failed."""
        wrong = []
        runs = Counter((cell.recipe, cell.task) for cell in records)
        missing = Counter((cell.recipe, cell.task) for cell, record in records.items() if record is None)
        for (recipe, task), count in missing.items():
            wrong.append(f"{recipe} on {task}: no record of {count} of {runs[recipe, task]} runs")
        for cell, record in records.items():
            if record is not None and record["failure"] is not None:
                name = f"{cell.recipe} on {cell.task} in {cell.mode}, seed {cell.seed}"
                wrong.append(f"{name}: failed: {record['failure']}")
        return wrong

    def plot(self, records: Mapping[Any, Any], path: Path) -> None:
        """Write the headline figure (PNG and SVG) and the page beside it."""
        results = self.results(records)
        if not results:
            return
        _save(precision_figures.headline(results), path)
        made = [record for record in records.values() if record is not None]
        layers = map(json.loads, self.layers.read_text().splitlines()) if self.layers.exists() else ()
        page = precision_page.page(results, made, list(layers), self.command)
        path.with_suffix(".html").write_text(page, encoding="utf-8")
        print(f"\nthe answer on one page: {path.with_suffix('.html')}")
        if self.figures is not None:
            self.figures.mkdir(parents=True, exist_ok=True)
            for name, figure in _figures(results).items():
                _save(figure, self.figures / name.replace(" ", "_"))


def _save(figure: Figure, path: Path) -> None:
    """As PNG and SVG, whose bytes depend on nothing but the figure."""
    figure.savefig(path.with_suffix(".png"), dpi=150)
    with mpl.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _figures(results: Sequence[TaskResults]) -> dict[str, Figure]:
    """Every figure of the tasks, by a name of its own."""
    drawn = {f"{each.task} {name}": f for each in results for name, f in precision_figures.drawn(each).items()}
    return drawn | {"all tasks profiles": precision_figures.profiles(results)}


def _sensitive(verdict: TaskVerdict, controls: Sequence[str]) -> str:
    if verdict.sensitive is None:
        return "Nothing shows that this task can tell good precisions from bad: that takes a control, and enough seeds."
    if not verdict.sensitive:
        return "No negative control came out worse: this task cannot tell good precisions from bad."
    kinds = {each.mode: each.kind for each in verdict.verdicts if each.mode in controls}
    caught = [mode for mode, kind in kinds.items() if kind == "worse"]
    missed = [mode for mode, kind in kinds.items() if kind != "worse"]
    said = f"{' and '.join(caught)} came out worse (at {LEVEL:.0%}), as a negative control must."
    return f"{said} {' and '.join(missed)} did not: no harm of such faults is seen here." if missed else said
