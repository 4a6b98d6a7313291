"""One look at the linear layers of a loss: their operands as they ran, beside those of a pass in FP32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import nn
from torch.nn import functional as F

from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.precision.mode import Precision
from fp8rl_torchrl.precision.quantize import dequantize, largest, quantize
from fp8rl_torchrl.precision.recipe import RECIPES, Cast

ROLES = ("activation", "weight", "output", "gradient")
"""What is looked at of a linear layer: its input, its weight, its output and the gradient of that."""
MEASURES = ("amax", "underflowed", "saturated", "nonfinite", "reference_nonfinite", "count", "noise", "signal")
"""What is kept of each: its largest magnitude, five counts of elements, and two sums of squares."""


TOGETHER = 2**18
"""Elements that are compared at once: more would not stay in the cache, fewer would cost by the operation."""

ROW = 64
"""Elements that are summed first; the rows of an operand, filled up with zeros, then make its sums."""

_Operand = tuple[torch.Tensor, torch.Tensor, Cast | None]
"""As it ran, in FP32, and the cast that it goes through."""


class Look(NamedTuple):
    """What one look found; on the device."""

    names: tuple[str, ...]
    """The layers that ran, in the order in which they first did."""
    formats: tuple[str, ...]
    """What each multiplied in."""
    measures: torch.Tensor
    """float64 ``[layers, 4, 8]``: of each of `ROLES`, the `MEASURES`."""
    loss: torch.Tensor
    """float32 ``[]``, the sum of the losses as it ran, before scaling."""
    reference_loss: torch.Tensor
    """float32 ``[]``, the same in FP32."""


class _Call(NamedTuple):
    """A call of a linear layer, its operands in the dtype of its products."""

    layer: nn.Linear
    place: int
    """Where its weight lies in memory."""
    input: torch.Tensor
    weight: torch.Tensor
    output: torch.Tensor
    gradient: torch.Tensor | None
    """Of the output, unscaled; None where no loss depends on it."""


def names_of(agent: nn.Module, loss: nn.Module) -> dict[int, str]:
    """The name of each linear layer by the memory of its weight: the agent's, else that of the loss's parameter.

    By memory, because TorchRL's losses run copies of the networks on the same parameters.
    """
    names = {p.data_ptr(): name.removesuffix(".weight") for name, p in loss.named_parameters()}
    own = {each.weight.data_ptr(): name for name, each in agent.named_modules() if isinstance(each, nn.Linear)}
    return names | own


def look(
    loss: nn.Module,
    batch: TensorDictBase,
    precision: Precision,
    names: Mapping[int, str],
    scales: Mapping[str, torch.Tensor],
) -> Look:
    """Run a loss forward and backward on a batch, as it is and in FP32, and compare the layers' operands.

    Nothing is changed: not the batch, nor parameters, gradients or the random state.

    Args:
        loss: Returns a TensorDict whose entries ``loss*`` are scalars.
        batch: What it takes.
        precision: What it runs in.
        names: What `names_of` returned.
        scales: The loss scale of each entry that has one, or ``{"loss": scale}`` of their sum.
    """
    device = next(loss.parameters()).device
    with torch.enable_grad(), _same_random_numbers(device) as rewind:
        with precision.autocast(device):
            ran, calls = _run(loss, batch, scales, in_fp32=False)
        if precision.name == "fp32" and not any(isinstance(call.layer, Float8Linear) for call in calls):
            reference, twins = ran, calls
        else:
            rewind()
            with torch.autocast(device.type, enabled=False):
                reference, twins = _run(loss, batch, {}, in_fp32=True)
    seen = [
        (call, twin)
        for call, twin in zip(calls, twins, strict=True)
        if call.place in names and call.gradient is not None and twin.gradient is not None
    ]
    table: dict[str, torch.Tensor] = {}
    formats: dict[str, str] = {}
    measures = torch.zeros(0, len(ROLES), len(MEASURES), dtype=torch.float64)
    if seen:
        operands = [operand for pair in seen for operand in _operands(*pair)]
        found = torch.cat([_compared(group) for group in _groups(operands)]).reshape(-1, *measures.shape[1:])
        for (call, _), rows in zip(seen, found, strict=True):
            name = names[call.place]
            formats[name] = _format(call.layer, precision)
            table[name] = _merged(table[name], rows) if name in table else rows
        measures = torch.stack(list(table.values()))
    return Look(tuple(table), tuple(formats.values()), measures, ran, reference)


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[Any]:
    """A function that winds the random state back to where it was, which also happens at the end."""
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)

    try:
        yield rewind
    finally:
        rewind()


def _run(
    loss: nn.Module, batch: TensorDictBase, scales: Mapping[str, torch.Tensor], in_fp32: bool
) -> tuple[torch.Tensor, list[_Call]]:
    calls: list[tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def note(layer: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(layer, nn.Linear):
            return None
        if in_fp32 and isinstance(layer, Float8Linear):
            output = F.linear(inputs[0], layer.weight, layer.bias)
        calls.append((layer, _physical(inputs[0]), _physical(layer.weight), _physical(output)))
        return output if in_fp32 else None

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        outputs = loss(batch.copy())
    finally:
        handle.remove()
    losses = {str(k): v for k, v in outputs.items() if str(k).startswith("loss") and v.requires_grad}
    total = torch.stack([each.detach().float() for each in losses.values()]).sum()
    results = [output for *_, output in calls]
    tracked = [each for each in results if each.requires_grad]
    gradients: dict[int, torch.Tensor] = {}
    for summed, scale in _parts(losses, scales):
        scaled = summed if scale is None else summed * scale
        found = torch.autograd.grad(scaled, tracked, retain_graph=True, allow_unused=True)
        for output, gradient in zip(tracked, found, strict=True):
            if gradient is not None:
                gradient = gradient.float() if scale is None else gradient.float() / scale
                gradients[id(output)] = gradients[id(output)] + gradient if id(output) in gradients else gradient
    return total, [
        _Call(layer, w.data_ptr(), x.detach().to(y.dtype), w.detach().to(y.dtype), y.detach(), gradients.get(id(y)))
        for layer, x, w, y in calls
    ]


def _parts(
    losses: Mapping[str, torch.Tensor], scales: Mapping[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """What to differentiate at once, and its scale: one pass for all that are not scaled, one for each that is."""
    if set(scales) == {"loss"}:
        yield torch.stack([*losses.values()]).sum(), scales["loss"]
        return
    for key in (key for key in losses if key in scales):
        yield losses[key], scales[key]
    if rest := [each for key, each in losses.items() if key not in scales]:
        yield torch.stack(rest).sum(), None


def _physical(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory: under ``vmap``, of all members."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _format(layer: nn.Linear, precision: Precision) -> str:
    if isinstance(layer, Float8Linear):
        return f"fp8-{layer.recipe}"  # as a `Precision` is named
    base = precision.base if precision.fp8_recipe is not None else precision.name
    return getattr(layer, "compute_format", base)


def _operands(call: _Call, twin: _Call) -> list[_Operand]:
    """Of each of `ROLES`, the tensor as it ran, its twin in FP32, and the cast that it goes through."""
    recipe = RECIPES[call.layer.recipe] if isinstance(call.layer, Float8Linear) else None
    casts = (recipe.output.left, recipe.output.right, None, recipe.grad_input.left) if recipe else (None,) * 4
    ran, exact = ((each.input, each.weight, each.output, each.gradient) for each in (call, twin))
    found: Any = zip(ran, exact, casts, strict=True)  # the callers have made sure that there are gradients
    return list(found)


def _groups(operands: Iterable[_Operand]) -> Iterator[list[_Operand]]:
    """Of at most `TOGETHER` elements each, or of a single operand."""
    group: list[_Operand] = []
    elements = 0
    for operand in operands:
        size = operand[0].numel()
        if group and elements + size > TOGETHER:
            yield group
            group, elements = [], 0
        group.append(operand)
        elements += size
    yield group


def _compared(operands: Sequence[_Operand]) -> torch.Tensor:
    """`MEASURES` of tensors, ``[n, 8]``.

    All at once, for on small ones an operation costs more than its arithmetic; and marks are float32 0 and 1, which
    compare (in place) and sum several times faster on a CPU than booleans.
    """
    sizes = [value.numel() for value, _, _ in operands]
    values = _rows(value for value, _, _ in operands)
    reference = _rows(exact for _, exact, _ in operands)
    multiplied, broken = values, _not_finite(values)
    over = broken
    if any(cast is not None for _, _, cast in operands):
        pairs = [_through(value.float(), cast) for value, _, cast in operands]
        multiplied, beyond = (_rows(each_of) for each_of in zip(*pairs, strict=True))
        over, broken = torch.maximum(broken, beyond), _not_finite(multiplied)
    lost = multiplied.clone().eq_(0).mul_(reference.clone().ne_(0))
    counts = [mark.sum(1).double() for mark in (lost, over, broken, _not_finite(reference))]
    squares = [_square(multiplied - reference), _square(reference)]
    lengths = [-(-size // ROW) for size in sizes]
    sums = torch.stack([each.sum(0) for each in torch.stack(counts + squares, 1).split(lengths)])
    largest_of = values.abs().amax(1).split(lengths)
    amax = torch.stack([each.amax() for each in largest_of]).double()  # NaN if one is
    return torch.cat([amax[:, None], sums[:, :4], sums.new_tensor(sizes)[:, None], sums[:, 4:]], 1)


def _rows(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Each tensor's elements in rows of `ROW` of its own, float32 ``[n, ROW]``."""
    flat = [each.float().reshape(-1) for each in tensors]
    whole = [F.pad(each, (0, -each.numel() % ROW)) if each.numel() % ROW else each for each in flat]
    return torch.cat(whole).view(-1, ROW)


def _square(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()


def _through(value: torch.Tensor, cast: Cast | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor as it is multiplied, and where it was cut off."""
    if cast is None:
        return value, torch.zeros_like(value)
    codes, scale = quantize(value, cast)
    # What rounds to the largest number has not been cut off.
    return dequantize(codes, scale), (value * scale).abs_().gt_(largest(cast.format) * (1 + 2.0**-5))


def _not_finite(x: torch.Tensor) -> torch.Tensor:
    """1 where it is infinite or NaN, where subtracting itself does not leave 0; else 0."""
    return (x - x).ne_(0)


def _merged(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Two calls of a layer as one."""
    merged = one + other
    merged[:, 0] = torch.maximum(one[:, 0], other[:, 0])
    return merged
