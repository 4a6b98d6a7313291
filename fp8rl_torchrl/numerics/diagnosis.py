"""From what was seen of a run to words: was it the task, the algorithm or the precision, and in which layer?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fp8rl_torchrl.numerics.recorder import LayerNumbers, OperandNumbers, Sample

LARGEST_REWARD = 1e4
"""A larger one (after scaling) is a fault of the task: squared errors of its returns lie beyond FP16's range many times
over, and a single one outweighs everything else that a network learns."""
LARGEST_WEIGHT = 30.0
"""Weights begin near 1; one that has grown to this comes of steps that are too large."""
MOST_UNDERFLOW = 0.5
"""The part of an operand that may vanish."""
LEAST_SNR = 3.0
"""Signal-to-noise ratio in dB under which an operand says more about rounding than about the data."""
LEAST_SURVIVAL = 0.5
"""The part of the intended change that must arrive."""
MOST_LOST_MOMENTS = 0.01
"""The part of Adam's second moments that may be zero though the first is not: in FP32 none is."""
MOST_SKIPPED = 0.5
"""The part of the updates that may be skipped."""

FORWARD = ("activations", "weights", "outputs")
ROLES = (*FORWARD, "gradients")

Cause = Literal["none", "task", "algorithm", "precision"]


@dataclass(frozen=True)
class Diagnosis:
    """What went wrong, if anything; printed, a sentence."""

    cause: Cause
    """Where the fault lies."""
    layer: str | None
    """The first layer that shows it, in the order of computation; None where no layer is to blame."""
    words: str
    """The finding."""

    def __str__(self) -> str:
        """The sentence."""
        return self.words if self.cause == "none" else f"the {self.cause} went wrong: {self.words}"


def diagnose(samples: Sequence[Sample], extremes: Mapping[str, float], reward_scale: float = 1.0) -> Diagnosis:
    """Find what went wrong, the first cause first: data, then FP32's own numbers, then what only low precision shows.

    Args:
        samples: What was seen of the updates, in order.
        extremes: The largest magnitude of ``reward`` and ``observation`` in all collections; NaN if one was NaN.
        reward_scale: What is learned from are rewards times this.
    """
    if not samples and not extremes:
        return Diagnosis("none", None, "nothing was seen: attach the recorder to a pipeline and train it")
    for check in (_data, _reward):
        found = check(extremes, reward_scale)
        if found is not None:
            return found
    examined = (_moments, _fp32, _large_weights, _overflow, _no_gradient, _scaler, _underflow, _noise, _lost_updates)
    for examine in examined:
        found = examine(samples)
        if found is not None:
            return found
    looked = "the one update that was" if len(samples) == 1 else f"the {len(samples)} updates that were"
    return Diagnosis("none", None, f"nothing went wrong in the numbers of {looked} looked at")


def _data(extremes: Mapping[str, float], reward_scale: float) -> Diagnosis | None:
    broken = [name for name, value in extremes.items() if not math.isfinite(value)]
    if not broken:
        return None
    return Diagnosis("task", None, f"the environment returned a {' and a '.join(broken)} that is not finite")


def _reward(extremes: Mapping[str, float], reward_scale: float) -> Diagnosis | None:
    largest = extremes.get("reward", 0.0) * reward_scale
    if largest <= LARGEST_REWARD:
        return None
    words = f"a reward of {largest:.3g} is learned from, beyond {LARGEST_REWARD:g}; scale or clip rewards"
    return Diagnosis("task", None, words)


def _moments(samples: Sequence[Sample]) -> Diagnosis | None:
    # Before what FP32 shows: the weights that it is given have made steps that were divided by nothing.
    for sample in samples:
        for layer in sample.layers:
            if layer.lost_moments > MOST_LOST_MOMENTS:
                words = (
                    f"{layer.lost_moments:.0%} of the optimizer's second moments of {layer.name} vanish, so that its "
                    "steps are far too large; keep the optimizer's state in FP32"
                )
                return Diagnosis("precision", layer.name, words)
    return None


def _fp32(samples: Sequence[Sample]) -> Diagnosis | None:
    for sample in samples:
        layer = _first(sample.layers, lambda operand: operand.reference_nonfinite > 0)
        if layer is not None or not math.isfinite(sample.reference_loss):
            at = f", first in {layer[1]} of {layer[0]}" if layer else ""
            name = layer[0] if layer else None
            return Diagnosis("algorithm", name, f"update {sample.call} is not finite in FP32 either{at}")
    return None


def _large_weights(samples: Sequence[Sample]) -> Diagnosis | None:
    for sample in samples:
        for layer in sample.layers:
            if layer.weight.amax > LARGEST_WEIGHT:
                words = f"weights of {layer.name} have grown to {layer.weight.amax:.3g}: the learning rate is too large"
                return Diagnosis("algorithm", layer.name, words)
    return None


def _no_gradient(samples: Sequence[Sample]) -> Diagnosis | None:
    late = samples[len(samples) // 2 :]
    for name, layers in reversed(_by_layer(late).items()):
        if all(layer.gradient.reference_zero for layer in layers):
            words = f"no gradient reaches {name}, in FP32 either: what comes after it is saturated or dead"
            return Diagnosis("algorithm", name, words)
    return None


def _overflow(samples: Sequence[Sample]) -> Diagnosis | None:
    for sample in samples:
        for layer in sample.layers:
            for role, operand in _operands(layer)[:-1]:
                if operand.saturation > 0:
                    reach = f", up to {operand.amax:.3g}" if math.isfinite(operand.amax) else ""
                    part = f"{100 * operand.saturation:.3g}% of the {role} of {layer.name}"
                    words = f"{part} lie beyond {layer.format}, though not in FP32{reach}"
                    return Diagnosis("precision", layer.name, words)
    return None


def _scaler(samples: Sequence[Sample]) -> Diagnosis | None:
    late = samples[len(samples) // 2 :]
    skipped = sum(sample.skipped for sample in late)
    if not late or skipped <= MOST_SKIPPED * len(late):
        return None
    scale = late[-1].loss_scale
    words = (
        f"{skipped} of the last {len(late)} updates that were looked at were skipped, though FP32's are finite; the "
        f"loss scale stands at {scale:.3g}"
    )
    # Backward, the last layer comes first.
    layer = next((x.name for x in reversed(late[-1].layers) if x.gradient.saturation > 0), None)
    return Diagnosis("precision", layer, words + (f", and gradients overflow first in {layer}" if layer else ""))


def _underflow(samples: Sequence[Sample]) -> Diagnosis | None:
    worst = _worst(samples, lambda operand: operand.underflow)
    if worst is None or worst[2] <= MOST_UNDERFLOW:
        return None
    name, role, part = worst
    if role == ROLES[-1]:
        # Backward, the last layer comes first: what vanished there is missing in all before it.
        parts = {
            each: median(layer.gradient.underflow for layer in layers) for each, layers in _by_layer(samples).items()
        }
        name, part = next(pair for pair in reversed(parts.items()) if pair[1] > MOST_UNDERFLOW)
    scale = samples[-1].loss_scale
    note = f" (the loss scale is {scale:.3g})" if role == "gradients" and scale != 1 else ""
    return Diagnosis("precision", name, f"{part:.0%} of the {role} of {name} vanish in {_format(samples, name)}{note}")


def _noise(samples: Sequence[Sample]) -> Diagnosis | None:
    # Not the gradients: where values are learned well, an error's gradient is a small difference of large numbers, so
    # that rounding them drowns it while learning goes on.
    worst = _worst(samples, lambda operand: -operand.snr_db if math.isfinite(operand.snr_db) else -math.inf, FORWARD)
    if worst is None or -worst[2] >= LEAST_SNR:
        return None
    name, role, negative = worst
    words = f"the {role} of {name} are mostly rounding: {-negative:.1f} dB over the noise of {_format(samples, name)}"
    return Diagnosis("precision", name, words)


def _lost_updates(samples: Sequence[Sample]) -> Diagnosis | None:
    layers = _by_layer(samples)
    found = {name: _median_known(layer.update_survival for layer in own) for name, own in layers.items()}
    name = min(found, key=found.__getitem__, default=None)
    if name is None or found[name] >= LEAST_SURVIVAL:
        return None
    if _median_known(layer.survival_in_fp32 for layer in layers[name]) < LEAST_SURVIVAL:
        words = f"updates of {name} are too small to change even FP32 weights: the learning rate is too small"
        return Diagnosis("algorithm", name, words)
    words = f"of the change that the optimizer intends, {found[name]:.0%} arrives in the weights of {name}"
    return Diagnosis("precision", name, words)


def _median_known(values: Iterable[float]) -> float:
    """Of what is not NaN; infinite if nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.inf


def _operands(layer: LayerNumbers) -> tuple[tuple[str, OperandNumbers], ...]:
    return tuple(zip(ROLES, (layer.activation, layer.weight, layer.output, layer.gradient), strict=True))


def _first(
    layers: Iterable[LayerNumbers], wrong: Callable[[OperandNumbers], bool]
) -> tuple[str, str, OperandNumbers] | None:
    """The first operand that is wrong, in the order of computation: forward, then backward."""
    layers = list(layers)
    forward = ((layer, pair) for layer in layers for pair in _operands(layer)[:-1])
    backward = ((layer, _operands(layer)[-1]) for layer in reversed(layers))
    for each in (forward, backward):
        for layer, (role, operand) in each:
            if wrong(operand):
                return layer.name, role, operand
    return None


def _by_layer(samples: Sequence[Sample]) -> dict[str, list[LayerNumbers]]:
    found: dict[str, list[LayerNumbers]] = {}
    for sample in samples:
        for layer in sample.layers:
            found.setdefault(layer.name, []).append(layer)
    return found


def _worst(
    samples: Sequence[Sample], badness: Callable[[OperandNumbers], float], roles: Sequence[str] = ROLES
) -> tuple[str, str, float] | None:
    """The layer and operand whose median over the samples is largest."""
    found = [
        (name, role, median(badness(dict(_operands(layer))[role]) for layer in layers))
        for name, layers in _by_layer(samples).items()
        for role in roles
    ]
    return max(found, key=lambda each: each[2], default=None)


def _format(samples: Sequence[Sample], name: str) -> str:
    return next(layer.format for sample in samples for layer in sample.layers if layer.name == name)
