"""`convert`: make a model's linear layers multiply in FP8, and report which do, and why the others do not."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from tensordict.nn import TensorDictParams
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from fp8rl_torchrl.precision.capability import choose_backend, float8_capability
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
    """Where it is in the module: the first place, if there are several."""
    in_features: int
    """K; 0 while it is not known."""
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
            f"{int(100 * self.fp8_share)}% of their multiply-adds; ensembles: {self.ensembles}\n{self.products}"
        )  # rounded down, so that 100% says all
        if self.others:
            summary += "\nnot linear, so not in FP8: " + ", ".join(f"{n} {name}" for name, n in self.others.items())
        return "\n".join([*lines, summary])


def convert(module: nn.Module, precision: Precision | str, skip: Sequence[str] = ()) -> ConversionReport:
    """Turn linear layers into `Float8Linear`, in place: the layers and their parameters stay the same objects.

    The last layer of a network stays in high precision, and so does a layer with a dimension under 16. Which layers
    are last, `fp8rl_torchrl.precision.last_layers.last_linears` says; in a module with a ``forward`` of its own it goes
    by the order of registration and by widths, so see in the report that no head was taken for a hidden layer, and name
    it in ``skip`` if one was. Dimensions that are no multiples of 16 are padded.

    Optimizers and losses that hold the parameters or the module stay valid. Converting again starts afresh.

    Args:
        module: The model, such as an `fp8rl_torchrl.ActorCritic`, or any module that contains linear layers.
        precision: An fp8 `Precision`, or its name.
        skip: Layers to leave alone: glob patterns on their names, such as ``"encoder.0"`` or ``"*head*"``.

    Returns:
        What was done with each linear layer. Modules of other kinds that have parameters (a convolution, an LSTM, an
        attention) are counted by type.

    Raises:
        ConversionError: If nothing would be converted, a pattern matches no linear layer, or a linear layer's
            parameters are not float32. The module is unchanged, as it is if anything else raises.
        ValueError: If the precision is not an fp8 one.
        TypeError: If the module is not one, or ``skip`` is not a sequence of strings.
        RuntimeError: If the layers are on a device without the products that the precision asks for.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        >>> [layer.name for layer in convert(model, "fp8").converted]
        ['0', '2']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, then a precision; got a {type(module).__name__}")
    precision = Precision.of(precision)
    if precision.fp8_recipe is None:
        raise ValueError(f"convert is for the fp8 precisions; {precision.name!r} needs no conversion")
    if isinstance(skip, str):
        raise TypeError(f"skip takes a sequence of patterns; got the string {skip!r}: write ({skip!r},)")
    if not isinstance(skip, Sequence) or not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"skip takes a sequence of patterns on names, such as ('encoder.*',); got {skip!r}")
    reasons = _reasons(module, skip)
    chosen = [layer for layer, reason in reasons.items() if reason is None]
    for device in {layer.weight.device for layer in chosen}:
        choose_backend(device, precision.backend)  # refuses what the device cannot run

    for layer, reason in reasons.items():
        if reason is None:
            to_float8(layer, precision)
        elif isinstance(layer, Float8Linear):
            to_linear(layer)
    return _report(module, precision, reasons)


def _reasons(module: nn.Module, skip: Sequence[str]) -> dict[nn.Linear, str | None]:
    """Why each linear layer is left alone; None if it is not.

    Raises:
        ConversionError: As in `convert`.
    """
    names: dict[nn.Linear, list[str]] = {}  # more than one where a layer is used in several places
    for name, each in module.named_modules(remove_duplicate=False):
        if isinstance(each, nn.Linear):
            names.setdefault(each, []).append(name)
    everywhere = list(itertools.chain.from_iterable(names.values()))
    for pattern in skip if names else ():
        if not any(fnmatchcase(name, pattern) for name in everywhere):
            raise ConversionError(f"skip={pattern!r} matches no linear layer; there are: {', '.join(everywhere)}")
    for layer, (name, *_) in names.items():
        if layer.weight.dtype != torch.float32:
            raise ConversionError(
                f"the parameters of {name!r} are {layer.weight.dtype}; FP8 products run on float32 masters: call "
                "module.float() first"
            )
    last, bypassed = last_linears(module), _bypassed(module)
    reasons = {
        layer: _reason(layer, places, skip, last=layer in last, bypassed=layer in bypassed)
        for layer, places in names.items()
    }
    if all(reasons.values()):
        raise ConversionError(_nothing(module, {names[layer][0]: reason for layer, reason in reasons.items()}))
    return reasons


def _bypassed(module: nn.Module) -> set[nn.Module]:
    """The layers of which PyTorch's transformers, in evaluation without gradients, take the weights and no more."""
    transformers = [each for each in module.modules() if isinstance(each, nn.TransformerEncoderLayer)]
    return {layer for each in transformers for layer in (each.linear1, each.linear2)}


def _reason(layer: nn.Linear, names: list[str], skip: Sequence[str], *, last: bool, bypassed: bool) -> str | None:
    for pattern in skip:
        if any(fnmatchcase(name, pattern) for name in names):
            return f"matched by skip={pattern!r}"
    if isinstance(layer, LazyModuleMixin):
        return "no size yet: run the model once, then convert"
    if last:
        return "last layer of a network"
    if type(layer) not in (nn.Linear, Float8Linear):
        return f"{type(layer).__name__}, a kind of its own"
    if "forward" in vars(layer):
        return "its forward was replaced"
    if bypassed:
        return "TransformerEncoderLayer uses its weight itself"
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


def to_float8(layer: Any, precision: Precision) -> None:
    """Turn a linear layer into a `Float8Linear`.

    It changes its class and stays the object it is, so that whatever refers to it (a view of the model, a list of
    layers, the handle of a hook) refers to the layer that runs.
    """
    layer.__class__ = Float8Linear
    layer._set(precision.fp8_recipe, precision.backend)


def to_linear(layer: Any) -> None:
    """Turn a `Float8Linear` back."""
    del layer.recipe, layer.backend
    layer.__class__ = nn.Linear


def _report(module: nn.Module, precision: Precision, reasons: dict[nn.Linear, str | None]) -> ConversionReport:
    layers, backends, others, device = [], set(), Counter(), torch.device("cpu")
    inside = {part for layer in reasons for part in layer.modules()}
    for name, each in module.named_modules():
        if isinstance(each, nn.Linear):
            if isinstance(each, Float8Linear):
                backends.add(each.runs())
                device = each.weight.device
            format = _format(each, precision)
            layers.append(LayerConversion(name, each.in_features, each.out_features, format, reasons[each]))
        elif isinstance(each, TensorDictParams) or each in inside:  # the parameters of layers that stand elsewhere
            continue
        elif any(parameter is not None for parameter in each._parameters.values()):
            others[type(each).__name__] += 1
    return ConversionReport(
        precision=precision.name,
        backend=", ".join(sorted(backends)),
        products=products_in_words(precision.fp8_recipe or "", "/".join(sorted(backends))),
        ensembles="batched products" if backends == {"emulated"} else float8_capability(device).ensembles,
        layers=tuple(layers),
        others=dict(others),
    )


def _format(layer: nn.Linear, precision: Precision) -> str:
    if isinstance(layer, Float8Linear):
        return f"{RECIPES[layer.recipe].output}, {layer.runs()}"
    own = type(layer).forward is not nn.Linear.forward or "forward" in vars(layer)
    return getattr(layer, "compute_format", "its own way" if own else precision.base)
