"""The optimizer step, the training loop, evaluation, checkpoints and metrics."""

from fp8rl_torchrl.training.step import OptimStep

__all__ = ["OptimStep"]
