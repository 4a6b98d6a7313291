"""What the tests of scripts share: a folder of their own, and a finished run."""

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from programs import SMALL, call, train


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test has a current folder of its own, and gives back the number of threads."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run to copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(None):
        assert call(train, *SMALL, "--total-frames=512", "--lr=0.1", "--seed=1", f"--run-dir={folder}") == 0
    return folder


@pytest.fixture
def run(finished):
    """A finished run in the current folder."""
    shutil.copytree(finished, "run")
    return Path("run")
