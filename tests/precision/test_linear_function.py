"""The products of a `Float8Linear`: that codes are multiplied, how many times, what is saved; no second derivative."""

import pytest
import torch
from float8_layers import base, every_recipe, forward_and_backward, make, normal, watch
from torch import func, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8rl_torchrl.precision.linear_function import float8_product

M, K, N = 40, 64, 48


# --- FP8 it is ---


class Multiplications(TorchDispatchMode):
    """Counts what PyTorch itself multiplies."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        self.count += name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_mm", "mv", "dot", "einsum")
        return function(*args, **(kwargs or {}))


def nothing(left, left_scale, right, right_scale, *, out_dtype, **_):
    return torch.zeros(*left.shape[:-1], right.shape[-2], dtype=out_dtype)


FORMATS = {
    "rowwise": [("e4m3", "e4m3"), ("e4m3", "e4m3"), ("e4m3", "e4m3")],
    "tensorwise": [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e5m2", "e4m3")],
    "rowwise-gw-hp": [("e4m3", "e4m3"), ("e4m3", "e4m3")],
}
SHAPES = [((M, K), (N, K)), ((M, N), (K, N)), ((N, M), (K, M))]


@every_recipe
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_codes_are_multiplied_and_nothing_else(monkeypatch, recipe, name):
    products = watch(monkeypatch, nothing)
    with base(name), Multiplications() as others:
        layer, x, g = make(K, N, recipe), normal(M, K), normal(M, N, seed=2)
        y, grad_input, grad_weight = forward_and_backward(layer, x, g)
    assert products.formats == FORMATS[recipe]
    assert products.shapes == SHAPES[: len(products)]
    # The products that were replaced were all there were, but for one in high precision where the recipe says so.
    high_precision = recipe == "rowwise-gw-hp"
    assert others.count == high_precision
    assert not (y - layer.bias).abs().max() > 0.01  # the bias, as rounded to the output's dtype
    assert not grad_input.any()
    assert grad_weight.any() == high_precision


def test_a_plain_layer_would_be_found(monkeypatch):
    products = watch(monkeypatch, nothing)
    with Multiplications() as others:
        forward_and_backward(nn.Linear(K, N), normal(M, K), normal(M, N))
    assert not products
    assert others.count == 3


@every_recipe
def test_the_codes_cover_the_format(monkeypatch, recipe):
    # Real codes: many values, up to the end of the format, as scaling is for.
    products = watch(monkeypatch)
    forward_and_backward(make(K, N, recipe), normal(M, K), normal(M, N, seed=2))
    for operand in (operand for product in products for operand in product):
        end = torch.finfo(operand.dtype).max
        assert operand.float().unique().numel() > 50
        # to within the factor of two that rounding a scale to a power of two costs
        assert end / 2 <= operand.float().abs().max() <= end


@every_recipe
def test_without_gradients_only_the_forward_product_runs(monkeypatch, recipe):
    layer, products = make(K, N, recipe), watch(monkeypatch)
    with torch.no_grad():
        layer(normal(M, K))
    assert products.shapes == SHAPES[:1]


# --- what is saved for backward ---


def bytes_saved(layer, x, name="fp32"):
    """Of the tensors that autograd keeps, each counted once, without the parameters."""
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with base(name), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    return sum(size for pointer, size in saved.items() if pointer not in {p.data_ptr() for p in layer.parameters()})


@pytest.mark.parametrize(
    ("recipe", "name", "expected"),
    [
        ("rowwise", "fp32", M * K + 4 * K),  # codes along M, and a scale for each of K rows
        ("rowwise", "bf16", M * K + 4 * K),
        ("tensorwise", "fp32", M * K + 4),
        ("tensorwise", "bf16", M * K + 4),
        ("rowwise-gw-hp", "fp32", 4 * M * K),
        ("rowwise-gw-hp", "bf16", 2 * M * K),
    ],
)
def test_bytes_saved_for_backward(recipe, name, expected):
    assert bytes_saved(make(K, N, recipe), normal(M, K), name) == expected


def test_bytes_that_a_plain_layer_saves():
    assert bytes_saved(nn.Linear(K, N), normal(M, K)) == 4 * M * K


# --- a second derivative ---


def product(w, x, recipe):
    return float8_product(x, w, recipe, "auto").sum()  # linear: the first derivative is independent of the output


def squared(w, x, recipe):
    return float8_product(x, w, recipe, "auto").square().sum()


@every_recipe
@pytest.mark.parametrize("loss", [product, squared])
@pytest.mark.parametrize("first", ["weight", "input"])
@pytest.mark.parametrize("second", ["weight", "input"])
def test_a_second_derivative_raises_in_eager_mode(recipe, loss, first, second):
    tensors = {"weight": normal(N, K).requires_grad_(), "input": normal(M, K, seed=2).requires_grad_()}
    (gradient,) = torch.autograd.grad(loss(*tensors.values(), recipe), tensors[first], create_graph=True)
    with pytest.raises(RuntimeError, match="a Float8Linear cannot be differentiated twice"):
        torch.autograd.grad(gradient.sum(), tensors[second], allow_unused=True)
    (gradient,) = torch.autograd.grad(loss(*tensors.values(), recipe), tensors[first], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def nested(derivative, first, second):
    def inner(loss, w, x, recipe):
        return derivative(loss, first)(w, x, recipe)

    return lambda loss, w, x, recipe: func.grad(lambda *tensors: inner(loss, *tensors, recipe).sum(), second)(w, x)


@every_recipe
@pytest.mark.parametrize("loss", [product, squared])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_second_derivative_raises_under_torch_func(recipe, loss, first, second, mapped):
    twice = nested(func.grad, first, second)
    w, x = normal(N, K), normal(M, K, seed=2)
    if mapped:
        x, twice = x[:, None], func.vmap(twice, (None, None, 0, None))
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        twice(loss, w, x, recipe)


@every_recipe
@pytest.mark.parametrize("first", [0, 1])
def test_so_it_does_around_vmap_and_across_the_two_ways(recipe, first):
    w, x = normal(N, K), normal(M, K, seed=2)

    def gradient_of_mapped(w, x):
        losses = lambda *tensors: func.vmap(product, (None, 0, None))(*tensors, recipe).sum()  # noqa: E731
        return func.grad(losses, first)(w, x[:, None]).sum()

    for second in (0, 1):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            func.grad(gradient_of_mapped, second)(w, x)
    w.requires_grad_()
    x.requires_grad_()
    for tensor in (w, x):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(func.grad(product, first)(w, x, recipe).sum(), tensor, allow_unused=True)


def test_the_same_second_derivative_of_a_plain_product_is_not_zero():
    w, x = normal(N, K), normal(M, K, seed=2)
    plain = nested(func.grad, 0, 1)(lambda w, x, _: (x @ w.T).sum(), w, x, None)
    assert torch.equal(plain, torch.full((M, K), float(N)))


@every_recipe
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "hessian"])
def test_forward_mode_raises(recipe, transform):
    w, x = normal(N, K), normal(1, K, seed=2)

    def loss(x):
        return squared(w, x, recipe)

    run = (lambda x: func.jvp(loss, (x,), (x,))) if transform == "jvp" else getattr(func, transform)(loss)
    with pytest.raises(NotImplementedError, match="jvp"):
        run(x)


@every_recipe
def test_first_derivatives_with_create_graph_are_the_same(recipe):
    layer, x = make(K, N, recipe), normal(M, K).requires_grad_()
    expected = torch.autograd.grad(layer(x).sum(), (x, layer.weight))
    found = torch.autograd.grad(layer(x).sum(), (x, layer.weight), create_graph=True)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
