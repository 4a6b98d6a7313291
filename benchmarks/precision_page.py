"""The answer on one page: self-contained HTML that opens from disk, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import page_style
import precision_figures
import precision_heatmaps
import precision_runs
from negative_controls import CONTROLS
from precision_records import TaskResults
from scores import LEVEL, iqm
from verdicts import MIN_SEEDS, ModeRuns, Verdict, in_words

WIDER = ' Other networks and batches have other answers: see <a href="#widths">widths and batches</a>.'
"""What must not be read into it."""
READING = """<p class=quiet><b>Equivalent within 5% (even 1%)</b>: the difference from FP32 is shown, at 95%, to be less
than 5% (in fact 1%) of the way from random actions to solved, both at the end and over training (the mean of all
evaluations).
<b>Negative controls</b> are wrong on purpose: a task on which they do well cannot tell. <b>fp8</b> has a scale for each
row, <b>fp8-tensorwise</b> one for each tensor.</p>"""
"""How the summary is read."""


def page(
    results: Sequence[TaskResults],
    records: Sequence[Mapping[str, Any]],
    layers: Sequence[Mapping[str, Any]],
    command: str,
) -> str:
    """The page.

    Args:
        results: What the records say of each task.
        records: All of them, for the raw table and its download.
        layers: Records of ``linear.py``, for the map of widths and batches; empty leaves it out.
        command: What remakes the page.
    """
    title = "Which precision should I use?"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{page_style.STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        f"<p>{_text(_made_on(results))}{WIDER if layers else ''}</p>",
        _summary(results),
        READING,
        _all_tasks(results),
        *(_task(result) for result in results),
        _map(layers),
        _how(results[0].margin),
        precision_runs.section(records, command),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _made_on(results: Sequence[TaskResults]) -> str:
    """Where, by what and how; what is said below holds there."""
    records = [record for result in results for own in result.records.values() for record in own]
    hardware, device = records[0]["hardware"], records[0]["run"]["config"]["device"]
    machine = f"an {hardware['gpus'][0]}" if device.startswith("cuda") else f"one core of a CPU ({hardware['cpu']})"
    recipes = " and ".join(dict.fromkeys(result.recipe.upper() for result in results))
    emulated = any(result.emulated for result in results)
    note = " FP8 is emulated in software, so that its speed says nothing of FP8 hardware." if emulated else ""
    if not device.startswith("cuda") and any("fp16" in result.runs for result in results):
        note += " CPUs without instructions for FP16 are slow in it."
    networks = " and ".join(dict.fromkeys(result.hidden for result in results))
    seeds = in_words(min(len(result.runs[result.reference].seeds) for result in results))
    trained = f"Trained by {recipes}, hidden layers {networks}, {seeds} of each mode, on {machine}"
    return f"{trained}; speeds and memory are in units of {results[0].reference}'s there.{note}"


def _summary(results: Sequence[TaskResults]) -> str:
    lines = []
    for result in results:
        kind = "advice" if result.verdict.sensitive else "advice unsure"
        judged = [verdict for verdict in result.verdict.verdicts if verdict.kind != "reference"]
        skipped = {mode: _skipped(own) for mode, own in result.records.items()}
        each = "".join(_in_a_line(own, skipped[own.mode], result.verdict.sensitive is not False) for own in judged)
        said = f"<b>{_text(result.task)}</b>: {_text(result.verdict.advice)}"
        lines.append(f'<div class="{kind}">{said}<ul>{each}</ul></div>')
    return "\n".join(lines)


def _in_a_line(verdict: Verdict, skipped: float, telling: bool) -> str:
    """Such as "bf16: equivalent to FP32 within 5%, 1.6× the speed, 0.9× the memory".

    It is good news (in green) only where the task can tell.
    """
    kind = verdict.kind.split()[0] if telling else "quiet"
    costs = f"{verdict.speed:.2g}× the speed, {verdict.memory:.2g}× the memory"
    control = " (negative control)" if verdict.mode in CONTROLS else ""
    # Its speed says little, for a skipped update is a short one.
    lost = f"; {skipped:.0%} of its updates were skipped" if skipped > 0.05 else ""
    said = f'<span class="{kind}">{_text(verdict.words)}</span>'
    return f"<li><b>{_text(verdict.mode)}</b>{control}: {said}, {costs}{lost}</li>"


def _skipped(records: Sequence[Mapping[str, Any]]) -> float:
    """The part of all updates."""
    skipped, applied = (sum(each[name] for each in records) for name in ("skipped_steps", "updates"))
    return skipped / max(skipped + applied, 1)


def _all_tasks(results: Sequence[TaskResults]) -> str:
    if len(results) < 2:
        return ""
    figure = page_style.figure(
        precision_figures.profiles(results), "profiles", "The further to the right, the better; 95 % intervals."
    )
    return f'<h2>All tasks</h2><div class="figures">{figure}</div>'


def _task(result: TaskResults) -> str:
    rows = []
    for verdict in result.verdict.verdicts:
        runs, own = result.runs[verdict.mode], result.records[verdict.mode]
        products = own[0]["products"]
        shares = ", ".join(f"{share:.0%} {format}" for format, share in sorted(products.items(), key=lambda p: -p[1]))
        returns = [each["final"]["mean"] for each in own if each["final"]]
        kind = verdict.kind.split()[0]
        rows.append(
            f"<tr><td><b>{_text(verdict.mode)}</b></td>"
            f'<td class="{kind}">{_text(verdict.words)}</td>'
            f'<td class="number">{f"{iqm(returns):.1f}" if returns else "-"}</td>'
            f'<td class="number">{iqm(runs.final):.3f}</td><td class="number">{verdict.speed:.2f}×</td>'
            f'<td class="number">{verdict.memory:.2f}×</td>'
            f'<td class="number">{sum(each["skipped_steps"] for each in own)}</td>'
            f'<td class="number">{_if_enough(verdict.improvement, verdict, runs)}</td>'
            f'<td class="number">{_resolved(verdict)}</td><td>{_text(shares)}</td></tr>'
        )
    header = (
        "<tr><th>mode</th><th>verdict</th><th class=number>return, IQM</th><th class=number>score, IQM</th>"
        "<th class=number>speed</th><th class=number>memory</th><th class=number>skipped, in all</th>"
        "<th class=number>P(better)</th><th class=number>resolves</th><th>FLOPs of linear layers, by format</th></tr>"
    )
    seeds = len(next(iter(result.runs.values())).seeds)
    figures = [
        page_style.figure(figure, f"{result.task} {name}", _caption(name, seeds))
        for name, figure in precision_figures.drawn(result).items()
    ]
    said = _diagnoses(result) + _unseen(result)
    return (
        f"<h2>{_text(result.task)} <small>({_text(result.recipe)}, {result.hidden}, {in_words(seeds)})</small></h2>"
        f"<p>{_text(result.sensitive_words)}</p>"
        f'<div class="scroll"><table>{header}{"".join(rows)}</table></div>{said}'
        f'<div class="figures">{"".join(figures)}</div>'
    )


def _if_enough(value: float, verdict: Verdict, runs: ModeRuns) -> str:
    """A number that means something only against the reference, and with enough seeds."""
    return "-" if verdict.kind == "reference" or len(runs.seeds) < MIN_SEEDS else f"{value:.2f}"


def _resolved(verdict: Verdict) -> str:
    """The smallest margin, where equivalence is the question."""
    asked = verdict.kind in ("equivalent", "cannot tell") and verdict.smallest_margin < float("inf")
    return f"{verdict.smallest_margin:.1%}" if asked else "-"


def _diagnoses(result: TaskResults) -> str:
    """What the recorder said of each mode: how many runs showed a fault, and that of the first."""
    lines = []
    for mode, own in result.records.items():
        if (share := _skipped(own)) > 0.5:
            lines.append(f"<li><b>{_text(mode)}</b>: {share:.0%} of its updates were skipped</li>")
        found = [each["diagnosis"] for each in own if not each["diagnosis"].startswith("nothing went wrong")]
        if found:
            runs = f"a fault in {len(found)} of {len(own)} runs"
            lines.append(f"<li><b>{_text(mode)}</b>: {runs}; in the first, {_text(_by_number(result, found[0]))}</li>")
    if not lines:
        return "<p class=quiet>The updates that were looked at showed no fault.</p>"
    return f"<details open><summary>What the layers' numbers showed</summary><ul>{''.join(lines)}</ul></details>"


def _unseen(result: TaskResults) -> str:
    """Which modes have no heat map, since there is nothing to see on it."""
    drawn = precision_figures.drawn(result)
    clean = {
        measure: [mode for mode in result.records if f"{measure} in {mode}" not in drawn]
        for measure in ("underflow", "saturation")
    }
    listed = ", ".join(f"{place + 1} {name}{size}" for place, (name, size) in enumerate(_layers(result).items()))
    said = [f"no {measure} in {', '.join(modes)}" for measure, modes in clean.items() if modes]
    clean_words = f"Of the operands that were looked at: {'; '.join(said)}. " if said else ""
    return f"<p class=quiet>{_text(clean_words)}Layers: {_text(listed)}.</p>"


def _layers(result: TaskResults) -> dict[str, str]:
    """The names of the layers that were looked at, and their sizes in brackets, where a conversion tells them."""
    records = [each for own in result.records.values() for each in own]
    converted = next((each["conversion"] for each in records if each["conversion"]), None) or {"layers": []}
    sizes = {each["name"]: f" ({each['in_features']} → {each['out_features']})" for each in converted["layers"]}
    return {name: sizes.get(name, "") for name in records[0]["numerics"]["layers"]}


def _by_number(result: TaskResults, words: str) -> str:
    """A sentence with the numbers of the heat maps in place of the layers' long names."""
    layers = {name: place + 1 for place, name in enumerate(_layers(result))}
    for name in sorted(layers, key=len, reverse=True):  # a name can begin with another
        words = words.replace(name, f"layer {layers[name]}")
    return words


def _caption(name: str, seeds: int) -> str:
    captions = {
        "differences": "Circles: score at the end; squares: over training. Bars: what the test of "
        "equivalence looks at, at the level that Holm's correction leaves a mode; where both lie in the grey band, "
        "it is equivalent. Green: equivalent or better, red: worse, ochre: cannot tell.",
        "learning curves": "Deterministic evaluations during training, the reference in black. Dotted: solved.",
        "time to solved": "A dot a seed; a line is the median (of an even number, the higher of the middle two).",
        "time of a frame": "FP8 emulated on a CPU is slower; it says nothing of FP8 hardware.",
        "memory": "Of one update; replay is what is stored at the end. Of activations, lower precisions also keep "
        "casts of weights and inputs, and an FP32 copy of its input for each head.",
        "loss scale and skipped updates": "A line a seed. Gaps: learning had not begun.",
    }
    kind = name.split(" in ")[0]
    words = {
        "underflow": "The part of each operand that is zero, but not in FP32; means.",
        "saturation": "The part of each operand that lies beyond its format; means.",
    }
    return f"{captions.get(name, words.get(kind, ''))} {in_words(seeds).capitalize()}."


def _map(layers: Sequence[Mapping[str, Any]]) -> str:
    """Where each precision pays, over widths and batches."""
    figure = precision_heatmaps.width_by_batch(layers) if layers else None
    if figure is None:
        return ""
    turns, cpu = len(layers[0]["seconds"]), layers[0]["hardware"]["cpu"]
    emulated = any("emulated" in each["products"].values() for each in layers)
    caption = (
        f"Speed of one linear layer, forward and backward, in units of FP32's: above 1 (green) it pays. Medians of "
        f"{turns} turns on {', '.join([cpu, *layers[0]['hardware']['gpus']])}; by linear.py."
        + (" FP8 was emulated, which says nothing of FP8 hardware." if emulated else "")
    )
    shown = page_style.figure(figure, "widths and batches", caption)
    return f'<h2 id="widths">Widths and batches</h2><div class="figures">{shown}</div>'


def _how(margin: float) -> str:
    return f"""<h2>How it is judged</h2><ul>
<li>A score is 0 at the mean return of random actions and 1 where the task counts as solved. A run that diverges scores
0 from there on.</li>
<li><b>Equivalent</b>: on seeds paired with the reference's, two one-sided t-tests show at {LEVEL:.0%} that the mean
difference lies within ±{margin:.0%} of that scale, both at the end and in the area under the learning curve,
Holm-corrected over the modes of a task. <b>Worse</b> or <b>better</b>: an exact sign-flip test shows it for one of
them ("over training" is the area), with the difference of the means. IQM, the interquartile mean, leaves out the
lowest and the highest quarter of the seeds. Everything else is <b>cannot tell</b>; "resolves" is the smallest margin at
which these seeds would have called the mode equivalent. P(better) is the probability that a run of it scores above one
of the reference. Nothing is claimed with fewer than {MIN_SEEDS} seeds.</li>
<li>Negative controls are wrong on purpose: fp16-naive keeps weights and optimizer state in FP16 and begins
without a loss scale; fp8-unscaled casts numbers to FP8 as they come. If none comes out worse, a task cannot tell good
precisions from bad. fp8 has a scale for each row of each product, fp8-tensorwise one for each tensor; e4m3 and e5m2 are
the two formats of FP8.</li>
<li>Speed and memory are medians of ratios to the reference, seed by seed. Speed counts training without evaluations and
without the recorder of the layers' numbers.</li></ul>"""


def _text(words: str) -> str:
    return html.escape(words)
