"""The rewrites of compiled products: what they compute stays the same, and what was slow is gone."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict, is_tensorclass
from torch import nn
from torch._dynamo.exc import RecompileError
from torch.fx.experimental.proxy_tensor import make_fx

from fp8rl_torchrl._inductor import _RewriteProducts, compiled
from fp8rl_torchrl.precision.convert import convert
from fp8rl_torchrl.precision.mode import Precision

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


@pytest.mark.parametrize(("terms", "width", "changed"), [(1, 64, True), (4, 64, True), (5, 64, False), (2, 8, False)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_of_few_terms_becomes_a_sum_that_fuses(terms, width, changed, transposed):
    x, weight = torch.randn(128, terms), torch.randn(*((width, terms) if transposed else (terms, width)))

    def product(x, w):
        return x.mm(w.t() if transposed else w)

    traced, _, after = rewritten(product, x, weight)
    assert (aten.mm.default not in after) is changed
    torch.testing.assert_close(traced(x, weight), product(x, weight))


def test_a_product_of_few_terms_in_low_precision_keeps_its_one_rounding():
    x, weight = torch.randn(128, 2, dtype=torch.bfloat16), torch.randn(2, 64, dtype=torch.bfloat16)
    _, before, after = rewritten(lambda x, w: x.mm(w), x, weight)
    assert before == after


class Model:
    """Something with a method to compile."""

    def __init__(self, *layers):
        self.module = nn.Sequential(*layers)

    def run(self, x):
        return self.module(x)

    def gradients(self, x):
        return torch.autograd.grad(F.relu(self.module(x)).square().mean(), list(self.module.parameters()))


@pytest.mark.slow
def test_compiled_gradients_are_the_same():
    x, model = torch.randn(256, 2), Model(nn.Linear(2, 64))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = compiled(model.gradients)(x)
    for ours, theirs in zip(found, model.gradients(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_changes_of_a_compiled_module_are_seen():
    """None is silently ignored: evaluation mode, another layer, a layer's own method, a conversion to FP8."""
    model, x = Model(nn.Linear(32, 32), nn.Dropout(0.9), nn.Linear(32, 32), nn.Linear(32, 2)), torch.randn(8, 32)
    run = compiled(model.run)
    run(x)
    model.module.eval()
    torch.testing.assert_close(run(x), model.run(x))
    model.module[0] = nn.Linear(32, 32)
    torch.testing.assert_close(run(x), model.run(x))
    model.module[3].forward = lambda inputs: inputs[:, :2] - 1
    torch.testing.assert_close(run(x), model.run(x))
    del model.module[3].forward
    high = model.run(x)
    convert(model.module, Precision("fp8", base="fp32"))
    torch.testing.assert_close(run(x), model.run(x))
    assert not torch.allclose(run(x), high, rtol=1e-3, atol=1e-3)


class Batch:
    """A method that meets what tensordict remembers of classes."""

    def total(self, x):
        return TensorDict({"x": x, "nested": {"y": x}}, [len(x)]).select("x", "nested").sum()["nested", "y"]


@pytest.mark.slow
def test_what_tensordict_remembers_does_not_compile_again():
    """An evaluation between two collections meets classes that tensordict had not seen."""
    x = torch.randn(8)
    ours, plain = compiled(Batch().total), torch.compile(Batch().total, fullgraph=True)
    ours(x), plain(x)
    is_tensorclass(type("Unseen", (), {})())
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(ours(x), x.sum())
        with pytest.raises(RecompileError):
            plain(x)


@pytest.mark.slow
def test_many_objects_do_not_use_up_each_others_compilations():
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        model, x = Model(nn.Linear(2, 2)), torch.randn(4, 2)
        torch.testing.assert_close(compiled(model.run)(x), model.run(x))
