"""The scripts, called as a user calls them, and what their runs leave behind."""

import importlib.util
import re
import sys
from pathlib import Path

from fp8rl_torchrl.training.metrics import read_metrics

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = (
    *("--num-envs=4", "--frames-per-collection=64", "--min-replay=64", "--updates-per-collection=2", "--batch-size=16"),
    *("--hidden=8", "--eval-episodes=2", "--final-eval-episodes=3", "--eval-every=200", "--device=cpu"),
)


def load(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


train, evaluate, tune = load("train"), load("evaluate"), load("tune")


def call(script, *argv):
    """The exit code of ``main``, also where the parser ends the program itself."""
    try:
        return script.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code


def tree():
    """Every file below the current folder, with its content."""
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(capsys, script, *argv):
    """Call with bad input; returns the message after checking that it is one, and that nothing was written."""
    before = tree()
    assert call(script, *argv) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err + output.out
    assert output.out == ""
    assert tree() == before
    message = " ".join(re.sub(r"[│╭╮╰╯─]|-{5,}", " ", output.err).split())
    assert message
    assert message.lower().count("error") <= 2, "one message"
    return message


def metrics_without_time(folder):
    rows = read_metrics(Path(folder) / "metrics.csv")
    return repr([{name: value for name, value in row.items() if name != "seconds"} for row in rows])


def newest(folder):
    return max(Path(folder, "checkpoints").glob("checkpoint-*"))
