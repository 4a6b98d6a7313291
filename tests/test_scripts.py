"""The scripts, as a user runs them: what they leave, what they print, and what they refuse."""

import ast
import contextlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchrl.checkpoint import Checkpoint

from fp8rl_torchrl import OptimStep
from fp8rl_torchrl.data import CollectorState
from fp8rl_torchrl.recipes import ActorCriticConfig, build
from fp8rl_torchrl.training.checkpoint import PipelineCheckpoints
from fp8rl_torchrl.training.loop import Report
from fp8rl_torchrl.training.metrics import read_metrics
from fp8rl_torchrl.training.run_folder import RunFolder

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
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


train, evaluate = load("train"), load("evaluate")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test has a current folder of its own, and gives back the number of threads."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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


# ---------------------------------------------------------------------------------------------------------------- train


def test_train_writes_the_run_folder(capsys):
    assert call(train, *SMALL, "--episodes=4", "--report-every=2", "--run-dir=run", "--precision=fp16") == 0
    run = Path("run")
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.json",
        "learning_curve.png",
        "metrics.csv",
        "summary.json",
        "tensorboard",
    ]

    written = json.loads((run / "config.json").read_text())
    options = written["config"]
    assert (options["algo"], options["env"], options["precision"]) == ("actor-critic", "CustomEnv", "fp16")
    assert (options["seed"], options["device"], options["num_envs"], options["hidden"]) == (0, "cpu", 4, [8])
    assert {"fp8rl_torchrl", "torch", "torchrl", "tensordict"} <= set(written["made_with"]["versions"])
    assert {"cpu", "cores", "gpus"} <= set(written["made_with"]["hardware"])

    rows = read_metrics(run / "metrics.csv")
    assert {
        "frames",
        "seconds",
        "episode_return",
        "episode_length",
        "eval_return",
        "loss_actor",
        "loss_critic",
        "loss_entropy",
        "grad_norm",
        "skipped_steps",
        "loss_scale",
    } <= set(rows[0])
    assert [row["frames"] for row in rows] == list(range(64, 64 * len(rows) + 1, 64))
    assert rows[-1]["loss_scale"] > 1
    assert math.isfinite(rows[-1]["loss_actor"])

    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= {
        "eval_return_mean",
        "eval_return_std",
        "eval_episodes",
        "frames",
        "updates",
        "train_seconds",
        "frames_per_second",
        "skipped_steps",
        "stopped_by",
    }
    assert (summary["stopped_by"], summary["eval_episodes"]) == ("episodes", 3)
    assert summary["frames"] == rows[-1]["frames"]
    assert summary["updates"] == rows[-1]["updates"]

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss_actor")] == [row["frames"] for row in rows]
    assert imageio.imread(run / "learning_curve.png").std() > 5
    checkpoints = [path.name for path in (run / "checkpoints").iterdir()]
    assert f"checkpoint-{int(rows[-1]['frames']):012d}" in checkpoints

    output = capsys.readouterr()
    assert "CustomEnv, fp16, seed 0 on cpu, run folder run" in output.out
    assert f"{summary['eval_return_mean']:.1f} ± {summary['eval_return_std']:.1f} over 3 episodes" in output.out
    assert "Traceback" not in output.err


def test_the_average_return_is_printed_every_so_many_episodes(capsys):
    assert call(train, *SMALL, "--episodes=12", "--report-every=4", "--run-dir=run") == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(place for place, line in enumerate(lines) if line.split()[:1] == ["episodes"])
    assert lines[header].split() == ["episodes", "average", "return", "frames", "updates", "skipped"]
    printed = [line.split() for line in lines[header + 1 :] if re.match(r" *\d+ +[\d.]+ +", line)]
    rows = {row["frames"]: row for row in read_metrics("run/metrics.csv")}
    assert [int(line[0]) for line in printed] == [4, 8, 12]
    for _, average, frames, updates, skipped in printed:
        assert 0 < float(average) < 220
        row = rows[int(frames.replace(",", ""))]
        assert int(updates.replace(",", "")) == row["updates"]
        assert int(skipped) == row["skipped_steps"] == 0


def test_each_printed_average_is_that_of_its_own_episodes(capsys):
    config = ActorCriticConfig(episodes=6, report_every=2)
    progress = train.Progress(config)
    # The last episode before the stop returned 5: with the first one after it, 7, it makes the block that ends at 4.
    progress.start_at(frames=30, episodes=3, recent_returns=(1.0, 3.0, 5.0))
    report = Report(
        frames=60, episodes=6, updates=2, seconds=1.0, episode_returns=(7.0, 10.0, 20.0), episode_return=0.0,
        episode_length=0.0, metrics={}, skipped_steps=1,
    )  # fmt: skip
    progress(report)
    progress.bar.close()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert printed == [["4", "6.0", "60", "2", "1"], ["6", "15.0", "60", "2", "1"]]


def test_the_default_prints_every_100_episodes():
    config, _ = train.parse([])
    assert config.report_every == 100
    assert config.episodes == 2000
    assert config.precision == "bf16"


def test_without_a_name_the_folder_is_named_by_what_runs():
    assert call(train, *SMALL, "--total-frames=64", "--seed=3", "--precision=fp32", "--env=fp8rl/CustomEnv-v0") == 0
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"actor-critic-fp8rl-CustomEnv-v0-fp32-s3-\d{8}-\d{6}", folder.name)


def test_the_seed_repeats_a_run_from_the_command_line():
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call(train, *SMALL, "--total-frames=192", f"--seed={seed}", f"--run-dir={name}") == 0
    a, b, c = (metrics_without_time(name) for name in "abc")
    assert a == b != c


def metrics_without_time(folder):
    rows = read_metrics(Path(folder) / "metrics.csv")
    return repr([{name: value for name, value in row.items() if name != "seconds"} for row in rows])


def test_a_gymnasium_environment_trains_and_resumes_at_fresh_episodes_and_says_so(capsys):
    assert call(train, *SMALL, "--env=CartPole-v1", "--total-frames=128", "--run-dir=run") == 0
    assert "fresh episodes" not in capsys.readouterr().out
    assert call(train, "--resume=run", "--total-frames=256") == 0
    expected = "CartPole-v1 keeps state that cannot be restored: training resumes at fresh episodes"
    assert expected in capsys.readouterr().out
    assert [row["frames"] for row in read_metrics("run/metrics.csv")] == [64, 128, 192, 256]


# --------------------------------------------------------------------------------------------------------------- resume


def test_resume_extends_a_run_exactly(capsys):
    assert call(train, *SMALL, "--total-frames=192", "--run-dir=run", "--precision=fp16") == 0
    assert call(train, "--resume", "run", "--total-frames", "384") == 0
    assert "fresh episodes" not in capsys.readouterr().out
    assert call(train, *SMALL, "--total-frames=384", "--run-dir=whole", "--precision=fp16") == 0
    assert metrics_without_time("run") == metrics_without_time("whole")
    same_end("run", "whole")
    assert RunFolder("run").read_config() == RunFolder("whole").read_config()
    ends = [json.loads(Path(name, "summary.json").read_text()) for name in ("run", "whole")]
    timed = ("train_seconds", "frames_per_second")
    ends = [{key: value for key, value in end.items() if key not in timed} for end in ends]
    assert ends[0] == ends[1]


def test_resume_may_repeat_the_options_of_the_run():
    assert call(train, *SMALL, "--total-frames=128", "--run-dir=run") == 0
    assert call(train, *SMALL, "--total-frames=192", "--resume=run") == 0
    assert len(read_metrics("run/metrics.csv")) == 3


def newest(folder):
    return max(Path(folder, "checkpoints").glob("checkpoint-*"))


def end_of(folder):
    """All tensors of a run's newest checkpoint, and the counters; how long it took aside."""
    config = ActorCriticConfig.from_dict(RunFolder(folder).read_config())
    pipeline = build(config)
    PipelineCheckpoints(pipeline, CollectorState(pipeline.collector), RunFolder(folder).checkpoints).load_latest()
    step = pipeline.step.state_dict()
    tensors = {
        **pipeline.agent.state_dict(),
        **{f"replay.{k}": v for k, v in pipeline.replay[:].flatten_keys(".").items()},
        **{f"live step.{k}": v for k, v in pipeline.collector._carrier.flatten_keys(".").items()},
        **{f"moments.{i}.{k}": v for i, s in step["optimizers"]["loss"]["state"].items() for k, v in s.items()},
        "random stream": torch.get_rng_state(),
        "recent": pipeline.state_dict()["recent"],
    }
    counters = (pipeline.frames, pipeline.episodes, int(step["updates"]), int(step["skipped_steps"]), step["scalers"])
    return {name: tensor.tolist() for name, tensor in tensors.items()}, counters


def same_end(left, right):
    (left_tensors, left_counters), (right_tensors, right_counters) = end_of(left), end_of(right)
    assert left_counters == right_counters
    assert left_tensors.keys() == right_tensors.keys()
    assert [name for name in left_tensors if left_tensors[name] != right_tensors[name]] == []


def start_training(*argv):
    """A real process in the current folder."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPTS / "train.py"), *SMALL, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_checkpoint(process, folder, frames=1):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        saved = [int(path.name[-12:]) for path in Path(folder).glob("checkpoints/checkpoint-*")]
        if saved and max(saved) >= frames:
            return
        time.sleep(0.01)
    pytest.fail(f"no checkpoint: {process.communicate()[0]}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_with_a_checkpoint_and_exit_code_130(number):
    process = start_training("--total-frames=1000000", "--run-dir=run", "--checkpoint-every=1000000")
    wait_for_checkpoint(process, "run")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "stopped early; continue with: python scripts/train.py --resume run" in output
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["stopped_by"] == "signal"
    frames = summary["frames"]
    assert newest("run").name == f"checkpoint-{frames:012d}"
    assert read_metrics("run/metrics.csv")[-1]["frames"] == frames

    assert call(train, "--resume=run", f"--total-frames={frames + 128}") == 0
    assert call(train, *SMALL, f"--total-frames={frames + 128}", "--run-dir=whole") == 0
    assert metrics_without_time("run") == metrics_without_time("whole")
    same_end("run", "whole")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_end(precision):
    seed = random.SystemRandom().randrange(10**6)
    print(f"moments of death drawn with seed {seed}")
    moments = random.Random(seed)
    options = ["--total-frames=6400", "--checkpoint-every=6", f"--precision={precision}", "--growth-interval=50"]
    process = start_training(*options, "--run-dir=run")
    for _ in range(3):
        saved = [int(path.name[-12:]) for path in Path("run").glob("checkpoints/checkpoint-*")]
        wait_for_checkpoint(process, "run", frames=max(saved, default=0) + 1)
        time.sleep(moments.uniform(0.0, 1.0))
        process.kill()
        if process.wait() == 0:
            break  # it was faster
        left = sorted(path.name for path in Path("run/checkpoints").iterdir())
        print(f"killed with {left} and {len(read_metrics('run/metrics.csv'))} rows")
        process.stdout.close()
        process = start_training(*options, "--resume=run")
    assert process.wait(timeout=300) == 0
    process.stdout.close()

    whole = start_training(*options, "--run-dir=whole")
    assert whole.wait(timeout=300) == 0
    whole.stdout.close()
    assert len(read_metrics("run/metrics.csv")) == 100
    assert metrics_without_time("run") == metrics_without_time("whole")
    same_end("run", "whole")
    assert not [path for path in Path("run/checkpoints").iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------------------------------------- train, misused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--colour=red"], "Unrecognized options: --colour"),
        (["run"], "Unrecognized options: run"),
        (["--lr=fast"], "--lr: could not convert string to float: 'fast'"),
        (["--lr=0"], "lr must be > 0; got 0.0"),
        (["--num-envs=3"], "frames_per_collection must be a multiple of num_envs; got 1024 and 3"),
        (["--hidden=0"], "hidden must name at least one layer"),
        (["--seed=-1"], "seed must lie in [0, 2^32); got -1"),
        (["--episodes=0"], "episodes must be >= 1"),
        (["--total-frames=0"], "total_frames must be >= 1"),
        (["--precision=banana"], "unknown precision 'banana'; use one of fp32, tf32, bf16, fp16"),
        (["--precision=fp8"], "precision 'fp8' is not available in this version"),
        (["--env=NoSuchEnv-v0"], "there is no environment 'NoSuchEnv-v0'"),
        (["--env=nosuchpackage:Env-v0"], "No module named 'nosuchpackage'"),
        (["--env=Blackjack-v1"], "observations of the space Tuple are not supported"),
        (["--device=banana"], "device 'banana' cannot be used here"),
        (["--device=cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--algo=ppo2"], "unknown algo 'ppo2'; use one of actor-critic"),
        (["--resume=nowhere"], "nowhere is not a run folder: it has no config.json"),
        (["--resume"], "Missing value for argument '--resume'"),
        (["--run-dir=" + "x" * 300], "File name too long"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_train_refuses(argv, message, capsys):
    assert message in refused(capsys, train, *argv)


def test_train_refuses_a_folder_that_is_occupied(capsys):
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("years of work")
    message = refused(capsys, train, *SMALL, "--total-frames=64", "--run-dir=thesis")
    assert message == "error: thesis is not empty; continue it with --resume thesis, or name another"
    assert "thesis/chapter.txt is a file" in refused(capsys, train, "--run-dir=thesis/chapter.txt")
    assert "cannot be made" in refused(capsys, train, "--run-dir=thesis/chapter.txt/run")


def test_train_refuses_wandb_that_is_not_installed_before_it_makes_a_folder(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    assert 'pip install "fp8rl_torchrl[wandb]"' in refused(capsys, train, "--wandb=project", "--run-dir=run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run to copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(None):
        assert call(train, *SMALL, "--total-frames=512", "--lr=0.1", f"--run-dir={folder}") == 0
    return folder


@pytest.fixture
def run(finished):
    """A finished run in the current folder."""
    shutil.copytree(finished, "run")
    return Path("run")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed=5"], "--seed differ from those in run/config.json. Only --total-frames, --episodes may change"),
        (["--hidden=16", "--lr=0.5"], "--hidden, --lr differ"),
        (["--precision=fp32"], "--precision differ"),
        (["--env=CartPole-v1"], "--env differ"),
        (["--run-dir=other"], "--run-dir does not go with --resume"),
        (["--total-frames=0"], "total_frames must be >= 1"),
        (["--colour=red"], "Unrecognized options: --colour"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses_to_resume_with(argv, message, run, capsys):
    assert message in refused(capsys, train, "--resume=run", *argv)


def no_checkpoints():
    newest("run").parent.rename("elsewhere")
    return "there is no checkpoint in run/checkpoints"


def no_manifest():
    for path in Path("run/checkpoints").glob("*/manifest.json"):
        path.unlink()
    return "there is no checkpoint in run/checkpoints"


def torn_checkpoint():
    for path in newest("run").glob("components/*-agent/state.json"):
        path.write_bytes(path.read_bytes()[:100])
    return f"the checkpoint {newest('run')} does not fit this run"


def torn_configuration():
    Path("run/config.json").write_text("{")
    return "run/config.json cannot be read as a run's configuration"


def edited_configuration(old, new, message):
    def edit():
        text = Path("run/config.json").read_text()
        assert old in text
        Path("run/config.json").write_text(text.replace(old, new))
        return message

    return edit


DAMAGES = {
    "no checkpoints": no_checkpoints,
    "no manifest": no_manifest,
    "torn checkpoint": torn_checkpoint,
    "torn configuration": torn_configuration,
    "other algo": edited_configuration(
        '"actor-critic"', '"alchemy"', "unknown algo 'alchemy'; use one of actor-critic"
    ),
    "other option": edited_configuration('"lr":', '"learning_rate":', "unknown options learning_rate"),
    "other kind": edited_configuration('"num_envs": 4', '"num_envs": "4"', "an option has a value of the wrong kind"),
    "other network": edited_configuration('"shared": true', '"shared": false', "does not fit this run"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_train_and_evaluate_refuse_a_damaged_run(damage, run, capsys):
    expected = DAMAGES[damage]()
    assert expected in refused(capsys, evaluate, "run").replace(str(Path.cwd()) + "/", "")
    before = tree()
    assert call(train, "--resume=run") == 2
    output = capsys.readouterr()
    assert expected in output.err.replace(str(Path.cwd()) + "/", "")
    assert "Traceback" not in output.err
    assert output.out == ""
    after = {path: content for path, content in tree().items() if "tensorboard" not in path}
    assert after.items() <= before.items()


# --------------------------------------------------------------------------------------------------------- every option


def documented_options(text):
    """Each option of a help text with its description, without its default."""
    options, current = {}, None
    for line in text.splitlines():
        line = line.strip("│╭╮╰╯─- \t") if not re.match(r"[│ ]*--?[a-z]", line) else line.strip("│ ")
        if match := re.match(r"(?:-h, )?--([a-z0-9-]+)(.*)", line):
            current = match[1]
            placeholder = r"^(, --no-[a-z-]+)?( (\{[^}]*\}(\|[A-Z]+)?|[A-Z]+|\[INT \[INT \.\.\.\]\]))?"
            options[current] = re.sub(placeholder, "", match[2])
        elif not line or line.endswith(("options", "arguments")):
            current = None  # the end of a group
        elif current:
            options[current] += " " + line
    return {name: re.sub(r"\((default|required).*", "", words).strip() for name, words in options.items()}


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_every_option_has_help(name, capsys):
    script = {"train": train, "evaluate": evaluate}[name]
    assert call(script, "--help") == 0
    options = documented_options(capsys.readouterr().out)
    if name == "train":
        config, parsed = train.parse([])
        expected = {*config.to_dict(), *vars(parsed)} - {"config"}
    else:
        expected = {"episodes", "seed", "checkpoint", "device", "json", "video"}
    assert set(options) == {each.replace("_", "-") for each in expected} | {"help"}
    for option, description in options.items():
        assert len(description.split()) >= 2, f"--{option} has no help"


def test_an_option_without_help_would_be_found():
    lines = ["--documented INT  What it is for. (default: 3)", "--bare {None}|STR (default: None)", "--flag, --no-flag"]
    text = "\n".join(f"│ {line} │" for line in lines)
    assert documented_options(text) == {"documented": "What it is for.", "bare": "", "flag": ""}


# ------------------------------------------------------------------------------------------------------------- evaluate


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
        (["run", "--device=banana"], "device 'banana' cannot be used here"),
        (["run", "--video=out.avi"], "--video takes a .gif or .mp4 file; got out.avi"),
        (["run", "--video=nowhere/out.gif", "--episodes=1"], "does not exist"),
        (["run", "--colour=red"], "Unrecognized options: --colour"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_refuses(argv, message, run, capsys):
    assert message in refused(capsys, evaluate, *argv)


# -------------------------------------------------------------------------------------------------------------- compose


def test_compose_is_fifteen_lines():
    """Lines of code: neither blank, nor a comment, nor the docstring."""
    source = (SCRIPTS / "compose.py").read_text()
    docstring, *statements = ast.parse(source).body
    assert isinstance(docstring.value, ast.Constant)
    body = source.splitlines()[statements[0].lineno - 1 :]
    assert len([line for line in body if line.strip() and not line.strip().startswith("#")]) == 15
    assert max(map(len, source.splitlines())) <= 120


def test_compose_trains_in_fp16_with_a_live_scaler(capsys):
    source = (SCRIPTS / "compose.py").read_text()
    shorter = source.replace("200_000", "3_000")
    assert shorter != source
    names = {}
    exec(compile(shorter, "compose.py", "exec"), names)
    step = names["step"]
    assert isinstance(step, OptimStep)
    assert step.precision.name == "fp16"
    assert step.scalers["loss"].is_enabled()
    assert step.scalers["loss"].get_scale() > 1
    assert step.updates > 0
    *reports, result = capsys.readouterr().out.splitlines()
    assert [re.fullmatch(r" *([\d,]+) frames, return .*, loss scale (.*)", line)[1] for line in reports] == [
        "1,024",
        "2,048",
        "3,072",
    ]
    assert all(float(line.rpartition(" ")[2]) > 1 for line in reports)
    assert 0 < float(result) <= 220


def test_a_script_in_a_process_of_its_own():
    """From any folder, with a clear message and exit code where the input is bad."""
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), "run", "--colour=red"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Unrecognized options: --colour" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(Path().iterdir()) == []


def test_checkpoints_are_torchrls():
    """Anyone can read them with TorchRL alone."""
    assert call(train, *SMALL, "--total-frames=64", "--run-dir=run") == 0
    assert set(Checkpoint.manifest(newest("run"))["components"]) == {
        "agent",
        "step",
        "replay",
        "collector",
        "progress",
        "random_streams",
    }
