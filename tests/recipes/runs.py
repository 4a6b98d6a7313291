"""What the tests of recipes share: small runs, a run to its end, and all that its future would depend on."""

import dataclasses
import math

import torch
from torchrl.checkpoint import GlobalRNGState
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from fp8rl_torchrl.data import CollectorState
from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.recipes import build
from fp8rl_torchrl.training.checkpoint import PipelineCheckpoints

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")
REPLAYED = {
    "num_envs": 4,
    "frames_per_collection": 16,
    "total_frames": 16 * 4,
    "replay_size": 40,  # so that the oldest transitions are overwritten before the end
    "min_replay": 16,
    "batch_size": 8,
    "updates_per_collection": 3,
    "hidden": (32, 32),
    "precision": "fp32",
    "init_scale": 64.0,
    "device": "cpu",
    "compile": "off",
}
"""A run of four collections and twelve updates that learns from replayed transitions."""


def trained(config):
    """Build and train to the end, and check what holds of every recipe in every precision; the pipeline and reports."""
    pipeline = build(config)
    learned = {name: value.clone() for name, value in pipeline.agent.state_dict().items()}
    reports = list(pipeline)
    assert reports[-1].skipped_steps == 0
    assert reports[-1].updates > 0
    assert all(math.isfinite(value) for value in reports[-1].metrics.values())
    after = pipeline.agent.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], value) for name, value in learned.items())
    fp8 = config.precision.startswith("fp8")
    assert any(isinstance(module, Float8Linear) for module in pipeline.agent.modules()) == fp8
    assert (pipeline.conversion is not None) == fp8
    assert all(scaler.is_enabled() == (config.precision == "fp16") for scaler in pipeline.step.scalers.values())
    return pipeline, reports


def record(pipeline):
    """What the step is given, and each collection with its report, as training goes on."""
    batches, collections = [], []
    update, after = pipeline.step._update, pipeline.after_collection

    def updating(batch, compute_loss):
        batches.append(batch.clone())
        return update(batch, compute_loss)

    def following(rollout, report):
        collections.append((rollout.clone(), report))
        after(rollout, report)

    pipeline.step._update, pipeline.after_collection = updating, following
    return batches, collections


def batch_of(pipeline):
    """A batch from the pipeline's buffer, as the step is given it."""
    return pipeline.replay.sample()


def owned_bits(pipeline, key):
    """What the optimizer of a loss trains and remembers."""
    return bits(
        [[leaf.detach() for leaf in pipeline.step._gradients.leaves[key]], pipeline.step.optimizers[key].state_dict()]
    )


def target_bits(loss):
    """The target networks of a loss."""
    return bits({name: value for name, value in loss.state_dict().items() if name.startswith("target_")})


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
    """All that a pipeline's future depends on, by name; a rollout buffer is filled anew before it is read."""
    replay = pipeline.replay
    read_again = replay is not None and not isinstance(replay.sampler, SamplerWithoutReplacement)
    return {
        name: bits(value)
        for name, value in {
            "parameters": dict(pipeline.agent.state_dict()),
            "loss": {k: v for k, v in pipeline.loss.state_dict().items() if isinstance(v, torch.Tensor)},
            "step": pipeline.step.state_dict(),
            "random streams": GlobalRNGState().state_dict(),
            "collector": CollectorState(pipeline.collector).state_dict(),
            "progress": pipeline.state_dict(),
            "replay": replay[:].flatten_keys(".").to_dict() if read_again else {},
        }.items()
    }


def finish(pipeline):
    """Train to the end; the reports without their times."""
    return [repr(dataclasses.replace(report, seconds=0.0)) for report in pipeline]


def interrupted(config, folder, stopped_after):
    """The reports and the end of a run that was stopped after some collections, and resumed in a new pipeline."""
    stopped, reports = build(config), []
    for report in stopped:
        reports.append(repr(dataclasses.replace(report, seconds=0.0)))
        if len(reports) == stopped_after:
            break
    PipelineCheckpoints(stopped, CollectorState(stopped.collector), folder).save(stopped.frames)
    next(iter(stopped))  # what came after the checkpoint is lost
    resumed = build(dataclasses.replace(config, seed=config.seed + 1))  # nothing may be left of how it was built
    torch.manual_seed(99)
    PipelineCheckpoints(resumed, CollectorState(resumed.collector), folder).load_latest()
    return reports + finish(resumed), resumed


def check_resuming(config, folder, stopped_after=2):
    """A run that was stopped and resumed ends as one that was not, bit for bit; the whole run's pipeline."""
    whole = build(config)
    reports, expected = finish(whole), everything(whole)
    found, resumed = interrupted(config, folder, stopped_after)
    assert found == reports
    actual = everything(resumed)
    for name in expected:
        assert actual[name] == expected[name], name
    return whole
