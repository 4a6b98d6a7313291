"""`convert`: replace a model's linear layers by `Float8Linear`; `twin`: the same parameters in another precision."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from fp8rl_torchrl.precision.capability import float8_capability
from fp8rl_torchrl.precision.last_layers import last_linears
from fp8rl_torchrl.precision.linear import Float8Linear, products_in_words
from fp8rl_torchrl.precision.mode import Precision
from fp8rl_torchrl.precision.recipe import RECIPES

MIN_DIMENSION = 16
"""A narrower layer stays out of FP8: padded to the 16 that the hardware multiplies, it would gain nothing."""


class ConversionError(ValueError):
    """Nothing can be converted, or not what was asked for."""


@dataclass(frozen=True)
class LayerConversion:
    """What became of one linear layer."""

    name: str
    """Where it is in the module."""
    in_features: int
    """K."""
    out_features: int
    """N."""
    format: str
    """What its forward product runs in."""
    reason: str | None
    """Why it was left alone; None if it multiplies in FP8."""


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did, layer by layer; printed, a table."""

    precision: str
    """The precision asked for."""
    backend: str
    """``native`` or ``emulated``."""
    products: str
    """The operands of each product, forward and backward."""
    ensembles: str
    """How products under ``vmap`` run."""
    layers: tuple[LayerConversion, ...]
    """Every linear layer, in the order of the module."""
    others: dict[str, int]
    """Modules of other kinds that have parameters, which FP8 does not reach: their number by type."""

    @property
    def converted(self) -> tuple[LayerConversion, ...]:
        """The layers that multiply in FP8."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def fp8_share(self) -> float:
        """The part of the linear layers' multiply-adds that is in FP8, from 0 to 1."""
        total = sum(layer.in_features * layer.out_features for layer in self.layers)
        return sum(layer.in_features * layer.out_features for layer in self.converted) / total

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-compatible values."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "fp8_share": self.fp8_share}

    def __str__(self) -> str:
        """The table."""
        rows = [("layer", "in", "out", "runs in", "left alone because")]
        rows += [
            (each.name, str(each.in_features), str(each.out_features), each.format, each.reason or "")
            for each in self.layers
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        align = (str.ljust, str.rjust, str.rjust, str.ljust, str.ljust)
        lines = [
            "  ".join(to(cell, width) for to, cell, width in zip(align, row, widths, strict=True)).rstrip()
            for row in rows
        ]
        summary = (
            f"{self.precision}, {self.backend}: {len(self.converted)} of {len(self.layers)} linear layers, "
            f"{self.fp8_share:.0%} of their multiply-adds; ensembles: {self.ensembles}\n{self.products}"
        )
        if self.others:
            summary += "\nnot linear, so not in FP8: " + ", ".join(f"{n} {name}" for name, n in self.others.items())
        return "\n".join([*lines, summary])


def convert(module: nn.Module, precision: Precision | str, skip: Sequence[str] = ()) -> ConversionReport:
    """Replace linear layers by `Float8Linear`, in place and on the same parameters.

    The last layer of a network stays in high precision, and so does a layer with a dimension under 16. Which layers
    are last, `fp8rl_torchrl.precision.last_layers.last_linears` says; in a module with a ``forward`` of its own it goes
    by the order of registration, so name a second head in ``skip``. Dimensions that are no multiples of 16 are padded.

    Optimizers and losses that hold the parameters or the module stay valid. Converting again starts afresh.

    Args:
        module: The model, such as an `fp8rl_torchrl.ActorCritic`, or any module that contains linear layers.
        precision: An fp8 `Precision`, or its name.
        skip: Layers to leave alone: glob patterns on their names, such as ``"encoder.0"`` or ``"*head*"``.

    Returns:
        What was done with each linear layer. Layers that are used directly (a convolution, an attention's projection)
        are not linear layers and are counted by type.

    Raises:
        ConversionError: If nothing would be converted, or a pattern matches no linear layer. The module is unchanged.
        ValueError: If the precision is not an fp8 one.
        TypeError: If ``skip`` is a single string.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        >>> [layer.name for layer in convert(model, "fp8").converted]
        ['0', '2']
    """
    precision = Precision.of(precision)
    if precision.fp8_recipe is None:
        raise ValueError(f"convert is for the fp8 precisions; {precision.name!r} needs no conversion")
    if isinstance(skip, str):
        raise TypeError(f"skip takes a sequence of patterns; got the string {skip!r}: write ({skip!r},)")
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ConversionError(f"skip={pattern!r} matches no linear layer; there are: {', '.join(linears)}")
    last = {id(layer) for layer in last_linears(module)}
    reasons = {name: _reason(name, layer, id(layer) in last, skip) for name, layer in linears.items()}
    if all(reasons.values()):
        raise ConversionError(_nothing(module, reasons))

    new = {}
    for name, layer in linears.items():
        if reasons[name] is None:
            new[id(layer)] = Float8Linear.from_linear(layer, precision.fp8_recipe, precision.backend)
        elif isinstance(layer, Float8Linear):
            new[id(layer)] = layer.to_linear()
    _replace(module, new)
    return _report(module, precision, reasons)


def _reason(name: str, layer: nn.Linear, last: bool, skip: Sequence[str]) -> str | None:
    """Why a layer is left alone; None if it is not."""
    if matching := [pattern for pattern in skip if fnmatchcase(name, pattern)]:
        return f"matched by skip={matching[0]!r}"
    if last:
        return "last layer of a network"
    if type(layer) not in (nn.Linear, Float8Linear):
        return f"{type(layer).__name__}, a kind of its own"
    if min(layer.in_features, layer.out_features) < MIN_DIMENSION:
        return f"a dimension under {MIN_DIMENSION}"
    return None


def _nothing(module: nn.Module, reasons: dict[str, str | None]) -> str:
    if isinstance(module, nn.Linear):
        return "convert replaces layers inside a module; for a single layer use Float8Linear.from_linear(layer)"
    if not reasons:
        return (
            f"nothing to convert: {type(module).__name__} contains no linear layer. (A TorchRL loss does not contain "
            "its networks: convert those)"
        )
    listed = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    return f"nothing to convert: every linear layer would stay in high precision\n{listed}"


def _replace(module: nn.Module, new: dict[int, Any]) -> None:
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]


def _report(module: nn.Module, precision: Precision, reasons: dict[str, str | None]) -> ConversionReport:
    layers, backends, others, device = [], set(), Counter(), torch.device("cpu")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            format = getattr(layer, "compute_format", precision.base)
            if isinstance(layer, Float8Linear):
                format, device = f"{RECIPES[layer.recipe].output}, {layer.runs()}", layer.weight.device
                backends.add(layer.runs())
            layers.append(LayerConversion(name, layer.in_features, layer.out_features, format, reasons[name]))
        elif layer._parameters:
            others[type(layer).__name__] += 1
    return ConversionReport(
        precision=precision.name,
        backend=", ".join(sorted(backends)),
        products=products_in_words(precision.fp8_recipe or "", "/".join(sorted(backends))),
        ensembles="one batched product" if backends == {"emulated"} else float8_capability(device).ensembles,
        layers=tuple(layers),
        others=dict(others),
    )


# --- the same parameters in another precision ---


class Twin(TensorDictModuleBase):
    """A second module on the parameters of a first one, which computes in a precision of its own.

    Made by `twin`. It reads and writes the keys of the first, and what else it is asked for it asks of its module.
    """

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.module, self.precision = module, precision
        self.in_keys: Any = getattr(module, "in_keys", [])
        self.out_keys: Any = getattr(module, "out_keys", [])

    def __getattr__(self, name: str) -> Any:
        """What is not the twin's own is its module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module in the twin's precision."""
        with self.precision.autocast(self._device()):
            return self.module(*args, **kwargs)

    def get_dist(self, tensordict: TensorDictBase, **kwargs: Any) -> torch.distributions.Distribution:
        """The module's distribution, computed in the twin's precision."""
        with self.precision.autocast(self._device()):
            return self.module.get_dist(tensordict, **kwargs)  # pyright: ignore[reportCallIssue]

    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))


def twin(model: nn.Module, precision: Precision | str, skip: Sequence[str] = ()) -> Twin:
    """A second module tree on the same parameters, whose forward runs in a precision of its own.

    For collecting experience (or for target networks) in another precision than the learner's. An update of the
    model's parameters is an update of the twin's.

    Args:
        model: What the twin computes, such as ``agent.policy``; it is not changed. Its `Float8Linear` layers become
            what the precision says, in the twin alone.
        precision: A `Precision` or its name. For an fp8 one, the layers that are FP8 in the model are so in the twin; a
            model without any is converted.
        skip: As in `convert`, which then chooses the layers anew.

    Raises:
        TypeError: If the model cannot be called, such as a whole `ActorCritic`.
        ConversionError: As in `convert`.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4))
        >>> low = twin(model, "bf16")
        >>> low(torch.ones(1, 32)).dtype, low.module[0].weight is model[0].weight
        (torch.bfloat16, True)
    """
    precision = Precision.of(precision)
    if type(model).forward is nn.Module.forward:
        raise TypeError(f"twin takes a module that can be called; a {type(model).__name__} cannot: pass its .policy")
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    multiplying = [module for module in copied.modules() if isinstance(module, Float8Linear)]
    recipe = precision.fp8_recipe
    if recipe is None:
        _replace(copied, {id(layer): layer.to_linear() for layer in multiplying})
    elif multiplying and not skip:  # the layers that were chosen for the model
        _replace(
            copied, {id(layer): Float8Linear.from_linear(layer, recipe, precision.backend) for layer in multiplying}
        )
    else:
        convert(copied, precision, skip)
    return Twin(copied, precision)
