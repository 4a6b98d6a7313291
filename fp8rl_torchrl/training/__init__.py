"""The optimizer step, the training loop, evaluation, checkpoints and metrics."""

from fp8rl_torchrl.training.evaluate import EvalResult
from fp8rl_torchrl.training.loop import LoopConfig, Pipeline, Report
from fp8rl_torchrl.training.step import OptimStep

__all__ = ["EvalResult", "LoopConfig", "OptimStep", "Pipeline", "Report"]
