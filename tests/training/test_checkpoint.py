"""Checkpoints: a run that was stopped and resumed ends bit-identical to one that was not."""

import dataclasses
import hashlib
import os
import random
import shutil

import numpy as np
import pytest
import torch
from torchrl.checkpoint import Checkpoint, GlobalRNGState

from fp8rl_torchrl.data import CollectorState
from fp8rl_torchrl.recipes import ActorCriticConfig, DQNConfig, build
from fp8rl_torchrl.training.checkpoint import CheckpointError, PipelineCheckpoints, best_checkpoint, latest_checkpoint

COLLECTIONS = 7
CONFIG = ActorCriticConfig(
    num_envs=4,
    frames_per_collection=64,
    total_frames=64 * COLLECTIONS,
    min_replay=128,
    replay_size=256,  # so that it is full, and its oldest transitions are overwritten, before the end
    batch_size=16,
    updates_per_collection=3,
    hidden=(8,),
    lr_decay_updates=20,
    growth_interval=4,  # so that the loss scale changes before and after the checkpoint
    init_scale=64.0,
)


def checkpoints_of(pipeline, directory):
    return PipelineCheckpoints(pipeline, CollectorState(pipeline.collector), directory)


def bits(tree):
    """Tensors of a nested structure as bytes: equal only if every bit is."""
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items() if key != "seconds"}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    return tree


def everything(pipeline):
    """All that a pipeline's future depends on, by name."""
    replay = pipeline.replay
    return bits(
        {
            "parameters": dict(pipeline.agent.state_dict()),
            "step": pipeline.step.state_dict(),
            "learning rate": [group["lr"] for group in pipeline.step.optimizers["loss"].param_groups],
            "replay": replay[:].flatten_keys(".").to_dict(),
            "replay cursor": (len(replay), replay.writer._cursor),
            "random streams": GlobalRNGState().state_dict(),
            "live step": pipeline.collector._carrier.flatten_keys(".").to_dict(),
            "collector": {k: v for k, v in CollectorState(pipeline.collector).state_dict().items() if k != "live_step"},
            "progress": pipeline.state_dict(),
        }
    )


def advance(pipeline, collections):
    for _, report in zip(range(collections), pipeline, strict=False):
        last = report
    return last


def disturb():
    """What another program would have left of the random streams."""
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)


@pytest.mark.parametrize("stopped_after", [1, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_ends_bit_identical(precision, stopped_after, tmp_path):
    config = dataclasses.replace(CONFIG, precision=precision)
    whole = build(config)
    report = advance(whole, COLLECTIONS)
    expected = everything(whole)
    assert report.updates > 6
    assert report.episodes > 0
    if precision == "fp16":
        assert whole.step.scalers["loss"].get_scale() != config.init_scale

    stopped = build(config)
    advance(stopped, stopped_after)
    checkpoints_of(stopped, tmp_path).save(stopped.frames)
    advance(stopped, 1)  # what came after the checkpoint is lost, as if killed

    resumed = build(dataclasses.replace(config, seed=5))  # nothing may be left of how it was built
    disturb()
    checkpoints_of(resumed, tmp_path).load_latest()
    assert resumed.frames == 64 * stopped_after
    again = advance(resumed, COLLECTIONS)
    actual = everything(resumed)
    for name in expected:
        assert actual[name] == expected[name], name
    assert repr(dataclasses.replace(again, seconds=0.0)) == repr(dataclasses.replace(report, seconds=0.0))


class WithoutLiveStep(CollectorState):
    def state_dict(self):
        return {key: value for key, value in super().state_dict().items() if key != "live_step"}


class NothingSaved:
    """Stands in for a component of a checkpoint, and forgets it."""

    def state_dict(self):
        return {"nothing": 0}

    def load_state_dict(self, state_dict):
        pass


@pytest.mark.parametrize("missing", ["live step", "agent and loss", "step", "replay", "progress", "random_streams"])
def test_nothing_that_is_saved_could_be_left_out(missing, tmp_path):
    """Negative twins: a checkpoint that lacks any one thing resumes to another end."""
    config = dataclasses.replace(CONFIG, precision="fp16")
    whole = build(config)
    advance(whole, COLLECTIONS)

    def forgetful(pipeline):
        checkpoints = checkpoints_of(pipeline, tmp_path)
        components = dict(checkpoints.checkpoint.components)
        if missing == "live step":
            components["collector"] = WithoutLiveStep(pipeline.collector)
        elif missing == "agent and loss":  # the networks that act are part of both
            components |= {"agent": NothingSaved(), "loss": NothingSaved()}
        else:
            components[missing] = NothingSaved()
        checkpoints.checkpoint = Checkpoint(**components)
        return checkpoints

    stopped = build(config)
    advance(stopped, 4)
    forgetful(stopped).save(stopped.frames)
    resumed = build(dataclasses.replace(config, seed=5))
    forgetful(resumed).load_latest()
    advance(resumed, COLLECTIONS)
    assert everything(resumed) != everything(whole)


def test_target_networks_are_saved(tmp_path):
    """They are part of the loss alone; a checkpoint without it resumes with those of a new one."""
    config = DQNConfig(
        env="CartPole-v1",
        num_envs=4,
        frames_per_collection=16,
        total_frames=16 * 5,
        min_replay=16,
        batch_size=8,
        updates_per_collection=2,
        hidden=(8,),
        lr=0.01,
        target_rate=0.2,
    )

    def networks(pipeline):
        return bits({name: value for name, value in pipeline.loss.state_dict().items() if "params" in name})

    whole = build(config)
    advance(whole, 5)
    stopped = build(config)
    advance(stopped, 2)
    checkpoints_of(stopped, tmp_path).save(stopped.frames)
    ends = []
    for forgotten in (False, True):
        resumed = build(dataclasses.replace(config, seed=5))
        checkpoints = checkpoints_of(resumed, tmp_path)
        if forgotten:
            checkpoints.checkpoint = Checkpoint(**checkpoints.checkpoint.components | {"loss": NothingSaved()})
            shutil.rmtree(tmp_path)
            other = checkpoints_of(stopped, tmp_path)
            other.checkpoint = Checkpoint(**other.checkpoint.components | {"loss": NothingSaved()})
            other.save(stopped.frames)
        checkpoints.load_latest()
        restored = networks(resumed)
        advance(resumed, 5)
        ends.append((restored == networks(stopped), networks(resumed) == networks(whole)))
    assert ends == [(True, True), (False, False)]


def test_training_on_after_a_restore_leaves_the_checkpoint_as_it_is(tmp_path):
    """What is loaded must not be a view of the files: updates in place would reach them."""
    pipeline = build(CONFIG)
    advance(pipeline, 3)
    saved = checkpoints_of(pipeline, tmp_path).save(pipeline.frames)

    def digests():
        files = sorted(path for path in saved.rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digests()
    assert len(before) > 10
    checkpoints_of(pipeline, tmp_path).load_latest()
    advance(pipeline, COLLECTIONS)
    assert digests() == before


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    pipeline = build(CONFIG)
    checkpoints = checkpoints_of(pipeline, tmp_path)
    for _ in pipeline:
        checkpoints.save(pipeline.frames)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000000000384", "checkpoint-000000000448"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-000000000448"


def test_saving_the_same_frames_again_replaces_the_checkpoint(tmp_path):
    pipeline = build(CONFIG)
    advance(pipeline, 1)
    checkpoints = checkpoints_of(pipeline, tmp_path)
    assert checkpoints.save(pipeline.frames) == checkpoints.save(pipeline.frames)
    assert len(list(tmp_path.iterdir())) == 1


def test_notes_are_kept_in_the_manifest(tmp_path):
    pipeline = build(CONFIG)
    advance(pipeline, 1)
    path = checkpoints_of(pipeline, tmp_path).save(64, metadata={"eval_return": 3.5})
    assert Checkpoint.manifest(path)["metadata"] == {"eval_return": 3.5}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["publishing", "removing"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking a process that has threads
def test_a_save_that_is_killed_half_way_leaves_whole_checkpoints(moment, tmp_path, monkeypatch):
    pipeline = build(CONFIG)
    checkpoints = checkpoints_of(pipeline, tmp_path)
    for _ in range(2):
        advance(pipeline, 1)
        checkpoints.save(pipeline.frames)
    expected = everything(pipeline)

    def die(*paths):
        if moment == "publishing" or ".delete-" in paths[0].name:
            os._exit(9)

    python_stream = random.getstate()
    process = os.fork()
    if process == 0:
        random.setstate(python_stream)  # Python seeds its stream anew in a forked process
        name = "_publish_path" if moment == "publishing" else "_remove_path"
        monkeypatch.setattr(Checkpoint, name, staticmethod(die))
        checkpoints.save(pipeline.frames + 64)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".checkpoint-")]) == 1
    # Published is what had been written completely: the old one before, the new one after.
    frames = 128 if moment == "publishing" else 192
    assert latest_checkpoint(tmp_path).name == f"checkpoint-{frames:012d}"

    advance(pipeline, 1)
    checkpoints.load_latest()
    assert everything(pipeline) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"checkpoint-{frames - 64:012d}",
        f"checkpoint-{frames:012d}",
    ]


def test_folders_that_are_no_checkpoints_are_ignored(tmp_path):
    pipeline = build(CONFIG)
    advance(pipeline, 1)
    checkpoints_of(pipeline, tmp_path).save(64)
    (tmp_path / "notes").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-000000000064"
    checkpoints_of(pipeline, tmp_path).load_latest()
    assert (tmp_path / "notes").is_dir()


@pytest.mark.parametrize("exists", [True, False])
def test_without_a_checkpoint_there_is_nothing_to_restore(exists, tmp_path):
    directory = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoints_of(build(CONFIG), directory).load_latest()
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        latest_checkpoint(directory)


@pytest.mark.parametrize(
    "changes", [{"hidden": (16,)}, {"hidden": (8, 8)}, {"shared": False}, {"env": "CartPole-v1"}, {"replay_size": 512}]
)
def test_a_checkpoint_of_another_configuration_does_not_fit(changes, tmp_path):
    pipeline = build(CONFIG)
    advance(pipeline, 3)
    checkpoints_of(pipeline, tmp_path).save(pipeline.frames)
    other = build(dataclasses.replace(CONFIG, **changes))
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoints_of(other, tmp_path).load_latest()


@pytest.mark.parametrize("damage", ["truncated", "removed", "emptied"])
@pytest.mark.parametrize("component", ["agent", "step", "replay", "progress", "random_streams", "collector"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(component, damage, tmp_path):
    pipeline = build(CONFIG)
    advance(pipeline, 3)
    path = checkpoints_of(pipeline, tmp_path).save(pipeline.frames)
    files = [p for p in path.glob(f"components/*-{component}/**/*") if p.is_file() and p.stat().st_size]
    for file in files:
        if damage == "removed":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage == "truncated" else b"")
    with pytest.raises(CheckpointError, match=r"checkpoint-000000000192 does not fit"):
        checkpoints_of(build(CONFIG), tmp_path).load_latest()


def test_a_damaged_newest_checkpoint_is_not_passed_over(tmp_path):
    pipeline = build(CONFIG)
    checkpoints = checkpoints_of(pipeline, tmp_path)
    older, newest = (checkpoints.save(advance(pipeline, 1).frames) for _ in range(2))
    assert latest_checkpoint(tmp_path) == newest
    manifest = next(newest.glob("*manifest*"))
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match=rf"{newest.name}, the newest .*damaged.*remove it .*{older.name}"):
        checkpoints_of(build(CONFIG), tmp_path).load_latest()
    shutil.rmtree(newest)
    checkpoints_of(build(CONFIG), tmp_path).load_latest()
    shutil.rmtree(older)
    newest.mkdir()
    for find in (latest_checkpoint, best_checkpoint):
        with pytest.raises(CheckpointError, match="there is no older one"):
            find(tmp_path)


def test_a_gymnasium_environment_resumes_at_fresh_episodes(tmp_path):
    config = dataclasses.replace(CONFIG, env="gymnasium:CartPole-v1")
    stopped = build(config)
    advance(stopped, 3)
    checkpoints_of(stopped, tmp_path).save(stopped.frames)
    expected = everything(stopped)

    resumed = build(dataclasses.replace(config, seed=5))
    checkpoints_of(resumed, tmp_path).load_latest()
    actual = everything(resumed)
    for name in ("parameters", "step", "replay", "replay cursor", "progress"):
        assert actual[name] == expected[name], name
    rollout = next(iter(resumed.collector))
    assert rollout["step_count"][:, 0].eq(0).all()
    report = advance(resumed, COLLECTIONS)
    assert report.frames == config.total_frames
