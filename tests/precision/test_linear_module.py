"""`Float8Linear` as a module: on the parameters of a plain layer, copied, saved, frozen, without gradients."""

import copy
import io
import pickle

import pytest
import torch
from float8_layers import bf16, every_recipe, make, normal, watch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fp8rl_torchrl.precision.linear import Float8Linear


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_recipe
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_computes_the_same_and_stands_alone(recipe, copied, used):
    layer, x = make(recipe=recipe, backend="emulated").eval(), normal(8, 64)
    if used:  # with a gradient, and with codes that are kept
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
    other = copied(layer)
    assert type(other) is Float8Linear
    assert (other.recipe, other.backend, other.training) == (recipe, "emulated", False)
    before = layer(x)
    with torch.no_grad():
        assert torch.equal(other(x), before)
        other.weight.zero_()
        assert torch.equal(other(x), layer.bias.expand(8, 48))
        assert torch.equal(layer(x), before)


@every_recipe
def test_the_state_dict_is_that_of_a_plain_layer(recipe):
    layer, plain = make(recipe=recipe), nn.Linear(64, 48)
    with torch.no_grad():
        layer(normal(8, 64))
    assert list(layer.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.weight, layer.weight)
    other = Float8Linear(64, 48, recipe=recipe)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(normal(8, 64)), layer(normal(8, 64)))


@every_recipe
def test_from_linear_shares_the_parameters(recipe):
    plain = nn.Linear(64, 48)
    layer = Float8Linear.from_linear(plain, recipe, "emulated")
    assert (layer.recipe, layer.backend) == (recipe, "emulated")
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    layer(normal(8, 64)).sum().backward()
    assert plain.weight.grad is not None
    # An optimizer that was made for the plain layer trains this one.
    before = layer(normal(8, 64)).detach()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert not torch.equal(layer(normal(8, 64)), before)
    assert type(plain) is nn.Linear
    assert "recipe" not in plain.__dict__


def test_from_linear_keeps_mode_freezing_and_hooks():
    plain, calls = nn.Linear(64, 48, bias=False).eval(), []
    plain.weight.requires_grad_(False)
    plain.register_forward_pre_hook(lambda module, args: calls.append(type(module)))
    plain.register_forward_hook(lambda module, args, output: output * 0)
    layer = Float8Linear.from_linear(plain)
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.bias is None
    assert not layer(normal(8, 64)).any()
    assert calls == [Float8Linear]


def test_what_happens_to_one_layer_leaves_the_other_alone():
    plain = nn.Linear(64, 48)
    layer = Float8Linear.from_linear(plain)
    layer.register_forward_hook(lambda *_: 1 / 0)
    layer.register_buffer("extra", torch.zeros(1), persistent=False)
    layer.weight = nn.Parameter(torch.zeros(48, 64))
    assert plain(normal(8, 64)).any()
    assert list(plain.state_dict()) == ["weight", "bias"]
    assert not list(plain.buffers())
    assert not plain._non_persistent_buffers_set
    plain.train(False)
    assert layer.training


def test_there_and_back():
    layer = make(recipe="tensorwise")
    other = Float8Linear.from_linear(layer, "rowwise")
    assert (layer.recipe, other.recipe) == ("tensorwise", "rowwise")
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert plain.weight is layer.weight
    assert set(vars(plain)) == set(vars(nn.Linear(1, 1)))


@pytest.mark.parametrize("kind", ["lazy", "parametrized", "a subclass"])
def test_from_linear_refuses_what_it_would_change(kind):
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    linear = {
        "lazy": lambda: nn.LazyLinear(48),
        "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 48)),
        "a subclass": lambda: Scaled(64, 48),
    }[kind]()
    with pytest.raises(TypeError, match=f"takes a torch.nn.Linear; got a {type(linear).__name__}, whose own ways"):
        Float8Linear.from_linear(linear)


def test_a_weight_shared_by_two_layers_gathers_both_gradients():
    one, two, x, g = make(seed=0), make(seed=1), normal(8, 64), normal(8, 48, seed=2)
    two.weight = one.weight
    (first,) = torch.autograd.grad(one(x), one.weight, g)
    (second,) = torch.autograd.grad(two(3 * x), one.weight, g)
    torch.autograd.backward((one(x), two(3 * x)), (g, g))
    assert torch.equal(one.weight.grad, first + second)


def test_frozen_parameters_get_no_gradient_and_the_input_does(monkeypatch):
    layer, x, g = make(), normal(8, 64).requires_grad_(), normal(8, 48, seed=2)
    (expected,) = torch.autograd.grad(layer(x), x, g)
    layer.requires_grad_(False)
    products = watch(monkeypatch)
    layer(x).backward(g)
    assert layer.weight.grad is None
    assert torch.equal(x.grad, expected)
    assert products.shapes == [((8, 64), (48, 64)), ((8, 48), (64, 48))]


def test_an_input_without_gradient_costs_no_product(monkeypatch):
    layer, products = make(), watch(monkeypatch)
    layer(normal(8, 64)).backward(normal(8, 48))
    assert layer.weight.grad is not None
    assert products.shapes == [((8, 64), (48, 64)), ((48, 8), (64, 8))]


@every_recipe
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(recipe, context):
    layer, x = make(recipe=recipe), normal(8, 64)
    expected = layer(x)
    with bf16():
        low = layer(x)
    with context():
        for _ in range(2):
            assert torch.equal(layer(x), expected)
            with bf16():
                assert torch.equal(layer(x), low)
        assert not layer(x).requires_grad
    assert expected.requires_grad
    with torch.no_grad():  # codes that were made in inference mode serve here
        assert torch.equal(layer(x), expected)


@every_recipe
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(recipe, reentrant):
    layer, x, g = make(recipe=recipe), normal(8, 64).requires_grad_(), normal(8, 48, seed=2)
    expected = torch.autograd.grad(layer(x), (x, layer.weight), g)
    checkpoint(layer, x, use_reentrant=reentrant).backward(g)
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(layer.weight.grad, expected[1])


def test_it_moves_and_casts_like_any_module():
    layer, x = make(), normal(8, 64)
    expected = layer(x)
    doubled = copy.deepcopy(layer).double()
    assert torch.equal(doubled(x.double()).float(), expected)  # the masters are FP32 numbers
    assert doubled(x).dtype == torch.float32
    half = copy.deepcopy(layer).bfloat16()
    half(x).sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16
    assert "emulated" in repr(copy.deepcopy(layer).to("meta"))
