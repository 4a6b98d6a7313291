"""What an `OptimStep` refuses: optimizers that cannot skip, parameters in two hands, FP8 that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.precision.mode import Precision


def reaches(loss: torch.Tensor, parameters: list[torch.Tensor]) -> bool:
    """Whether the loss depends on any of the parameters."""
    if not loss.requires_grad or not parameters:
        return False
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return any(gradient is not None for gradient in gradients)


def parameters_of(key: str, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters of an optimizer that can skip a step exactly.

    Raises:
        ValueError: If it is not fused, has a parameter that is not float32, or is SGD with dampening.
    """
    if not optimizer.defaults.get("fused"):
        name = type(optimizer).__name__
        fusible = ("Adam", "AdamW", "SGD", "Adagrad")
        advice = f"build it as torch.optim.{name if name in fusible else 'Adam'}(..., fused=True)"
        raise ValueError(
            f"the optimizer of {key!r}, {name}, is not fused, so it cannot skip an update without waiting for the "
            f"device: {advice} ({', '.join(fusible)} have this option)"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    low = sorted({str(p.dtype) for p in parameters if p.dtype != torch.float32})
    if low:
        raise ValueError(f"the parameters of {key!r} must be float32 master weights; found {', '.join(low)}")
    if isinstance(optimizer, torch.optim.SGD):
        _start_momentum(key, optimizer)
    return parameters


def _start_momentum(key: str, optimizer: torch.optim.SGD) -> None:
    """Start the momentum at zero: fused SGD leaves it uninitialised if its very first step is skipped."""
    for group in optimizer.param_groups:
        if group["momentum"] and group["dampening"]:
            raise ValueError(
                f"the optimizer of {key!r}, SGD with dampening, cannot skip its first step; drop dampening"
            )
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def refuse_shared(parameters: dict[str, list[torch.Tensor]]) -> None:
    """Refuse optimizers that share a parameter.

    Raises:
        ValueError: If two of them do, naming both.
    """
    owner: dict[int, str] = {}
    for key, tensors in parameters.items():
        for tensor in tensors:
            if id(tensor) in owner:
                raise ValueError(
                    f"the optimizers of {owner[id(tensor)]!r} and {key!r} share a parameter of shape "
                    f"{tuple(tensor.shape)}; give each parameter to one optimizer"
                )
            owner[id(tensor)] = key


def fits_precision(loss: nn.Module, precision: Precision) -> bool | None:
    """Whether the linear layers of a loss are what its precision says.

    Returns:
        True if they are; None if it cannot be known before the loss runs, because its networks cannot be seen.

    Raises:
        ValueError: If an fp8 precision meets no `Float8Linear`, or another recipe's, or any other precision meets one.
    """
    layers = list(_linear_layers(loss))
    recipes = {layer.recipe for layer in layers if isinstance(layer, Float8Linear)}
    wanted = precision.fp8_recipe
    if recipes - {wanted}:
        found = ", ".join(sorted(recipes))
        raise ValueError(
            f"the loss has Float8Linear layers of recipe {found}, but the precision is {precision.name!r}: they must "
            "agree, since the layers multiply in FP8 whatever the precision says"
        )
    backends = {layer.backend for layer in layers if isinstance(layer, Float8Linear)}
    if backends - {precision.backend}:
        raise ValueError(
            f"the Float8Linear layers were converted with backend {', '.join(sorted(backends))}, but the precision "
            f"says {precision.backend!r}: convert the model with the precision that the step is given"
        )
    if wanted is None or recipes:
        return True
    if layers:
        raise ValueError(_no_float8(precision))
    return None


@contextlib.contextmanager
def float8_must_run(precision: Precision) -> Iterator[None]:
    """Watch a loss whose networks cannot be seen.

    Raises:
        ValueError: At the end of the block, if no `Float8Linear` ran in it.
    """
    ran: list[None] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, Float8Linear):
            ran.append(None)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()
    if not ran:
        raise ValueError(_no_float8(precision))


def _no_float8(precision: Precision) -> str:
    return (
        f"precision {precision.name!r}, but the loss has no Float8Linear layer, so nothing would run in FP8: first "
        f"call fp8rl_torchrl.convert(model, {precision.name!r})"
    )


def _linear_layers(loss: nn.Module) -> Iterator[nn.Module]:
    """The linear layers that can be seen: TorchRL's losses keep their networks as attributes, out of the tree."""
    waiting: list[nn.Module] = [loss]
    seen: set[int] = set()
    while waiting:
        for module in waiting.pop().modules():
            if id(module) not in seen:
                seen.add(id(module))
                waiting.extend(value for value in vars(module).values() if isinstance(value, nn.Module))
                if isinstance(module, nn.Linear):
                    yield module
