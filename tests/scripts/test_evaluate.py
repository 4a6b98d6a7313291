"""`evaluate.py`: what it prints, and what it leaves alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest
from programs import SCRIPTS, call, evaluate, newest, refused, tree


def test_evaluate_prints_one_json_object(run, capsys):
    assert call(evaluate, "run", "--episodes=5", "--json") == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    result = json.loads(output)
    assert len(result["returns"]) == len(result["lengths"]) == result["eval_episodes"] == 5
    mean = math.fsum(result["returns"]) / 5
    assert result["eval_return_mean"] == pytest.approx(mean)
    spread = math.fsum((value - mean) ** 2 for value in result["returns"]) / 5
    assert result["eval_return_std"] == pytest.approx(math.sqrt(spread))

    assert call(evaluate, "run", "--episodes=5", "--json") == 0
    assert json.loads(capsys.readouterr().out) == result, "the same seed, the same episodes"
    assert call(evaluate, "run", "--episodes=5", "--json", "--seed=1") == 0
    assert json.loads(capsys.readouterr().out) != result


def test_evaluate_finds_what_the_run_found_at_its_end(run, capsys):
    assert call(evaluate, "run", "--episodes=3", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    summary = json.loads(Path("run/summary.json").read_text())
    assert result["eval_return_mean"] == summary["eval_return_mean"]
    assert result["eval_return_std"] == summary["eval_return_std"]


def test_evaluate_prints_a_table(run, capsys):
    assert call(evaluate, "run", "--episodes=4", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert call(evaluate, "run", "--episodes=4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"CustomEnv, {newest('run').absolute()}"
    assert lines[1] == "4 episodes"
    table = {line[:15].strip(): line[15:].split() for line in lines[2:]}
    assert table["mean ± std"] == [f"{result['eval_return_mean']:.2f}", "±", f"{result['eval_return_std']:.2f}"]
    assert table["minimum"] == [f"{min(result['returns']):.2f}"]
    assert table["maximum"] == [f"{max(result['returns']):.2f}"]
    assert table["mean length"] == [f"{sum(result['lengths']) / 4:.1f}", "steps"]


def test_evaluate_takes_an_older_checkpoint(run, capsys):
    newest_first = sorted(Path("run/checkpoints").iterdir(), reverse=True)
    results = []
    for checkpoint in newest_first:
        assert call(evaluate, "run", "--episodes=3", "--json", f"--checkpoint={checkpoint}") == 0
        results.append(json.loads(capsys.readouterr().out)["returns"])
    assert len(results) == 2
    assert results[0] != results[1]


def test_evaluate_takes_the_best_policy(run, capsys):
    """Of a run that became worse after it."""
    summary = json.loads(Path("run/summary.json").read_text())
    assert call(evaluate, "run", "--episodes=2", "--json", "--best") == 0
    best = json.loads(capsys.readouterr().out)
    assert best["eval_return_mean"] == summary["best_eval_return"], "the same two episodes as in the run"
    assert call(evaluate, "run", "--episodes=2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["returns"] != best["returns"]
    assert call(evaluate, "run", "--episodes=2", "--best") == 0
    name = f"checkpoint-{summary['best_frames']:012d}"
    assert capsys.readouterr().out.splitlines()[0] == f"CustomEnv, {Path('run/best', name).absolute()}"


def test_evaluate_says_where_there_is_no_best_policy(run, capsys):
    Path("run/best").rename("elsewhere")
    message = refused(capsys, evaluate, "run", "--best")
    expected = "there is no best policy in run/best: one is kept at the first periodic evaluation (eval_every)"
    assert message == f"error: {expected}"
    assert call(evaluate, "run", "--episodes=1") == 0, "the newest is there"


def test_evaluate_leaves_the_run_as_it_is(run):
    before = tree()
    assert call(evaluate, "run", "--episodes=2") == 0
    assert tree() == before


def test_evaluate_records_a_video(run, capsys):
    assert call(evaluate, "run", "--episodes=2", "--video=out.gif") == 0
    assert "video: out.gif" in capsys.readouterr().out
    frames = imageio.imread("out.gif", index=None)
    assert frames.shape[0] > 10
    assert frames.shape[1:] == (240, 600, 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "The run folder. (required)"),
        (["nowhere"], "nowhere is not a run folder: it has no config.json"),
        (["run", "--episodes=0"], "episodes must be >= 1; got 0"),
        (["run", "--episodes=many"], "--episodes: invalid literal for int()"),
        (["run", "--seed=-1"], "seed must lie in [0, 2^32); got -1"),
        (["run", "--checkpoint=banana"], "banana is not a checkpoint"),
        (["run", "--checkpoint=banana", "--best"], "--best and --checkpoint name two policies; leave one out"),
        (["run", "--device=banana"], "device 'banana' cannot be used here"),
        (["run", "--video=out.avi"], "--video takes a .gif or .mp4 file; got out.avi"),
        (["run", "--video=nowhere/out.gif", "--episodes=1"], "does not exist"),
        (["run", "--colour=red"], "Unrecognized options: --colour"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_refuses(argv, message, run, capsys):
    assert message in refused(capsys, evaluate, *argv)


def test_a_script_in_a_process_of_its_own():
    """From any folder, with a clear message and exit code where the input is bad."""
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), "run", "--colour=red"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Unrecognized options: --colour" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(Path().iterdir()) == []
