"""What the tests of `Float8Linear` share: layers, data, and what its products should be, in plain float64."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

from fp8rl_torchrl.precision import linear_function
from fp8rl_torchrl.precision.linear import Float8Linear

RECIPES = ("rowwise", "tensorwise", "rowwise-gw-hp")
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def base(name):
    """The caller's autocast: none for ``fp32``."""
    return bf16() if name == "bf16" else contextlib.nullcontext()


def normal(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(k=64, n=48, recipe="rowwise", seed=0, **options):
    torch.manual_seed(seed)
    return Float8Linear(k, n, recipe=recipe, **options)


def network(recipe="rowwise", k=64, n=48):
    """Two FP8 layers and a plain last one, of 4 outputs."""
    return nn.Sequential(
        make(k, n, recipe), nn.ReLU(inplace=True), make(n, 32, recipe, seed=1), nn.Tanh(), nn.Linear(32, 4)
    )


def plain(module):
    """A copy with ordinary layers."""
    copied = copy.deepcopy(module)
    for layer in copied.modules():
        if isinstance(layer, Float8Linear):
            layer.__class__ = nn.Linear
    return copied


def relative(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def forward_and_backward(layer, x, g):
    """Output, gradient of the input, gradient of the weight."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight), g.to(y.dtype))


def in_high_precision(layer, x, g):
    """The same three in float64."""
    x, w, g = x.double(), layer.weight.detach().double(), g.double()
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    return x @ w.mT + bias, g @ w, g.flatten(0, -2).mT @ x.flatten(0, -2)


def rounded(x, format, scaling, power_of_two=True):
    """What FP8 makes of a matrix, by the textbook and one row at a time, in float64."""
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[format]
    end = {"e4m3": 448.0, "e5m2": 57344.0}[format]
    groups = x if scaling == "row" else x.reshape(1, -1)
    rows = []
    for row in groups.double():
        scale = end / max(row.abs().max().item(), 1e-12)
        # The scale itself is a float32.
        scale = 2.0 ** math.floor(math.log2(scale)) if power_of_two else torch.tensor(scale).float().item()
        codes = (row.float() * scale).clamp(-end, end).to(dtype)
        rows.append(codes.double() / scale)
    return torch.stack(rows).reshape(x.shape)


def by_the_textbook(recipe, x, w, g):
    """The three products of a recipe for ``x [M, K]``, ``w [N, K]``, ``g [M, N]``, in float64."""

    def product(left, right, casts):
        (a, a_scaling), (b, b_scaling) = casts
        power_of_two = recipe != "tensorwise"
        return rounded(left, a, a_scaling, power_of_two) @ rounded(right, b, b_scaling, power_of_two).mT

    row, tensor = ("e4m3", "row"), ("e4m3", "tensor")
    casts = {
        "rowwise": ((row, row), (row, row), (row, row)),
        "tensorwise": ((tensor, tensor), (("e5m2", "tensor"), tensor), (("e5m2", "tensor"), tensor)),
        "rowwise-gw-hp": ((row, row), (row, tensor), None),
    }[recipe]
    grad_weight = product(g.mT, x.mT, casts[2]) if casts[2] else g.double().mT @ x.double()
    return product(x, w, casts[0]), product(g, w.mT, casts[1]), grad_weight


class Products(list):
    """The products of codes that run while it watches: pairs of operands, ``(left, right)``."""

    @property
    def formats(self):
        short = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
        return [(short[left.dtype], short[right.dtype]) for left, right in self]

    @property
    def shapes(self):
        return [(tuple(left.shape), tuple(right.shape)) for left, right in self]

    @property
    def bits(self):
        return [(left.view(torch.uint8), right.view(torch.uint8)) for left, right in self]


def watch(monkeypatch, multiply=None):
    """Note each product; ``multiply`` replaces the multiplication."""
    products = Products()
    original = linear_function.scaled_matmul

    def scaled_matmul(left, left_scale, right, right_scale, **options):
        products.append((left, right))
        return (multiply or original)(left, left_scale, right, right_scale, **options)

    monkeypatch.setattr(linear_function, "scaled_matmul", scaled_matmul)
    return products
