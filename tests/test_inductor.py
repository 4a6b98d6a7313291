"""The rewrites of compiled products: what they compute stays the same, and what was slow is gone."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fp8rl_torchrl._inductor import _RewriteProducts, compile_options

aten = torch.ops.aten


def rewritten(function, *arguments):
    """The graph of a function, with values as a compiler has them, before and after."""
    traced = make_fx(function, tracing_mode="fake")(*arguments)
    before = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    _RewriteProducts()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    after = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    return traced, before, after


def test_a_bias_is_added_after_the_product():
    x, weight, bias = torch.randn(32, 8), torch.randn(64, 8), torch.randn(64)
    traced, before, after = rewritten(lambda x, w, b: torch.addmm(b, x, w.t()), x, weight, bias)
    assert aten.addmm.default in before
    assert aten.addmm.default not in after
    torch.testing.assert_close(traced(x, weight, bias), F.linear(x, weight, bias))


def test_a_scaled_product_is_left_alone():
    x, weight, bias = torch.randn(32, 8), torch.randn(8, 64), torch.randn(64)
    _, before, after = rewritten(lambda x, w, b: torch.addmm(b, x, w, beta=2.0), x, weight, bias)
    assert before == after


@pytest.mark.parametrize(("width", "swapped"), [(2, True), (15, True), (16, False), (64, False)])
def test_the_weight_gradient_of_a_narrow_layer_is_transposed(width, swapped):
    gradient, x = torch.randn(128, 64), torch.randn(128, width)
    traced, before, after = rewritten(lambda g, x: g.t().mm(x), gradient, x)
    assert (before != after) is swapped
    torch.testing.assert_close(traced(gradient, x), gradient.t() @ x)


def test_a_forward_product_with_few_columns_is_left_alone():
    _, before, after = rewritten(lambda x, w: x.mm(w), torch.randn(128, 64), torch.randn(64, 2))
    assert before == after


@pytest.mark.slow
def test_compiled_gradients_are_the_same():
    x, weight, bias = torch.randn(256, 2), torch.randn(64, 2, requires_grad=True), torch.randn(64, requires_grad=True)

    def loss():
        return F.relu(F.linear(x, weight, bias)).square().mean()

    expected = torch.autograd.grad(loss(), (weight, bias))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, options=compile_options())(), (weight, bias))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
