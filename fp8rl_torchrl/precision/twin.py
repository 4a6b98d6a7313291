"""`twin`: a second module on the same parameters, in a precision of its own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import nn

from fp8rl_torchrl.precision.convert import convert, to_float8, to_linear
from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.precision.mode import Precision


class Twin(nn.Module):
    """A second module on the parameters of a first one, which computes in a precision of its own.

    Made by `twin`. What it has not, it asks of its module: attributes, and methods (``get_dist``, ``log_prob``), which
    run in the twin's precision too. The twin of a TensorDict module is one itself, with the same keys.
    """

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.module, self.precision = module, precision

    def __getattr__(self, name: str) -> Any:
        """What is not the twin's own is its module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # what says how to copy or pickle the module does not say it of the twin
                raise
        module = super().__getattr__("module")
        found = getattr(module, name)
        return functools.partial(self._run, found) if getattr(found, "__self__", None) is module else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module in the twin's precision."""
        return self._run(self.module, *args, **kwargs)

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        device = next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))
        with self.precision.autocast(device):
            return function(*args, **kwargs)


class _TensorDictTwin(Twin, TensorDictModuleBase):
    """The twin of a TensorDict module."""

    def __init__(self, module: TensorDictModuleBase, precision: Precision) -> None:
        super().__init__(module, precision)
        self.in_keys: Any = module.in_keys
        self.out_keys: Any = module.out_keys


def twin(model: nn.Module, precision: Precision | str, skip: Sequence[str] = ()) -> Twin:
    """A second module tree on the same parameters, whose forward runs in a precision of its own.

    For collecting experience (or for target networks) in another precision than the learner's. An update of the
    model's parameters is an update of the twin's.

    Args:
        model: What the twin computes, such as ``agent.policy``; it is not changed. Its `Float8Linear` layers become
            what the precision says, in the twin alone. Of a twin, its module is taken.
        precision: A `Precision` or its name. For an fp8 one, the layers that are FP8 in the model are so in the twin; a
            model without any is converted.
        skip: As in `convert`, which then chooses the layers anew; for the fp8 precisions.

    Raises:
        TypeError: If the model cannot be called, such as a whole `ActorCritic`, or a part of it copies its parameters
            whenever it is copied.
        ValueError: If ``skip`` is given and the precision is not an fp8 one.
        ConversionError: As in `convert`.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4))
        >>> low = twin(model, "bf16")
        >>> low(torch.ones(1, 32)).dtype, low.module[0].weight is model[0].weight
        (torch.bfloat16, True)
    """
    precision = Precision.of(precision)
    if isinstance(model, Twin):
        model = model.module
    if not isinstance(model, nn.Module) or getattr(model.forward, "__func__", None) is nn.Module.forward:
        raise TypeError(
            f"twin takes a module that can be called; a {type(model).__name__} cannot: pass one of its networks, such "
            "as an ActorCritic's .policy"
        )
    if skip and precision.fp8_recipe is None:
        raise ValueError(f"skip is for the fp8 precisions; in {precision.name!r} no layer is converted")
    containers = (each for each in model.modules() if isinstance(each, TensorDictParams))
    shared: dict[int, Any] = {id(each): each for each in (*model.parameters(), *model.buffers(), *containers)}
    copied = copy.deepcopy(model, shared.copy())
    if any(id(parameter) not in shared for parameter in copied.parameters()):
        raise TypeError(f"a part of this {type(model).__name__} copies its parameters, so a twin cannot share them")
    multiplying = [module for module in copied.modules() if isinstance(module, Float8Linear)]
    if precision.fp8_recipe is None:
        for layer in multiplying:
            to_linear(layer)
    elif multiplying and not skip:  # the layers that were chosen for the model
        for layer in multiplying:
            to_float8(layer, precision)
    else:
        convert(copied, precision, skip)
    return (_TensorDictTwin if isinstance(copied, TensorDictModuleBase) else Twin)(copied, precision)  # pyright: ignore[reportArgumentType]
