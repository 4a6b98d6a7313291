"""`RowLayout`: how the tensors of one transition lie side by side in one row of 64-bit words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict

Key = tuple[str, ...]

DTYPES = (
    torch.int64, torch.float64, torch.int32, torch.float32, torch.int16, torch.float16, torch.bfloat16,
    torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
WORD = 8
"""Bytes in a word; a row is a whole number of words, so that it can be viewed in every dtype."""
INDEX: Key = ("index",)


class Field(NamedTuple):
    """One tensor of a transition; ``shape`` without batch, ``strides`` with it and ``offset`` in items of its dtype."""

    key: Key
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


Group = tuple[torch.dtype, tuple[Field, ...]]
"""Fields of one dtype."""


@dataclass(frozen=True)
class Node:
    """One (nested) TensorDict of a transition: its entries (tensors by their place) and its own batch dimensions."""

    entries: tuple[tuple[str, int | Node], ...]
    dims: tuple[int, ...]


class RowLayout:
    """Where each tensor of a transition lies in its row.

    Fields are ordered by the size of their items (8, 4, 2, 1 bytes), so that each is aligned without gaps, and the row
    is padded to whole words.

    Args:
        element: One transition, of batch size ``[]``, in which `why_no_rows` finds no obstacle.
        device: Where rows lie.

    Attributes:
        words: The number of words in a row.
    """

    def __init__(self, element: TensorDict, device: torch.device) -> None:
        self.device = device
        leaves = sorted(_leaves(element), key=lambda leaf: leaf[0] != INDEX)  # first of its dtype, and so of all
        self.words = -(-sum(leaf.dtype.itemsize * leaf.numel() for _, leaf in leaves) // WORD)
        self._groups: list[Group] = []
        used = 0
        for dtype in DTYPES:
            fields = []
            for key, leaf in leaves:
                if leaf.dtype == dtype:
                    strides = (self.words * WORD // dtype.itemsize, *torch.empty(leaf.shape, device="meta").stride())
                    fields.append(Field(key, tuple(leaf.shape), strides, used // dtype.itemsize))
                    used += leaf.numel() * dtype.itemsize
            if fields:
                self._groups.append((dtype, tuple(fields)))
        places = {field.key: place for place, field in enumerate(field for _, group in self._groups for field in group)}
        self._keys = tuple(places)
        self._tree = _node(element, places)
        # A batch says which rows it holds by the numbers that were drawn, not by what the rows say.
        sampled = [(dtype, tuple(field for field in fields if field.key != INDEX)) for dtype, fields in self._groups]
        self._sampled: list[Group] = [group for group in sampled if group[1]]

    def empty(self, rows: int) -> torch.Tensor:
        """Uninitialised rows: int64 ``[rows, words]``."""
        return torch.empty(rows, self.words, dtype=torch.int64, device=self.device)

    def view(self, rows: torch.Tensor) -> TensorDict:
        """A TensorDict ``[N]`` whose tensors are views of rows ``[N, words]``."""
        return self._tensordict(self._tree, _views(rows, self._groups), rows.shape[0])

    def difference(self, data: Any) -> str | None:
        """Why data ``[N]`` cannot be packed as it is, or None: other keys, dtypes, shapes, or a graph to keep."""
        found = dict(_leaves(data))
        for dtype, fields in self._groups:
            for key, shape, _, _ in fields:
                leaf = found.pop(key, None)
                if not isinstance(leaf, torch.Tensor) or leaf.dtype != dtype or tuple(leaf.shape[1:]) != shape:
                    return f"'{'.'.join(key)}' is not what it was in the first transition"
                if leaf.requires_grad:
                    return f"'{'.'.join(key)}' requires a gradient"
        return f"'{'.'.join(next(iter(found)))}' was not in the first transition" if found else None

    def pack(self, data: Any) -> torch.Tensor:
        """New rows ``[N, words]`` with a copy of data ``[N]``, which `difference` finds nothing in."""
        rows = self.empty(data.shape[0])
        for key, view in zip(self._keys, _views(rows, self._groups), strict=True):
            view.copy_(data.get(key))
        return rows

    def batch(self, rows: torch.Tensor, index: torch.Tensor) -> TensorDict:
        """Rows ``[B, words]`` that nothing else holds, as a batch ``[B]`` with ``index`` ``[B]``, without a copy."""
        return self._tensordict(self._tree, [index, *_views(rows, self._sampled)], rows.shape[0])

    def batches(self, rows: torch.Tensor, index: torch.Tensor, count: int) -> list[TensorDict]:
        """Rows ``[K * B, words]`` as ``K`` batches ``[B]``, of no common memory; ``index`` is ``[K * B]``."""
        size = len(index) // count
        views = [index, *_views(rows, self._sampled)]
        columns = [view.unflatten(0, (count, size)).unbind(0) for view in views]
        return [
            self._tensordict(self._tree, [leaf.data for leaf in leaves], size) for leaves in zip(*columns, strict=True)
        ]

    def _tensordict(self, node: Node, leaves: Sequence[torch.Tensor], rows: int) -> TensorDict:
        source: dict[str, Any] = {
            name: leaves[entry] if type(entry) is int else self._tensordict(entry, leaves, rows)  # type: ignore
            for name, entry in node.entries
        }
        return TensorDict._new_unsafe(source, batch_size=torch.Size((rows, *node.dims)), device=self.device)


def _views(rows: torch.Tensor, groups: Sequence[Group]) -> list[torch.Tensor]:
    """Fields of contiguous rows ``[N, words]``, as views ``[N, *shape]``.

    Views count their changes in place together, so that changing one key of a batch would forbid the backward pass
    through all others. Detached by ``.data``, each counts for itself, as if it were a copy.
    """
    views, count = [], (rows.shape[0],)
    for dtype, fields in groups:
        items = rows.view(dtype)
        views += [items.as_strided(count + shape, strides, offset).data for _, shape, strides, offset in fields]
    return views


def why_no_rows(element: Any) -> str | None:
    """Why a transition cannot be packed into a row, in words, or None if it can."""
    if type(element) is not TensorDict:
        return f"a transition is a {type(element).__name__}"
    if element.batch_dims:
        return f"a transition has batch dimensions of its own ({list(element.batch_size)})"
    if "index" not in element.keys():
        return "transitions were written without their index"
    for key, leaf in _leaves(element):
        name = ".".join(key)
        if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided or leaf.is_nested:
            return f"'{name}' is not a dense tensor"
        if leaf.dtype not in DTYPES:
            return f"'{name}' is {leaf.dtype}"
        if leaf.dtype == torch.uint8 and leaf.ndim >= 2:
            return f"'{name}' is an image (uint8 {list(leaf.shape)})"
        if leaf.requires_grad:
            return f"'{name}' requires a gradient"
    return None


def _leaves(data: Any, parents: Key = ()) -> Iterator[tuple[Key, Any]]:
    """All that lies in nested plain TensorDicts, and is not one."""
    for name, value in data.items():
        if type(value) is TensorDict:
            yield from _leaves(value, (*parents, name))
        else:
            yield (*parents, name), value


def _node(data: TensorDict, places: Mapping[Key, int], parents: Key = ()) -> Node:
    entries = tuple(
        (name, _node(value, places, key) if type(value) is TensorDict else places[key])
        for name, value, key in ((name, value, (*parents, name)) for name, value in data.items())
    )
    return Node(entries, tuple(data.batch_size))
