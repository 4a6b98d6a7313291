"""The last part of a comparison's page: every run in a table, what made them, and the records to download."""

from __future__ import annotations

import base64
import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def section(records: Sequence[Mapping[str, Any]], command: str) -> str:
    """The part.

    Args:
        records: All of them.
        command: What remakes the page.
    """
    counts = ("frames", "updates", "skipped", "wall s, with evaluations", "diverged at")
    header = ("task", "recipe", "mode", "seed", "return", "std", *counts)
    rows = []
    for record in sorted(records, key=lambda each: [str(each["run"][name]) for name in ("task", "mode", "seed")]):
        run = record["run"]
        if record["failure"] is not None:
            continue
        final = record["final"] or {"mean": float("nan"), "std": float("nan")}
        cells = (
            *(run[name] for name in ("task", "recipe", "mode", "seed")),
            f"{final['mean']:.2f}",
            f"{final['std']:.2f}",
            *(record[name] for name in ("frames", "updates", "skipped_steps")),
            f"{record['wall_seconds']:.1f}",
            "" if record["diverged"] is None else record["diverged"],
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    kept = [{key: value for key, value in record.items() if key != "numerics"} for record in records]
    data = base64.b64encode("\n".join(json.dumps(each) for each in kept).encode()).decode()
    made = Counter(map(_made_with, records))
    several = "" if len(made) == 1 else " ({} of them)"
    said = ";\n".join(f"{each}{several.format(runs)}" for each, runs in made.items())
    seconds = median(record["wall_seconds"] for record in records if record["failure"] is None)
    return (
        f"<h2>The runs</h2><p>{len(rows)} runs, {seconds:.0f} s each (median). Made on {html.escape(said)}.</p>"
        f"<p>Remake with <code>{html.escape(command)}</code></p>"
        f'<p><a download="precision_modes.jsonl" href="data:application/jsonl;base64,{data}">Download the records</a> '
        "(without the layers' numbers)</p>"
        f'<details><summary>All runs</summary><div class="scroll"><table><tr>'
        f"{''.join(f'<th>{name}</th>' for name in header)}</tr>{''.join(rows)}</table></div></details>"
    )


def _made_with(record: Mapping[str, Any]) -> str:
    """The machine, the versions and the commit."""
    hardware = record["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{', '.join([hardware['cpu'], *hardware['gpus']])}, with {versions}, commit {record['commit']}"
