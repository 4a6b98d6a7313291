"""Precisions that are wrong on purpose: what a comparison must be able to call worse."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fp8rl_torchrl import Pipeline
from fp8rl_torchrl.precision import quantize
from fp8rl_torchrl.recipes import RecipeConfig

CONTROLS = {"fp16-naive": "fp16", "fp8-unscaled": "fp8"}
"""Each, and the precision that it spoils."""


def configured(mode: str, config: RecipeConfig) -> RecipeConfig:
    """A configuration for a mode: a precision, or a control."""
    options: dict[str, Any] = {"precision": CONTROLS.get(mode, mode)}
    if mode == "fp16-naive":
        options |= {"init_scale": 1.0, "growth_interval": 10**9}
    return dataclasses.replace(config, **options)


def spoil(mode: str, pipeline: Pipeline) -> None:
    """Make a control of a pipeline; a mode that is none is left alone.

    ``fp16-naive`` keeps weights and optimizer state in FP16 and does not scale the loss: what comes of calling
    ``.half()``. ``fp8-unscaled`` casts to FP8 as the numbers come. It holds for the rest of the process.
    """
    if mode == "fp16-naive":
        for optimizer in pipeline.step.optimizers.values():
            optimizer.register_step_post_hook(_store_in_fp16)
    elif mode == "fp8-unscaled":
        quantize.scale_for = _one_for


@torch.no_grad()
def _store_in_fp16(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for stored in (parameter, *optimizer.state.get(parameter, {}).values()):
                if torch.is_tensor(stored) and stored.shape == parameter.shape:
                    stored.data.copy_(stored.data.half())


def _one_for(amax: torch.Tensor, format: Any, power_of_two: bool = True) -> torch.Tensor:
    return torch.where(amax < float("inf"), 1.0, float("nan"))
