"""How far FP8 is from high precision in a given module: relative error and signal-to-quantization-noise ratio."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fp8rl_torchrl.precision.linear import Float8Linear


@dataclass(frozen=True)
class TensorError:
    """How far a tensor is from its high-precision twin.

    Args:
        relative_error: ``‖value − reference‖ / ‖reference‖`` in the Frobenius norm.
    """

    relative_error: float

    @classmethod
    def of(cls, values: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> TensorError:
        """The error of some tensors taken together, as if they were one, computed in float64.

        Equal tensors have error 0, also where the reference is zero; any other value has an infinite one there.

        Args:
            values: Any shapes and floating dtypes.
            references: Of the same shapes.
        """
        noise = signal = 0.0
        for value, reference in zip(values, references, strict=True):
            reference = reference.detach().double()
            noise = math.hypot(noise, (value.detach().double() - reference).norm().item())
            signal = math.hypot(signal, reference.norm().item())
        if noise == 0:
            return cls(0.0)
        return cls(noise / signal if signal else math.inf)

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB, ``−20 log10(relative_error)``; infinite without error."""
        return -20 * math.log10(self.relative_error) if self.relative_error else math.inf

    def __str__(self) -> str:
        """Such as ``0.0361   28.9``."""
        return f"{self.relative_error:.4f} {self.sqnr_db:6.1f}"


@dataclass(frozen=True)
class ModuleError:
    """The errors of one module.

    Args:
        name: The layer's name within the module that was measured; empty for that module itself.
        output: Of the output.
        input_grad: Of the gradient of the input; None where there is none.
        weight_grad: Of the gradient of a layer's weight, or of all parameters of the whole module; None where there is
            none.
    """

    name: str
    output: TensorError
    input_grad: TensorError | None
    weight_grad: TensorError | None


@dataclass(frozen=True)
class ErrorReport:
    """What FP8 costs in accuracy, layer by layer and in all. Printed, it is a table.

    A layer that ran several times counts all its calls together; one that did not run is left out.

    Args:
        layers: Each `Float8Linear`'s own error: against a plain linear layer on the very inputs and output gradients
            that this layer received.
        accumulated: The same layers' error against a run of the whole module in high precision: their own, with what
            the layers before them (in the backward pass: after them) hand on. Here ``weight_grad`` is of the whole
            gradient, the one that an optimizer gets.
        module: The whole module against its run in high precision.
    """

    layers: tuple[ModuleError, ...]
    accumulated: tuple[ModuleError, ...]
    module: ModuleError

    def __str__(self) -> str:
        """A line a layer; for each of its tensors the relative error, and the SQNR in dB."""
        sections = {"own error": self.layers, "accumulated": self.accumulated, "whole module": (self.module,)}
        width = max(len(title) for title in (*sections, *(f"  {row.name}" for row in self.layers)))
        columns = ("output", "input grad", "weight grad")
        lines = [
            " " * width + "".join(f"  {title:>14}" for title in columns),
            " " * width + "".join(f"  {'error     dB':>14}" for _ in columns),
        ]
        for title, rows in sections.items():
            if rows != (self.module,):
                lines.append(title)
            for row in rows:
                cells = (row.output, row.input_grad, row.weight_grad)
                label = title if row is self.module else f"  {row.name}"
                lines.append(label.ljust(width) + "".join(f"  {error or '-'!s:>14}" for error in cells))
        return "\n".join(lines)


def quantization_error(
    module: nn.Module, *inputs: Any, output_grad: torch.Tensor | Sequence[torch.Tensor] | None = None
) -> ErrorReport:
    """Compare a module that holds `Float8Linear` layers with its high-precision twin.

    The twin is the same module, on the same parameters, buffers and random numbers, in which every `Float8Linear`
    computes as `torch.nn.Linear`. Both run as the module would here and now, forward and backward: in training or
    evaluation mode, and inside the caller's autocast, so that under BF16 the twin is a BF16 module. Afterwards the
    module's parameters, buffers and gradients and the random state are what they were before.

    Args:
        module: A module with at least one `Float8Linear`.
        inputs: What it is called with: tensors, or TensorDicts, tuples, lists and dicts of them. They are not changed.
        output_grad: The gradient of the output, from which both start their backward pass; where there are several
            outputs, one for each. The errors of gradients depend on it: pass a loss's for numbers about that loss. By
            default standard normal numbers, the same at every call. Outputs are the floating-point tensors that depend
            on parameters or inputs, in the order in which they stand in what the module returns.

    Raises:
        ValueError: If the module holds no `Float8Linear`, returns nothing that can be differentiated, or
            ``output_grad`` does not fit what it returns.
        RuntimeError: If none of the layers runs, or one runs under ``vmap``.

    Example:
        >>> report = quantization_error(Float8Linear(32, 48), torch.ones(4, 32))
        >>> report.module.output.sqnr_db > 20
        True
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Float8Linear)}
    if not layers:
        raise ValueError(
            f"{type(module).__name__} holds no Float8Linear, so there is no FP8 to measure; convert the module first"
        )
    # Under a caller's no_grad there is nothing to differentiate, and inside compiled code there are no layers to watch.
    with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        float8 = _run(module, layers, inputs, output_grad, in_float8=True)
        twin = _run(module, layers, inputs, output_grad, in_float8=False)
    if not float8.layers:
        raise RuntimeError(f"none of the {len(layers)} Float8Linear layers ran on this input")
    return ErrorReport(
        layers=tuple(_compare(name, *pair) for name, pair in float8.layers.items()),
        accumulated=tuple(
            _compare(
                name,
                pair.float8._replace(weight_grad=[float8.weight_grads[name]]),
                twin.layers[name].twin._replace(weight_grad=[twin.weight_grads[name]]),
            )
            for name, pair in float8.layers.items()
        ),
        module=_compare("", float8.module, twin.module),
    )


class _Tensors(NamedTuple):
    """What is compared of a module; None where a gradient does not exist."""

    output: list[torch.Tensor]
    input_grad: list[torch.Tensor | None]
    weight_grad: list[torch.Tensor | None]


class _Pair(NamedTuple):
    """A layer in FP8 and in high precision, on the same inputs and output gradients."""

    float8: _Tensors
    twin: _Tensors


class _Run(NamedTuple):
    """A run of the whole module, forward and backward."""

    module: _Tensors
    layers: dict[str, _Pair]
    weight_grads: dict[str, torch.Tensor | None]


class _Call(NamedTuple):
    """A call of a layer: what it was given, its output in both precisions, and the one of them that it handed on."""

    input: torch.Tensor
    weight: torch.Tensor
    float8: torch.Tensor
    twin: torch.Tensor
    output: torch.Tensor


def _compare(name: str, values: _Tensors, references: _Tensors) -> ModuleError:
    errors = []
    for ours, theirs in zip(values, references, strict=True):
        found = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
        errors.append(TensorError.of(*zip(*found, strict=True)) if found else None)
    return ModuleError(name, *errors)


def _run(module: nn.Module, layers: dict[str, Float8Linear], inputs: Any, output_grad: Any, in_float8: bool) -> _Run:
    # Leaves of our own on the module's memory leave its gradients alone. What the module may change is copied.
    parameters = {
        name: each.detach().requires_grad_(each.is_floating_point()) for name, each in module.named_parameters()
    }
    buffers = {name: each.detach().clone() for name, each in module.named_buffers()}
    leaves = pytree.tree_map_only(torch.Tensor, _leaf, inputs)
    passed = pytree.tree_map_only(torch.Tensor, torch.clone, leaves)
    untouched = {id(each) for each in pytree.tree_leaves(passed)}
    device = next(module.parameters()).device
    with contextlib.ExitStack() as stack:
        calls = {name: stack.enter_context(_recorded(name, layer, in_float8)) for name, layer in layers.items()}
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        # As it stands, but for the cache, which would keep casts of our leaves until the caller's autocast ends.
        enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        stack.enter_context(torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False))
        result = torch.func.functional_call(module, (parameters, buffers), passed)
    outputs = [each for each in _tracked(result) if id(each) not in untouched]
    starts = _output_grads(module, outputs, output_grad)
    with torch.autocast(device.type, enabled=False):
        return _Run(
            _Tensors(
                outputs,
                _gradients(outputs, _tracked(leaves), starts),
                _gradients(outputs, _tracked(parameters), starts),
            ),
            {name: _pair(each, outputs, starts) for name, each in calls.items() if each},
            {name: _gradients(outputs, [each[0].weight], starts)[0] for name, each in calls.items() if each},
        )


def _tracked(tree: Any) -> list[torch.Tensor]:
    """The tensors in some structure that can be differentiated."""
    return [each for each in pytree.tree_leaves(tree) if torch.is_tensor(each) and each.requires_grad]


def _pair(calls: list[_Call], outputs: list[torch.Tensor], starts: list[torch.Tensor]) -> _Pair:
    float8, twin = _Tensors([], [], []), _Tensors([], [], [])
    for call in calls:
        (start,) = _gradients(outputs, [call.output], starts)
        for tensors, output in ((float8, call.float8), (twin, call.twin)):
            input_grad, weight_grad = _gradients([output], [call.input, call.weight], [start])
            tensors.output.append(output)
            tensors.input_grad.append(input_grad)
            tensors.weight_grad.append(weight_grad)
    return _Pair(float8, twin)


def _gradients(
    outputs: list[torch.Tensor], of: list[torch.Tensor], starts: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """The gradients of some tensors, None for those that the outputs do not depend on."""
    tracked = [each for each in of if each.requires_grad]
    if not tracked or any(start is None for start in starts):
        return [None] * len(of)
    found = iter(torch.autograd.grad(outputs, tracked, starts, retain_graph=True, allow_unused=True))
    return [next(found) if each.requires_grad else None for each in of]


def _output_grads(module: nn.Module, outputs: list[torch.Tensor], given: Any) -> list[torch.Tensor]:
    """The gradients to start from, one for each output."""
    if not outputs:
        raise ValueError(f"{type(module).__name__} returned no floating-point tensor that could be differentiated")
    if given is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
    given = [given] if torch.is_tensor(given) else list(given)
    expected, got = [list(each.shape) for each in outputs], [list(each.shape) for each in given]
    if got != expected:
        raise ValueError(f"output_grad needs one tensor for each output, of shapes {expected}; got {got}")
    return [start.detach().to(each) for start, each in zip(given, outputs, strict=True)]


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


@contextlib.contextmanager
def _recorded(name: str, layer: Float8Linear, in_float8: bool) -> Iterator[list[_Call]]:
    """Let a layer note its calls, and hand on the output of FP8 or of high precision."""
    calls: list[_Call] = []

    def forward(input: torch.Tensor) -> torch.Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(input):  # pyright: ignore[reportAttributeAccessIssue]
            raise RuntimeError(f"{name or 'the layer'} runs under vmap; measure one member of the ensemble by itself")
        # Copies, because others may also use the input, or write into the output.
        input = input.clone()
        if input.is_floating_point() and not input.requires_grad:
            input.requires_grad_()
        float8, twin = type(layer).forward(layer, input), _in_high_precision(layer, input)
        output = float8 if in_float8 else twin
        calls.append(_Call(input, layer.weight, float8, twin, output))
        return output.clone()

    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield calls
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def _in_high_precision(layer: Float8Linear, input: torch.Tensor) -> torch.Tensor:
    if torch.is_autocast_enabled(input.device.type):
        return F.linear(input, layer.weight, layer.bias)
    return F.linear(input.to(layer.weight.dtype), layer.weight, layer.bias).to(input.dtype)
