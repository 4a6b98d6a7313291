"""The run folder: never overwritten, and a full record of what made it."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import fp8rl_torchrl
from fp8rl_torchrl.training import run_folder
from fp8rl_torchrl.training.run_folder import RunFolder, RunFolderError, made_with, write_json


def test_the_files_of_a_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    names = {name: path.name for name, path in vars(folder).items() if name != "path"}
    assert names == {
        "config": "config.json",
        "metrics": "metrics.csv",
        "summary": "summary.json",
        "curve": "learning_curve.png",
        "conversion": "conversion.json",
        "checkpoints": "checkpoints",
        "best": "best",
    }
    assert not folder.path.exists(), "naming a folder makes none"


def test_create_writes_the_configuration_and_what_it_was_made_with(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "down" / "run")
    folder.create({"env": "CustomEnv", "hidden": (64, 64), "total_frames": None})
    written = json.loads(folder.config.read_text())
    assert written["config"] == {"env": "CustomEnv", "hidden": [64, 64], "total_frames": None}
    assert written["made_with"]["versions"]["torch"] == version("torch")
    assert written["made_with"]["hardware"]["cores"] == os.cpu_count()
    assert folder.read_config() == written["config"]
    assert [path.name for path in folder.path.iterdir()] == ["config.json"]


def test_an_empty_folder_can_be_used(tmp_path):
    RunFolder(tmp_path).create({})
    assert (tmp_path / "config.json").exists()


def test_an_occupied_folder_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match=rf"is not empty; continue it with --resume {tmp_path}, or name another"):
        folder.create({})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thesis.txt", "years of work")]


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(RunFolderError, match="is a file; name a folder"):
        RunFolder(file).create({})
    with pytest.raises(RunFolderError, match=r"cannot be made: .*file is a file"):
        RunFolder(file / "run").create({})
    assert file.read_text() == "not a folder"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    asked = []
    # The superuser may write anywhere, so the answer of the operating system is given here.
    monkeypatch.setattr(run_folder.os, "access", lambda path, mode: asked.append((Path(path), mode)))
    with pytest.raises(RunFolderError, match=rf"no permission to write in {tmp_path}"):
        RunFolder(tmp_path / "a" / "run").create({})
    assert asked == [(tmp_path, os.W_OK)]
    assert list(tmp_path.iterdir()) == []


def test_a_relative_path_is_taken_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunFolder("runs/one").create({})
    assert (tmp_path / "runs" / "one" / "config.json").exists()


def test_a_folder_without_a_configuration_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunFolderError, match=r"is not a run folder: it has no config\.json"):
            RunFolder(path).read_config()


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"3", b"null", b"{}", b'{"config": 3}', b'{"config": "text"}', b'{"config": null}', b"\xff"],
)
def test_a_configuration_that_cannot_be_read_is_an_error_that_names_the_file(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"config\.json cannot be read as a run's configuration"):
        RunFolder(tmp_path).read_config()


def test_run_folder_errors_are_value_errors():
    assert issubclass(RunFolderError, ValueError)


def test_what_it_was_made_with():
    made = json.loads(json.dumps(made_with()))
    assert set(made) == {"versions", "hardware", "commit"}
    assert set(made["versions"]) == {
        "python",
        "fp8rl_torchrl",
        "torch",
        "torchrl",
        "tensordict",
        "gymnasium",
        "numpy",
    }
    assert made["versions"]["python"] == platform.python_version()
    assert made["hardware"]["cpu"]
    assert len(made["hardware"]["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_the_commit_is_that_of_the_checkout():
    checkout = Path(fp8rl_torchrl.__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        assert made_with()["commit"] is None
        return
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    assert head.stdout.startswith(made_with()["commit"].rstrip("+"))


def test_outside_of_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "a" / "b" / "run_folder.py"))
    assert made_with()["commit"] is None


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]
