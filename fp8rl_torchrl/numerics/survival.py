"""How much of the change that an optimizer intends arrives in the weights, and whether its moments hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

SQUARES = 1e-15
"""A hundredth of the square of what is larger is a normal number in FP32."""


class Stepped(NamedTuple):
    """A layer's weight in one step, float64 ``[]`` each, on the device."""

    survival: torch.Tensor
    """The part of the intended change that arrived: 0 for a step that was skipped, NaN where no change was
    intended."""
    survival_in_fp32: torch.Tensor
    """The same, had the weights been stored in FP32: little if the change itself is too small; NaN where none was
    intended, or where the step was skipped."""
    lost_moments: torch.Tensor
    """The part of Adam's second moments that is zero where FP32 would not be, by the first; 0 for other optimizers."""


@contextlib.contextmanager
def watched(optimizers: Iterable[torch.optim.Optimizer], names: Mapping[int, str]) -> Iterator[dict[str, Stepped]]:
    r"""Measure the steps that optimizers make inside the block.

    The intended change :math:`d` is what the same optimizer does, from the same state and with the same gradients, in
    float64. With the change :math:`a` that the weights then show, the part that survives is
    :math:`\langle a, d \rangle / \langle d, d \rangle`: 1 where all of it arrives, 0 where none does.

    Args:
        optimizers: Those that step.
        names: The name of each layer by the memory of its weight.

    Yields:
        A dictionary that holds, after the block, each layer that was stepped. A step replayed from a CUDA graph is not
        seen.
    """
    survived: dict[str, Stepped] = {}
    pending: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    @torch.no_grad()
    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        pending[id(optimizer)] = _intended(optimizer)

    @torch.no_grad()
    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        starts, changes = pending.pop(id(optimizer))
        for parameter, start, intended in zip(_stepped(optimizer), starts, changes, strict=True):
            if segments := _segments(parameter, names):
                seen = _seen(parameter, start, intended, optimizer.state.get(parameter, {}))
                sums = torch.stack([seen[:, first : first + count].sum(1) for first, count in segments.values()], 1)
                wanted, shown, kept, lost = sums
                # A step that is skipped for a gradient that is not finite intends what nobody knows: nothing arrives.
                survival = torch.where(wanted.isfinite(), shown / wanted, 0.0)
                counts = wanted.new_tensor([count for _, count in segments.values()])
                found = zip(survival, kept / wanted, lost / counts, strict=True)
                survived.update(zip(segments, map(Stepped._make, found), strict=True))

    handles = []
    for optimizer in optimizers:
        handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        yield survived
    finally:
        for handle in handles:
            handle.remove()


def _stepped(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _intended(optimizer: torch.optim.Optimizer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parameters of an optimizer and the change of each that it intends, in float64."""
    twins: list[torch.Tensor] = []
    groups = []
    for group in optimizer.param_groups:
        own = []
        for parameter in group["params"]:
            if parameter.grad is not None:
                own.append(parameter.detach().double().clone())
                own[-1].grad = parameter.grad.double()
        twins += own
        groups.append({key: _copied(each) for key, each in group.items()} | {"params": own})
    starts = [each.clone() for each in twins]
    kind: Any = type(optimizer)
    exact = kind(groups)
    for parameter, each in zip(_stepped(optimizer), twins, strict=True):
        state = optimizer.state.get(parameter, {})
        exact.state[each] = {
            key: value.double() if torch.is_tensor(value) and value.shape == parameter.shape else _copied(value)
            for key, value in state.items()
        }
    exact.step()
    return starts, [each - start for each, start in zip(twins, starts, strict=True)]


def _seen(
    parameter: torch.Tensor, start: torch.Tensor, intended: torch.Tensor, state: Mapping[str, Any]
) -> torch.Tensor:
    """Four numbers of each weight, float64 ``[4, size]``.

    The intended change times itself, the one that it shows and the one that FP32 would keep, and whether its second
    moment is lost: nothing but epsilon divides its next step.
    """
    change = parameter.detach().double() - start
    kept = (start + intended).float().double() - start
    lost = torch.zeros_like(start)
    if {"exp_avg", "exp_avg_sq"} <= state.keys():
        lost = ((state["exp_avg_sq"] == 0) & (state["exp_avg"].abs() > SQUARES)).double()
    return torch.stack([intended * intended, change * intended, kept * intended, lost]).reshape(4, -1)


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def _segments(parameter: torch.Tensor, names: Mapping[int, str]) -> dict[str, tuple[int, int]]:
    """The layers whose weights lie in a parameter, and where."""
    first, size = parameter.data_ptr(), parameter.element_size()
    found = {}
    views = getattr(parameter, "views", [parameter])  # of a FlatParameter
    for view in views:
        name = names.get(view.data_ptr())
        if name is not None:
            found[name] = ((view.data_ptr() - first) // size, view.numel())
    return found
