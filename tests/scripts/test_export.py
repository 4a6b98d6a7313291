"""`export.py`: the file it writes, what it prints, and what it refuses."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from programs import SMALL, call, load, newest, refused, train, tree
from torch import nn

import fp8rl_torchrl.training.export as library
from fp8rl_torchrl.recipes import build, config_class
from fp8rl_torchrl.training.checkpoint import best_checkpoint, load_agent
from fp8rl_torchrl.training.export import collect_observations, deterministic_actor
from fp8rl_torchrl.training.policy_file import compare_exported, read_exported
from fp8rl_torchrl.training.run_folder import RunFolder

export = load("export")
NO_ONNX = any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime"))


def policy_of(run, checkpoint=None):
    """The policy of a run and an environment for it, put together from its folder."""
    saved = RunFolder(run).read_config()
    pipeline = build(config_class(saved["algo"]).from_dict(saved))
    load_agent(pipeline.agent, checkpoint or newest(run), "cpu")
    return pipeline.agent.policy, pipeline.env


def test_the_file_does_what_the_newest_policy_does(run, capsys):
    before = tree()
    assert call(export, "run", "--out=policy.pt2", "--episodes=3") == 0
    after = tree()
    assert set(after) - set(before) == {"policy.pt2"}
    assert {name: after[name] for name in before} == before, "the run is left as it is"

    policy, env = policy_of("run")
    observations = collect_observations(policy, env, 3, seed=7)
    action, logits = compare_exported("policy.pt2", deterministic_actor(policy), observations, 1e-6)
    assert (action.same, logits.difference) == (1.0, 0.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"CustomEnv, {newest('run').absolute()}"
    assert lines[1] == f"policy.pt2: torch, fp32, {len(after['policy.pt2']):,} bytes"
    assert lines[3].split() == ["action", "100.00%", "the", "same"]


@pytest.mark.skipif(NO_ONNX, reason='ONNX is not installed: pip install "fp8rl_torchrl[export]"')
def test_onnx_in_bf16_as_json(run, capsys):
    assert call(export, "run", "--format=onnx", "--precision=bf16", "--out=policy.onnx", "--episodes=3", "--json") == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    report = json.loads(output)
    assert (report["path"], report["format"], report["precision"]) == ("policy.onnx", "onnx", "bf16")
    assert report["bytes"] == Path("policy.onnx").stat().st_size
    policy, env = policy_of("run")
    observations = collect_observations(policy, env, 3)
    assert report["observations"] == len(observations)
    got = read_exported("policy.onnx")(observations)
    with torch.no_grad():
        expected = deterministic_actor(policy)(observations)
    share = (got["action"] == expected["action"]).double().mean().item()
    assert report["outputs"][0] == {"name": "action", "same": share, "difference": None, "largest": 1.0}
    assert 0 < report["outputs"][1]["difference"] < 0.05 * report["outputs"][1]["largest"]


def test_an_older_checkpoint_gives_another_file(run):
    oldest = min(Path("run/checkpoints").glob("checkpoint-*"))
    assert call(export, "run", "--out=old.pt2", "--episodes=2", f"--checkpoint={oldest}") == 0
    policy, env = policy_of("run", oldest)
    observations = collect_observations(policy, env, 2)
    compare_exported("old.pt2", deterministic_actor(policy), observations, 1e-6)
    with pytest.raises(ValueError, match="the file does not do what the policy does"):
        compare_exported("old.pt2", deterministic_actor(policy_of("run")[0]), observations, 1e-4)


def test_the_best_policy_can_be_taken(run):
    assert call(export, "run", "--out=best.pt2", "--episodes=2", "--best") == 0
    policy, env = policy_of("run", best_checkpoint("run/best"))
    compare_exported("best.pt2", deterministic_actor(policy), collect_observations(policy, env, 2), 1e-6)


def test_a_policy_trained_in_fp8_is_exported_without_it(capsys):
    options = (*SMALL, "--hidden", "16", "16", "--precision=fp8", "--total-frames=128", "--run-dir=run")
    assert call(train, *options) == 0
    capsys.readouterr()
    assert call(export, "run", "--out=policy.pt2", "--precision=bf16", "--episodes=2") == 0
    assert "1 of the policy's layers multiply in FP8; in the file they do so in bf16." in capsys.readouterr().out
    assert list(read_exported("policy.pt2")(torch.zeros(1, 2))) == ["action", "logits"]


def test_a_file_that_does_something_else_is_refused_and_not_left(run, capsys, monkeypatch):
    trace = library._trace

    def tampered(actor, observation):
        with torch.no_grad():
            next(module for module in actor.modules() if isinstance(module, nn.Linear)).weight.mul_(1.1)
        return trace(actor, observation)

    monkeypatch.setattr(library, "_trace", tampered)
    message = refused(capsys, export, "run", "--out=policy.pt2", "--episodes=2")
    assert message.startswith("error: the file does not do what the policy does: ")


def test_a_file_is_replaced_only_when_asked(run, capsys):
    Path("policy.pt2").write_text("an older file")
    message = refused(capsys, export, "run", "--out=policy.pt2", "--episodes=2")
    assert message.startswith("error: policy.pt2 exists already; name another file, or ")
    assert call(export, "run", "--out=policy.pt2", "--episodes=2", "--overwrite") == 0
    assert read_exported("policy.pt2")(torch.zeros(3, 2))["action"].shape == (3,)


def test_a_run_without_a_checkpoint_is_refused(run, capsys):
    Path("run/checkpoints").rename("elsewhere")
    assert "error: there is no checkpoint in run/checkpoints" in refused(capsys, export, "run", "--out=policy.pt2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out=policy.pt2"], "The run folder. (required)"),
        (["run"], "--out STR The file to write"),
        (["nowhere", "--out=policy.pt2"], "nowhere is not a run folder: it has no config.json"),
        (["run", "--out=policy.pt"], "must end in .pt2 (torch.export) or .onnx (ONNX); got policy.pt"),
        (["run", "--out=policy.pt2", "--format=onnx"], "must end in .onnx; got policy.pt2"),
        (["run", "--out=policy.pt2", "--format=tflite"], "invalid choice"),
        (["run", "--out=policy.pt2", "--precision=fp8"], "invalid choice"),
        (["run", "--out=nowhere/policy.pt2"], "nowhere does not exist"),
        (["run", "--out=policy.pt2", "--checkpoint=banana"], "banana is not a checkpoint"),
        (["run", "--out=policy.pt2", "--best", "--checkpoint=banana"], "--best and --checkpoint name two policies"),
        (["run", "--out=policy.pt2", "--episodes=0"], "episodes must be >= 1; got 0"),
        (["run", "--out=policy.pt2", "--episodes=1", "--tolerance=-1"], "tolerance must be >= 0; got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_export_refuses(argv, message, run, capsys):
    assert message in refused(capsys, export, *argv)
