"""A file of records that a benchmark goes on with: what has been done is not done again.

A record is found again if it is of the same run, made by the same code with the same versions on the same processor.
The code is told by what is in its files, and not by the commit: that changes with every word of documentation, and
says nothing about files that were changed since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timing import write_records

from fp8rl_torchrl.training.run_folder import made_with

ROOT = Path(__file__).resolve().parents[1]


def digest(files: Iterable[Path]) -> str:
    """Twelve hexadecimal digits that stand for the names and contents of some files."""
    found = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        found.update(f"{file.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return found.hexdigest()[:12]


def package_files() -> list[Path]:
    """The files of the package."""
    return list((ROOT / "fp8rl_torchrl").rglob("*.py"))


class Ledger:
    """The records in a file, a line of JSON each.

    Args:
        path: The file; it need not exist. A line that a kill cut short is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        self._ends = text.endswith("\n") or not text
        self.records = list(_parsed(text))
        self.made_with = made_with()

    def find(self, run: dict[str, Any], code: str) -> dict[str, Any] | None:
        """The newest record of a run that did not fail, made by the same code on the same processor.

        Args:
            run: All that the result depends on, but for code, versions and hardware.
            code: What stands for the code.
        """
        here = self.made_with["versions"], self.made_with["hardware"]["cpu"]
        for record in reversed(self.records):
            there = record["versions"], record["hardware"]["cpu"]
            if record["failure"] is None and there == here and self.fits(record, run, code):
                return record
        return None

    def newest(self, named: dict[str, Any]) -> dict[str, Any] | None:
        """The newest record whose run is called so, whatever it was made with."""
        found = (record for record in reversed(self.records) if named.items() <= record["run"].items())
        return next(found, None)

    @staticmethod
    def fits(record: dict[str, Any], run: dict[str, Any], code: str) -> bool:
        """Whether a record is of a run by some code."""
        return record["code"] == code and record["run"] == json.loads(json.dumps(run))

    def add(self, run: dict[str, Any], code: str, result: dict[str, Any]) -> dict[str, Any]:
        """Append a record to the file; it is there when this returns.

        Returns:
            The record.
        """
        if not self._ends:
            with self.path.open("a") as file:
                file.write("\n")
            self._ends = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = json.loads(json.dumps({"run": run, **result, "code": code, **self.made_with}))
        write_records(self.path, [record])
        self.records.append(record)
        return record


def _parsed(text: str) -> Iterable[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
