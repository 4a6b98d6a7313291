"""What the tests of on-policy recipes share: a run to its end, and all that its future would depend on."""

import dataclasses

import torch
from torchrl.checkpoint import GlobalRNGState

from fp8rl_torchrl.data import CollectorState
from fp8rl_torchrl.recipes import build
from fp8rl_torchrl.training.checkpoint import PipelineCheckpoints


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
    return {
        name: bits(value)
        for name, value in {
            "parameters": dict(pipeline.agent.state_dict()),
            "step": pipeline.step.state_dict(),
            "random streams": GlobalRNGState().state_dict(),
            "collector": CollectorState(pipeline.collector).state_dict(),
            "progress": pipeline.state_dict(),
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
