"""`Float8Linear` compiled: the codes of the eager run, also if the compiler would rather not round."""

import pytest
import torch
from float8_layers import base, bf16, every_recipe, forward_and_backward, make, normal
from torch import func, nn

from fp8rl_torchrl.precision.quantize import quantize
from fp8rl_torchrl.precision.recipe import Cast

M, K, N = 40, 64, 48


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def without_rounding(x, w, g):
    """What a compiler makes of FP8 if it deletes casts there and back."""
    return x @ w.T, g @ w, g.T @ x


def compiled_layer(layer, x, g, name="fp32", **options):
    fast = torch.compile(layer, fullgraph=True, **options)
    leaf = x.clone().requires_grad_()
    with base(name):
        y = fast(leaf)
    return y.detach(), *torch.autograd.grad(y, (leaf, layer.weight), g.to(y.dtype))


def assert_the_same_and_rounded(found, eager, x, w, g):
    for value, expected, unrounded in zip(found, eager, without_rounding(x, w, g), strict=True):
        # The products are the same calls on the same codes; the factors that follow may be fused, and rounded once.
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
        distance = (unrounded - expected).norm() / expected.norm()
        assert distance > 0.02, "without rounding, this comparison would have failed"


def test_forward_and_backward():
    layer, x, g = make(K, N, bias=False), normal(M, K), normal(M, N, seed=2)
    x[0] *= 100
    found, eager = compiled_layer(layer, x, g), forward_and_backward(layer, x, g)
    assert_the_same_and_rounded(found, eager, x, layer.weight.detach(), g)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_codes_are_eagers_bit_by_bit(format, scaling, power_of_two):
    cast, x = Cast(format, scaling, power_of_two), normal(M, K) * torch.logspace(-6, 6, M)[:, None]

    def there_and_back(x):  # the cast and its inverse in one graph, as the compiler would like to cancel them
        codes, scale = quantize(x, cast)
        return codes.view(torch.uint8), scale, codes.float() / scale

    fast = torch.compile(there_and_back, fullgraph=True)(x)
    eager = there_and_back(x)
    assert torch.equal(fast[0], eager[0])
    assert torch.equal(fast[1], eager[1])
    torch.testing.assert_close(fast[2], eager[2], rtol=1e-6, atol=0)
    assert (fast[2] - x).norm() > 0.01 * x.norm()


@pytest.mark.slow
@every_recipe
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_each_recipe(recipe, name):
    layer, x, g = make(K, N, recipe), normal(M, K), normal(M, N, seed=2)
    found = compiled_layer(layer, x, g, name)
    with base(name):
        eager = forward_and_backward(layer, x, g)
    # The gradient of an FP32 input may skip a last rounding to BF16.
    for value, expected, bound in zip(found, eager, (1e-6, 1e-6 if name == "fp32" else 2**-8, 1e-6), strict=True):
        assert value.dtype == expected.dtype
        assert (value - expected).norm() <= bound * expected.norm()


@pytest.mark.slow
@every_recipe
def test_dynamic_batch(recipe):
    layer = make(K, N, recipe, bias=False)
    fast = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (40, 17, 2):
        x, g = normal(m, K).requires_grad_(), normal(m, N, seed=2)
        y = fast(x)
        found = y.detach(), *torch.autograd.grad(y, (x, layer.weight), g)
        for value, expected in zip(found, forward_and_backward(layer, x.detach(), g), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_without_gradients_a_changed_weight_is_seen():
    layer, x = make(K, N), normal(M, K)
    fast = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-6, atol=1e-6)
            layer.weight.data.mul_(1.7)


@pytest.mark.slow
def test_an_ensemble_under_vmap():
    layers = [make(K, N, seed=seed) for seed in range(3)]
    parameters, _ = func.stack_module_state(layers)
    x = normal(M, K)

    def loss(parameters, x):
        y = func.vmap(lambda p, x: func.functional_call(layers[0], p, (x,)), (0, None))(parameters, x)
        return y.square().mean()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = {name: each.detach().clone().requires_grad_() for name, each in parameters.items()}
        value = function(leaves, x)
        value.backward()
        results.append((value.detach(), leaves["weight"].grad, leaves["bias"].grad))
    for eager, fast in zip(*results, strict=True):
        assert (fast - eager).norm() <= 1e-5 * eager.norm()


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_layers_in_a_row_inside_autocast(activation):
    # Left to itself, the compiler keeps FP32 numbers between layers where there should be BF16 ones. They become other
    # codes: the gradient of the first weight was off by a tenth.
    network = nn.Sequential(make(K, N), activation(), make(N, 32, seed=1), activation(), nn.Linear(32, 4))
    x = normal(M, K)

    def loss(x):
        with bf16():
            y = network(x)
        return y.float().square().mean()

    loss(x).backward()
    eager = {name: each.grad.clone() for name, each in network.named_parameters()}
    network.zero_grad()
    torch.compile(loss, fullgraph=True)(x).backward()
    for name, parameter in network.named_parameters():
        # Sums over the batch, of biases, are the compiler's own.
        bound = 2**-8 if "bias" in name else 1e-6
        assert (parameter.grad - eager[name]).norm() <= bound * eager[name].norm(), name
