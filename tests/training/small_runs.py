"""What the tests of runs share: a small one, what it leaves, and how it is stopped."""

import csv

import torch

from fp8rl_torchrl.data import CollectorState
from fp8rl_torchrl.recipes import ActorCriticConfig, build
from fp8rl_torchrl.training.checkpoint import PipelineCheckpoints
from fp8rl_torchrl.training.run import Run
from fp8rl_torchrl.training.run_folder import RunFolder

CONFIG = ActorCriticConfig(
    num_envs=4,
    frames_per_collection=64,
    total_frames=64 * 8,
    min_replay=128,
    replay_size=256,
    batch_size=16,
    updates_per_collection=3,
    hidden=(8,),
    eval_every=150,
    eval_episodes=2,
    final_eval_episodes=3,
    checkpoint_every=6,
)


class NoLoggers:
    def __init__(self, path):
        pass

    def log(self, row):
        pass

    def close(self):
        pass


def run_in(path, config=CONFIG, on_report=lambda report: None, loggers=NoLoggers):
    folder, pipeline = RunFolder(path), build(config)
    if not path.exists():
        folder.create(config.to_dict())
    checkpoints = PipelineCheckpoints(pipeline, CollectorState(pipeline.collector), folder.checkpoints)
    return Run(pipeline, checkpoints, folder, loggers(path), config, "a run", on_report)


def rows_of(run):
    with run.folder.metrics.open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def saved_frames(run):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.folder.checkpoints.iterdir())


def state_of(run):
    pipeline = run.pipeline
    carrier = pipeline.collector._carrier.flatten_keys(".")
    parts = (pipeline.agent.state_dict(), pipeline.replay[:].flatten_keys(".").to_dict(), carrier.to_dict())
    tensors = {f"{place}.{name}": value.tolist() for place, part in enumerate(parts) for name, value in part.items()}
    return tensors, torch.random.get_rng_state().tolist(), repr(pipeline.step.state_dict())


def stop_at(frames, send):
    def on_report(report):
        if report.frames == frames:
            send()

    return on_report


class Killed(BaseException):
    pass


def killed():
    raise Killed
