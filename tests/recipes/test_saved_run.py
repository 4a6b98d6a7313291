"""`open_run`: a run's networks come back as its checkpoints have them."""

import pytest
import torch

from fp8rl_torchrl.data import CollectorState
from fp8rl_torchrl.recipes import PPOConfig, build
from fp8rl_torchrl.recipes.saved_run import open_run
from fp8rl_torchrl.training.checkpoint import BestPolicy, CheckpointError, PipelineCheckpoints
from fp8rl_torchrl.training.run_folder import RunFolder, RunFolderError

CONFIG = PPOConfig(
    total_frames=96, num_envs=4, frames_per_collection=32, batch_size=16, hidden=(16,), device="cpu", precision="fp32"
)


def bits(pipeline):
    return {name: value.clone() for name, value in pipeline.agent.state_dict().items()}


def same(some, others):
    assert some.keys() == others.keys()
    return all(torch.equal(some[name], others[name]) for name in some)


@pytest.fixture
def run(tmp_path):
    """A run with its best policy after one collection, and checkpoints after one and after three."""
    folder = RunFolder(tmp_path / "run")
    pipeline = build(CONFIG)
    folder.create(pipeline.config.to_dict())
    checkpoints = PipelineCheckpoints(pipeline, CollectorState(pipeline.collector), folder.checkpoints)
    best, states, paths = BestPolicy(pipeline.agent, folder.best), [], []
    for report in pipeline:
        states.append(bits(pipeline))
        paths.append(checkpoints.save(report.frames))
        best.offer(-float(report.frames), report.frames)  # the first is the best
    assert not same(states[0], states[-1])
    return folder, states, paths


def test_the_newest_the_best_or_a_named_checkpoint(run):
    folder, states, paths = run
    newest, best, named = open_run(folder.path), open_run(folder.path, best=True), open_run(folder.path, paths[1])
    for opened, state in ((newest, states[2]), (best, states[0]), (named, states[1])):
        assert same(bits(opened.pipeline), state)
        assert opened.pipeline.frames == 0
    assert (newest.checkpoint, named.checkpoint) == (paths[2], paths[1])
    assert best.checkpoint.parent == folder.best


def test_options_may_be_set_otherwise(run):
    folder, states, _ = run
    opened = open_run(folder.path, seed=9, num_envs=2)
    assert (opened.config.seed, opened.pipeline.env.batch_size) == (9, torch.Size([2]))
    assert same(bits(opened.pipeline), states[2])


def test_what_cannot_be_opened_is_refused(run, tmp_path):
    folder, _, paths = run
    with pytest.raises(ValueError, match="--best and --checkpoint name two policies"):
        open_run(folder.path, paths[0], best=True)
    with pytest.raises(RunFolderError, match="is not a run folder"):
        open_run(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        open_run(folder.path, tmp_path)
