"""The run folder: where a run lives, what it was made with, and how it ended."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fp8rl_torchrl.training.metrics import write_atomically

_PACKAGES = ("fp8rl_torchrl", "torch", "torchrl", "tensordict", "gymnasium", "numpy")


class RunFolderError(ValueError):
    """A run folder cannot be made, or is not one."""


class RunFolder:
    """The files of one run, by name.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.csv"
        self.summary = self.path / "summary.json"
        self.curve = self.path / "learning_curve.png"
        self.conversion = self.path / "conversion.json"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"

    def refuse_if_occupied(self) -> None:
        """Make sure that a new run would overwrite nothing.

        Raises:
            RunFolderError: If the path is a file, cannot be written, or is a folder that is not empty.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file; name a folder for the run")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise RunFolderError(f"{self.path} is not empty; continue it with --resume {self.path}, or name another")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir():
            raise RunFolderError(f"{self.path} cannot be made: {parent} is a file")
        if not os.access(parent, os.W_OK):
            raise RunFolderError(f"{self.path} cannot be made: no permission to write in {parent}")

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the folder and write ``config.json``: the configuration, the versions and the hardware."""
        self.refuse_if_occupied()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, {"config": dict(config), "made_with": made_with()})

    def extend(self, config: Mapping[str, Any]) -> None:
        """Write the configuration of a run that is resumed with another budget; what it was made with stays."""
        write_json(self.config, {**json.loads(self.config.read_text()), "config": dict(config)})

    def read_config(self) -> dict[str, Any]:
        """The configuration that the run was started with.

        Raises:
            RunFolderError: If this is not a run folder.
        """
        try:
            return dict(json.loads(self.config.read_text())["config"])
        except FileNotFoundError:
            raise RunFolderError(f"{self.path} is not a run folder: it has no config.json") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunFolderError(f"{self.config} cannot be read as a run's configuration: {error}") from error


def made_with() -> dict[str, Any]:
    """Versions, hardware and commit, as far as they can be known."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "versions": versions,
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpus": gpus, "system": platform.platform()},
        "commit": _commit(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return found.group(1)
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, with ``+`` where it was changed; None outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole, or leave the old one."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
