"""What `train.py` refuses: before it writes anything, and in one message."""

import importlib.util
from pathlib import Path

import pytest
from programs import SMALL, call, evaluate, newest, refused, train, tree


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--colour=red"], "Unrecognized options: --colour"),
        (["run"], "Unrecognized options: run"),
        (["--gamma=fast"], "--gamma: could not convert string to float: 'fast'"),
        (["--lr=0"], "lr must be > 0; got 0.0"),
        (["--num-envs=3"], "frames_per_collection must be a multiple of num_envs; got 1024 and 3"),
        (["--hidden=0"], "hidden must name at least one layer"),
        (["--seed=-1"], "seed must lie in [0, 2^32); got -1"),
        (["--episodes=0"], "episodes must be >= 1"),
        (["--total-frames=0"], "total_frames must be >= 1"),
        (["--precision=banana"], "unknown precision 'banana'; use one of fp32, tf32, bf16, fp16"),
        (["--rollout-precision=auto"], "rollout_precision takes the name of a precision"),
        (["--batch-size=20000"], "batch_size 20000 is more than replay_size 10000 holds"),
        (["--precision=fp8", "--hidden=8"], "nothing to convert: every linear layer would stay in high precision"),
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
    assert "pip install wandb" in refused(capsys, train, "--wandb=project", "--run-dir=run")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed=5"], "as run/config.json has them: leave out --seed. Only --total-frames, --episodes, --target"),
        (["--hidden=16", "--lr=0.5"], "leave out --hidden, --lr."),
        (["--precision=fp32"], "leave out --precision."),
        (["--env=CartPole-v1"], "leave out --env."),
        (["--algo=ppo"], "leave out --algo."),
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
    return "the newest checkpoint, is damaged: its manifest cannot be read"


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
    "other kind": edited_configuration('"num_envs": 4', '"num_envs": "4"', "takes an integer"),
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
