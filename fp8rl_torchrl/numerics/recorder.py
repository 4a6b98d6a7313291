"""`Recorder`: what each layer's numbers go through while a pipeline trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from fp8rl_torchrl.numerics.diagnosis import Diagnosis, diagnose
from fp8rl_torchrl.numerics.layers import MEASURES, ROLES, Look, look, names_of
from fp8rl_torchrl.numerics.survival import Stepped, watched


@dataclass(frozen=True, kw_only=True)
class OperandNumbers:
    """A layer's input, weight, output or gradient in one update; parts are from 0 to 1."""

    amax: float
    """Its largest magnitude."""
    underflow: float
    """The part of its elements that is zero, but not in FP32."""
    saturation: float
    """The part that lies beyond the format: cut off, infinite or NaN."""
    nonfinite: float
    """The part that is infinite or NaN, as multiplied."""
    reference_nonfinite: float
    """The part that is infinite or NaN in FP32, too."""
    snr_db: float
    """Signal-to-noise ratio against FP32, in dB: infinite where they agree, NaN where one is not finite."""
    reference_zero: bool
    """Whether all of it is zero in FP32."""


@dataclass(frozen=True, kw_only=True)
class LayerNumbers:
    """One linear layer in one update."""

    name: str
    """Its name in the agent; of what the loss keeps by itself, the name of its parameter."""
    format: str
    """What it multiplies in: the name of a precision, such as ``bf16`` or ``fp8-rowwise``."""
    activation: OperandNumbers
    """Its input."""
    weight: OperandNumbers
    """Its weight."""
    output: OperandNumbers
    """Its output, in the format that it is handed on in."""
    gradient: OperandNumbers
    """The gradient of its output, without the loss scale."""
    update_survival: float
    """The part of the intended change of its weight that was applied, from 0 to 1; NaN where none was intended, or
    where it could not be seen because the update was replayed from a CUDA graph."""
    survival_in_fp32: float
    """The same, had the weights been stored in FP32; NaN also where the update was skipped."""
    lost_moments: float
    """The part of Adam's second moments that is zero where FP32 would not be, from 0 to 1; NaN where it could not be
    seen."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was seen of one update."""

    call: int
    """The number of calls of the step before it, since the recorder was attached."""
    frames: int
    """Environment steps collected so far."""
    loss: float
    """The sum of the losses, as it ran."""
    reference_loss: float
    """The same in FP32."""
    loss_scale: float
    """The smallest, where there are several."""
    skipped: bool
    """Whether the update was skipped, by any of its optimizers."""
    layers: tuple[LayerNumbers, ...]
    """In the order in which they ran."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values; what is not finite is None."""
        return _finite(asdict(self))


class Recorder:
    """Looks at one update in so many: the operands of every linear layer as they ran, beside those of an FP32 pass.

    A sampled update costs two more passes of its loss (in FP32 one), run eagerly, also where updates are compiled;
    nothing is read by the host until `samples` or `diagnose` is called. Training does not change by a bit: parameters,
    random state and batches are left alone.

    Args:
        every: One update in this many is looked at, beginning with the first.

    Raises:
        ValueError: If ``every`` is not at least 1.

    Example:
        >>> from fp8rl_torchrl import recipes
        >>> pipeline = recipes.build(recipes.A2CConfig(total_frames=8192, precision="bf16", device="cpu"))
        >>> recorder = Recorder(every=1).attach(pipeline)
        >>> reports = list(pipeline)
        >>> print(recorder.diagnose())
        nothing went wrong in the numbers of the one update that was looked at
    """

    def __init__(self, every: int = 100) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer >= 1; got {every!r}")
        self.every = every
        self._pipeline: Any = None
        self._calls = 0
        self._pending: list[tuple[int, int, Look, dict[str, Stepped], TensorDict]] = []
        self._samples: list[Sample] = []
        self._extremes: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}

    def attach(self, pipeline: Any) -> Recorder:
        """Look on while a pipeline trains, from now on.

        Args:
            pipeline: A `fp8rl_torchrl.Pipeline`.

        Returns:
            The recorder itself.

        Raises:
            RuntimeError: If the recorder is attached already, or another one looks on.
            TypeError: If it is no pipeline.
        """
        if not hasattr(pipeline, "observer"):
            raise TypeError(f"attach takes a fp8rl_torchrl.Pipeline; got a {type(pipeline).__name__}")
        if self._pipeline is not None:
            raise RuntimeError("this recorder is attached to a pipeline already: make another one, or detach it first")
        if pipeline.observer is not None:
            raise RuntimeError("the pipeline has a recorder (or another observer) already: detach that one first")
        self._pipeline = pipeline
        self._names = names_of(pipeline.agent, pipeline.loss)
        pipeline.observer = self
        return self

    def detach(self) -> None:
        """Look no longer; what was seen stays."""
        if self._pipeline is not None:
            self._pipeline.observer = None
            self._pipeline = None

    @property
    def due(self) -> bool:
        """Whether the next update will be looked at."""
        return self._calls % self.every == 0

    @torch.no_grad()
    def collected(self, rollout: TensorDictBase) -> None:
        """See what was collected; called by the pipeline.

        Args:
            rollout: ``[N, T]``.
        """
        following = rollout.get("next")
        seen = {"reward": following.get("reward"), "observation": _observation(following)}
        for name, entry in seen.items():
            if entry is not None and entry.is_floating_point():
                largest = entry.abs().amax().float()  # NaN if one is
                before = self._extremes.get(name)
                self._extremes[name] = largest if before is None else torch.maximum(before, largest)

    def update(self, step: Any, batch: TensorDictBase) -> TensorDict:
        """Perform an update, and look at it if it is its turn; called by the pipeline.

        Args:
            step: The pipeline's `fp8rl_torchrl.OptimStep`.
            batch: What it takes.
        """
        due = self.due
        self._calls += 1
        if not due:
            return step(batch)
        scales = {key: _scale_of(scaler, step.device) for key, scaler in step.scalers.items() if scaler.is_enabled()}
        found = look(step.loss, batch, step.precision, self._names, scales)
        with watched(step.optimizers.values(), self._names) as survived:
            losses = step(batch)
        self._pending.append((self._calls - 1, self._pipeline.frames, found, dict(survived), losses))
        return losses

    def samples(self) -> list[Sample]:
        """What was seen so far, read from the device."""
        for call, frames, found, survived, losses in self._pending:
            skipped = any(bool(losses[key]) for key in losses.keys() if str(key).startswith("skipped"))
            scales = [float(losses[key]) for key in losses.keys() if str(key).startswith("loss_scale")]
            self._samples.append(
                Sample(
                    call=call,
                    frames=frames,
                    loss=float(found.loss),
                    reference_loss=float(found.reference_loss),
                    loss_scale=min(scales),
                    skipped=skipped,
                    layers=tuple(_layers(found, survived)),
                )
            )
        self._pending.clear()
        return list(self._samples)

    def diagnose(self) -> Diagnosis:
        """Say whether the task, the algorithm or the precision went wrong, and in which layer."""
        extremes = {name: float(value) for name, value in self._extremes.items()}
        config = getattr(self._pipeline, "config", None)
        return diagnose(self.samples(), extremes, float(getattr(config, "reward_scale", 1.0)))


def _observation(following: TensorDictBase) -> torch.Tensor | None:
    name = next((name for name in ("observation", "pixels") if name in following.keys()), None)
    return None if name is None else following.get(name)


def _scale_of(scaler: Any, device: torch.device) -> torch.Tensor:
    return scaler.scale(torch.ones((), device=device))


def _layers(found: Look, survived: Mapping[str, Stepped]) -> list[LayerNumbers]:
    layers = []
    for name, format, rows in zip(found.names, found.formats, found.measures.tolist(), strict=True):
        operands: dict[str, Any] = {role: _operand(row) for role, row in zip(ROLES, rows, strict=True)}
        survival, in_fp32, lost = map(float, survived.get(name, (math.nan,) * 3))
        layers.append(
            LayerNumbers(
                name=name,
                format=format,
                update_survival=survival,
                survival_in_fp32=in_fp32,
                lost_moments=lost,
                **operands,
            )
        )
    return layers


def _operand(row: list[float]) -> OperandNumbers:
    seen = dict(zip(MEASURES, row, strict=True))
    count = max(seen["count"], 1.0)
    return OperandNumbers(
        amax=seen["amax"],
        underflow=seen["underflowed"] / count,
        saturation=seen["saturated"] / count,
        nonfinite=seen["nonfinite"] / count,
        reference_nonfinite=seen["reference_nonfinite"] / count,
        snr_db=_decibels(seen["signal"], seen["noise"]),
        reference_zero=seen["signal"] == 0,
    )


def _decibels(signal: float, noise: float) -> float:
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
