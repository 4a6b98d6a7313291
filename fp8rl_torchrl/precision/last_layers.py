"""Which linear layers of a model come last: the ones that write logits and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict.nn import TensorDictSequential
from torch import nn


def last_linears(module: nn.Module) -> list[nn.Module]:
    """The linear layers of a module after which no other linear layer comes.

    In a ``TensorDictSequential``, that is: none that reads what it writes. Among the networks of a ``ModuleDict``, of a
    ``ModuleList`` (unless it is a plain list of layers) or of a module without a ``forward``, each network has its own.
    Elsewhere the order in which layers were registered counts.

    Example:
        >>> actor, critic = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), nn.Sequential(nn.Linear(4, 1))
        >>> last_linears(nn.ModuleDict({"actor": actor, "critic": critic})) == [actor[1], critic[0]]
        True
    """
    if isinstance(module, nn.Linear):
        return [module]
    if isinstance(module, TensorDictSequential):
        return [layer for part in _final_parts(module) for layer in last_linears(part)]
    parts = [child for child in module.children() if _has_linear(child)]
    chained = isinstance(module, nn.ModuleList) and all(isinstance(part, nn.Linear) for part in parts)
    if type(module).forward is nn.Module.forward and not chained:
        return [layer for part in parts for layer in last_linears(part)]  # a collection of networks
    return last_linears(parts[-1]) if parts else []


def _final_parts(sequence: TensorDictSequential) -> Iterator[nn.Module]:
    """The parts of a sequence whose output no later part with a linear layer reads, directly or through others."""
    parts: list[Any] = list(sequence.module.children())  # pyright: ignore[reportAttributeAccessIssue]
    for place, part in enumerate(parts):
        written = set(part.out_keys)
        for later in parts[place + 1 :]:
            if written.intersection(later.in_keys):
                if _has_linear(later):
                    break
                written.update(later.out_keys)
        else:
            yield part


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(each, nn.Linear) for each in module.modules())
