"""Which linear layers of a model come last: the ones that write logits and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tensordict.nn import TensorDictSequential
from torch import nn


def last_linears(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of a module after which no other linear layer comes.

    Which parts of a module have them:

    - of a ``TensorDictSequential``, those whose entries no later part reads; an action ends a network;
    - of a ``Sequential``, the last;
    - of another module with a ``forward`` of its own, the last one registered, and heads beside it: parts that read
      as wide an input and write what it is not as wide as to read;
    - of others (``ModuleDict``, ``ModuleList``, a module of which only other methods are called), each, but not one
      that writes what a later bare layer is as wide as to read.

    The last two are guesses from the order and the widths of the layers, since it is not written there how data flows.

    Example:
        >>> actor, critic = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), nn.Sequential(nn.Linear(4, 1))
        >>> last_linears(nn.ModuleDict({"actor": actor, "critic": critic})) == [actor[1], critic[0]]
        True
    """
    if isinstance(module, nn.Linear):
        return [module]
    if isinstance(module, TensorDictSequential):
        parts = list(_ends_of_sequence(module))
    else:
        parts = [child for child in module.children() if _linears(child)]
        if isinstance(module, nn.Sequential):
            parts = parts[-1:]
        elif type(module).forward is nn.Module.forward:
            parts = [part for place, part in enumerate(parts) if not _feeds_a_layer(part, parts[place + 1 :])]
        else:
            parts = [part for part in parts if part is parts[-1] or _is_beside(part, parts[-1])]
    return [layer for part in parts for layer in last_linears(part)]


def _ends_of_sequence(sequence: TensorDictSequential) -> Iterator[nn.Module]:
    """The parts of a sequence whose output no later part with a linear layer reads, directly or through others."""
    parts: list[Any] = list(sequence.module.children())  # pyright: ignore[reportAttributeAccessIssue]
    for place, part in enumerate(parts):
        written = _without_actions(part.out_keys)
        for later in parts[place + 1 :]:
            if written.intersection(later.in_keys):
                if _linears(later):
                    break
                written |= _without_actions(later.out_keys)
        else:
            yield part


def _without_actions(keys: Iterable[Any]) -> set[Any]:
    """The entries that go on within a network: a critic reads the action, but the actor ends there."""
    return {key for key in keys if (key if isinstance(key, str) else key[-1]) != "action"}


def _feeds_a_layer(part: nn.Module, later: list[nn.Module]) -> bool:
    return any(isinstance(each, nn.Linear) and each.in_features in _written(part) for each in later)


def _is_beside(part: nn.Module, last: nn.Module) -> bool:
    read = _linears(last)[0].in_features
    return _linears(part)[0].in_features == read and read not in _written(part)


def _written(part: nn.Module) -> set[int]:
    return {layer.out_features for layer in last_linears(part)}


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [each for each in module.modules() if isinstance(each, nn.Linear)]
