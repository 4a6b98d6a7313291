"""What every test shares."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Tests run side by side, one core each; two threads that wait for one core spin.
torch.set_num_threads(1)
logging.getLogger("torchrl").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module="torchrl")

# What tests share lies in a module beside them, which they import by its own name, as in `from losses import adam`.
# These folders, and that of the benchmarks, stand at the end of the path, so that such a name never hides an installed
# package.
sys.path.extend(str(folder) for folder in sorted(Path(__file__).parent.iterdir()) if folder.is_dir())
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

_deselected = pytest.StashKey[int]()


# The next three carry the number of deselected tests from pytest-xdist's workers into the summary line, where pytest
# itself would print it: a path that is not run should be seen.
def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        config = items[0].config
        config.stash[_deselected] = config.stash.get(_deselected, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["deselected"] = session.config.stash.get(_deselected, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:  # every worker deselects the same tests
    reporter = node.config.pluginmanager.get_plugin("terminalreporter")
    count = getattr(node, "workeroutput", {}).get("deselected", 0)
    if reporter is not None and "deselected" not in reporter.stats and count:
        reporter.stats["deselected"] = [SimpleNamespace()] * count


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none here")
