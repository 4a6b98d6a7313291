"""`compiled`: `torch.compile` for methods of objects, with rewrites of what Inductor makes slow on a CPU."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.inductor_prims import force_stride_order

NARROW = 16
"""Matrices with fewer columns than this are narrow: MKL multiplies some layouts of them at a tenth of its speed."""

FEW = 4
"""Products of so few terms join what follows them; as a product, they are written to memory and read again."""

aten = torch.ops.aten


class _RewriteProducts(CustomGraphPass):
    """Rewrites matrix products of small networks on a CPU.

    - ``addmm`` first copies the bias into every row of the result. As a product and an addition, the addition joins the
      activation that follows.
    - The gradient of a layer's weight is ``gᵀ x``, which for a narrow input takes as long as for 64 columns; the same
      as ``(xᵀ g)ᵀ`` takes what it should.
    - A product of a few terms, such as that of a layer on a short observation, is written out as their sum, which joins
      the activation that follows.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.op != "call_function" or not _on_cpu(node):
                continue
            if node.target is aten.addmm.default and not node.kwargs:
                bias, left, right = node.args
                with graph.inserting_before(node):
                    product = _call(graph, aten.mm.default, left, right)
                    _replace(graph, node, _call(graph, aten.add.Tensor, product, bias))
        for node in list(graph.nodes):
            if node.op != "call_function" or not _on_cpu(node):
                continue
            if node.target is aten.mm.default and _has_few_terms(node):
                left, right = node.args
                with graph.inserting_before(node):
                    _replace(graph, node, _outer_products(graph, left, right))
            elif node.target is aten.mm.default and _is_narrow_weight_gradient(node):
                left, right = node.args
                with graph.inserting_before(node):
                    swapped = [_call(graph, aten.permute.default, each, [1, 0]) for each in (right, left)]
                    product = _call(graph, aten.mm.default, *swapped)
                    _replace(graph, node, _call(graph, aten.permute.default, product, [1, 0]))

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _on_cpu(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _is_narrow_weight_gradient(node: torch.fx.Node) -> bool:
    value = node.meta["val"]
    rows = node.args[0].meta["val"].shape[1]  # pyright: ignore
    return value.shape[1] < NARROW <= value.shape[0] and bool(rows > value.shape[0])


def _has_few_terms(node: torch.fx.Node) -> bool:
    left, right = (each.meta["val"] for each in node.args)  # pyright: ignore
    return left.dtype == torch.float32 and left.shape[1] <= FEW and right.shape[1] >= NARROW


def _outer_products(graph: torch.fx.Graph, left: torch.fx.Node, right: torch.fx.Node) -> torch.fx.Node:
    total: torch.fx.Node | None = None
    right = _call(graph, force_stride_order, right, (right.meta["val"].shape[1], 1))
    for term in range(left.meta["val"].shape[1]):
        column = _call(graph, aten.slice.Tensor, left, 1, term, term + 1)
        row = _call(graph, aten.slice.Tensor, right, 0, term, term + 1)
        product = _call(graph, aten.mul.Tensor, column, row)
        total = product if total is None else _call(graph, aten.add.Tensor, total, product)
    assert total is not None
    return total


def _call(graph: torch.fx.Graph, target: Any, *arguments: Any) -> torch.fx.Node:
    node = graph.call_function(target, arguments)
    values = [each.meta["val"] if isinstance(each, torch.fx.Node) else each for each in arguments]
    node.meta["val"] = target(*values)
    return node


def _replace(graph: torch.fx.Graph, old: torch.fx.Node, new: torch.fx.Node) -> None:
    old.replace_all_uses_with(new)
    graph.erase_node(old)


_CODE = ("MODULE_MATCH", "BUILTIN_MATCH", "CLASS_MATCH", "CLOSURE_MATCH")
"""Guards on Python's own modules, on functions and on classes."""


def _worth_watching(guards: Sequence[Any]) -> list[bool]:
    """Which guards are evaluated before every call; watching everything took a tenth of a short update.

    Modules are watched, with their layers and modes, and so are tensors and settings. Not watched is code that
    only a patch of a running program would change: functions and classes of Python's modules, and attributes that an
    object could hide a method with, unless the object is an `nn.Module`, where that is usual. Nor is what tensordict
    remembers of classes: its dicts grow when anything else uses another class, such as an evaluation, and each would
    have everything compiled again.
    """
    kept = []
    for guard in guards:
        patched = guard.guard_type in _CODE and not guard.name.startswith("self.")
        hidden = guard.guard_type == "NOT_PRESENT_IN_GENERIC_DICT" and not isinstance(guard.value, torch.nn.Module)
        kept.append(not (patched or hidden or "_MEMO" in guard.name))
    return kept


def compiled(method: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a method of one object, as one graph.

    The compiled method has a code object of its own: PyTorch counts compilations by code object, and gives up after
    some, so that otherwise the objects of one class would use up each other's.

    Args:
        method: A bound method.
        **options: Further options of Inductor.
    """
    assert isinstance(method, types.MethodType)
    function: Any = method.__func__
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    options = {
        "post_grad_custom_post_pass": _RewriteProducts(),
        "guard_filter_fn": _worth_watching,
        # Vectors that are filled in part are copied number by number: slower than the plain loop over a few logits.
        "cpp.enable_loop_tail_vec": False,
        **options,
    }
    return torch.compile(types.MethodType(own, method.__self__), fullgraph=True, options=options)
