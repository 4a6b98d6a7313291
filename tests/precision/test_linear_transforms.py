"""`Float8Linear` under `torch.func` and as TorchRL calls networks: always what separate layers compute."""

import copy

import pytest
import torch
from float8_layers import base, every_recipe, forward_and_backward, make, normal, watch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import func, nn

from fp8rl_torchrl.precision.linear import Float8Linear

M, K, N, MEMBERS = 8, 32, 24, 3
both_bases = pytest.mark.parametrize("name", ["fp32", "bf16"])


def close(value, reference, summed="fp32"):
    """The same codes, summed in an order of their own; over members, in the base format."""
    assert value.shape == reference.shape
    assert value.dtype == reference.dtype
    bound = 1e-6 if value.dtype == torch.float32 and summed == "fp32" else 2**-8
    return bool((value.double() - reference.double()).norm() <= bound * reference.double().norm())


def ensemble(recipe):
    layers = [make(K, N, recipe, seed) for seed in range(MEMBERS)]
    parameters, _ = func.stack_module_state(layers)
    return layers, {name: each.detach() for name, each in parameters.items()}


def call(layer):
    """The layer as a function of its parameters."""
    return lambda parameters, x: func.functional_call(layer, parameters, (x,))


@every_recipe
@both_bases
@pytest.mark.parametrize("shared_input", [True, False])
def test_an_ensemble_is_its_members(recipe, name, shared_input):
    layers, parameters = ensemble(recipe)
    x = normal(M, K) if shared_input else normal(MEMBERS, M, K) * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    with base(name):
        found = func.vmap(call(layers[0]), (0, None if shared_input else 0))(parameters, x)
        for index, layer in enumerate(layers):
            with torch.no_grad():
                assert close(found[index], layer(x if shared_input else x[index]))
    assert not close(found[0], found[1])


@every_recipe
@both_bases
@pytest.mark.parametrize("shared_input", [True, False])
def test_the_gradients_of_an_ensemble_are_those_of_its_members(recipe, name, shared_input):
    layers, parameters = ensemble(recipe)
    parameters = {key: each.requires_grad_() for key, each in parameters.items()}
    x = (normal(M, K) if shared_input else normal(MEMBERS, M, K)).requires_grad_()
    g = normal(MEMBERS, M, N, seed=2)
    with base(name):
        y = func.vmap(call(layers[0]), (0, None if shared_input else 0))(parameters, x)
    grad_x, grad_w = torch.autograd.grad(y, (x, parameters["weight"]), g.to(y.dtype))
    members = []
    for index, layer in enumerate(layers):
        with base(name):
            members.append(forward_and_backward(layer, (x if shared_input else x[index]).detach(), g[index]))
        assert close(grad_w[index], members[-1][2])
    # An input that all share gets the sum.
    grads = torch.stack([member[1] for member in members])
    assert close(grad_x, grads.sum(0) if shared_input else grads, summed=name)


def test_an_ensemble_is_one_product_each_way(monkeypatch):
    layers, parameters = ensemble("rowwise")
    parameters["weight"].requires_grad_()
    products = watch(monkeypatch)
    x = normal(MEMBERS, M, K).requires_grad_()
    func.vmap(call(layers[0]))(parameters, x).sum().backward()
    assert products.shapes == [
        ((MEMBERS, M, K), (MEMBERS, N, K)),
        ((MEMBERS, M, N), (MEMBERS, K, N)),
        ((MEMBERS, N, M), (MEMBERS, K, M)),
    ]


@every_recipe
def test_one_layer_on_a_stack_of_inputs(recipe):
    layer, x = make(K, N, recipe), normal(MEMBERS, M, K)
    with torch.no_grad():
        found = func.vmap(layer)(x)
        assert all(close(found[index], layer(x[index])) for index in range(MEMBERS))
        last = func.vmap(layer, in_dims=2, out_dims=1)(x.movedim(0, 2))
        assert torch.equal(last, found.movedim(0, 1))


@every_recipe
def test_gradients_by_torch_func_are_autograds(recipe):
    layer, x, g = make(K, N, recipe), normal(M, K), normal(M, N, seed=2)
    y, grad_x, grad_w = forward_and_backward(layer, x, g)
    parameters = {name: each.detach() for name, each in layer.named_parameters()}
    found, pull = func.vjp(call(layer), parameters, x)
    gradients, of_x = pull(g)
    assert torch.equal(found, y)
    assert torch.equal(of_x, grad_x)
    assert torch.equal(gradients["weight"], grad_w)
    assert torch.equal(gradients["bias"], g.sum(0))
    (value, aux), (of_w, _) = func.grad_and_value(
        lambda parameters, x: ((call(layer)(parameters, x) * g).sum(), x), argnums=(0, 1), has_aux=True
    )(parameters, x)[::-1]
    assert torch.equal(value, (y * g).sum())
    assert aux is not None
    assert torch.equal(of_w["weight"], grad_w)


@every_recipe
def test_per_sample_gradients(recipe):
    layer, x, g = make(K, N, recipe), normal(M, K), normal(M, N, seed=2)
    parameters = {name: each.detach() for name, each in layer.named_parameters()}

    def loss(parameters, sample, grad):
        return (call(layer)(parameters, sample) * grad).sum()

    found = func.vmap(func.grad(loss), (None, 0, 0))(parameters, x, g)
    for sample in range(M):
        _, _, expected = forward_and_backward(layer, x[sample], g[sample])
        assert close(found["weight"][sample], expected)
    assert torch.equal(found["bias"], g)


@every_recipe
@both_bases
@pytest.mark.parametrize("order", ["members outside", "members inside"])
def test_nested_vmap(recipe, name, order):
    layers, parameters = ensemble(recipe)
    x = normal(5, M, K)  # five inputs for each of three members

    def run(parameters, x):
        if order == "members outside":
            one = func.vmap(call(layers[0]), (None, 0))
            return func.vmap(one, (0, None))(parameters, x)
        one = func.vmap(call(layers[0]), (0, None))
        return func.vmap(one, (None, 0), out_dims=1)(parameters, x)

    with base(name), torch.no_grad():
        found = run(parameters, x)
        assert found.shape == (MEMBERS, 5, M, N)
        for member, layer in enumerate(layers):
            for index in range(5):
                assert close(found[member, index], layer(x[index]))
    # and backward
    g = normal(MEMBERS, 5, M, N, seed=2)
    weights = {key: each.clone().requires_grad_() for key, each in parameters.items()}
    leaf = x.clone().requires_grad_()
    with base(name):
        y = run(weights, leaf)
    grad_x, grad_w = torch.autograd.grad(y, (leaf, weights["weight"]), g.to(y.dtype))
    of_x, of_w = torch.zeros_like(x), torch.zeros_like(weights["weight"])
    for member, layer in enumerate(layers):
        for index in range(5):
            with base(name):
                _, one_x, one_w = forward_and_backward(layer, x[index], g[member, index])
            of_x[index] += one_x
            of_w[member] += one_w
    assert close(grad_x, of_x, summed=name)
    assert close(grad_w, of_w)


@every_recipe
def test_gradients_of_members_inside_vmap(recipe):
    # As an ensemble's own update: grad inside vmap, the samples mapped once more inside.
    layers, parameters = ensemble(recipe)
    x, g = normal(MEMBERS, M, K), normal(M, N, seed=2)

    def loss(parameters, x):
        return (func.vmap(call(layers[0]), (None, 0))(parameters, x[:, None]).squeeze(1) * g).sum()

    found = func.vmap(func.grad(loss))(parameters, x)["weight"]
    for member, layer in enumerate(layers):
        samples = [forward_and_backward(layer, x[member, row : row + 1], g[row : row + 1])[2] for row in range(M)]
        assert close(found[member], torch.stack(samples).sum(0))


def test_vmap_over_weights_alone_leaves_the_input_as_it_is():
    layers, parameters = ensemble("rowwise")
    x = normal(M, K)
    per_column = func.vmap(call(layers[0]), ({"weight": 2, "bias": 1}, None))(
        {"weight": parameters["weight"].movedim(0, 2), "bias": parameters["bias"].movedim(0, 1)}, x
    )
    assert torch.equal(per_column, func.vmap(call(layers[0]), (0, None))(parameters, x))


# --- as TorchRL does it ---


def network(recipe, seed):
    return nn.Sequential(make(K, N, recipe, seed), nn.Tanh(), make(N, 16, recipe, seed + 100))


@every_recipe
def test_parameters_come_and_go_by_tensordict(recipe):
    one, other = network(recipe, 0), network(recipe, 1)
    x = normal(M, K)
    with torch.no_grad():
        mine, others = one(x), other(x)
        for parameters in (TensorDict.from_module(other), TensorDictParams(TensorDict.from_module(other).data)):
            with parameters.to_module(one):
                assert torch.equal(one(x), others)
            assert torch.equal(one(x), mine)
    with TensorDict.from_module(other).to_module(one):
        one(x).sum().backward()
    assert one[0].weight.grad is None
    expected = copy.deepcopy(other)
    expected.zero_grad()
    expected(x).sum().backward()
    assert torch.equal(other[0].weight.grad, expected[0].weight.grad)


@every_recipe
def test_a_stack_of_networks_by_tensordict(recipe):
    # What LossModule does for critics: stacked TensorDictParams, vmap over a TensorDictModule.
    members = [network(recipe, seed) for seed in range(MEMBERS)]
    parameters = TensorDictParams(TensorDict.from_modules(*members, as_module=False))
    module = TensorDictModule(network(recipe, 9), ["observation"], ["value"])
    data = TensorDict({"observation": normal(M, K)}, [M])

    def run(data, parameters):
        with TensorDict({"module": parameters}).to_module(module):
            return module(data)

    found = func.vmap(run, (None, 0))(data, parameters)["value"]
    found.square().sum().backward()
    for index, member in enumerate(members):
        copied = copy.deepcopy(member)
        expected = copied(data["observation"])
        expected.square().sum().backward()
        assert close(found[index].detach(), expected.detach())
        # The second layer casts what the first one handed on; where a sum differed in its last bit, so may a code.
        for key in ("0", "2"):
            gradient, reference = parameters[key, "weight"].grad[index], copied.get_submodule(key).weight.grad
            assert (gradient - reference).norm() <= 1e-3 * reference.norm()


def test_a_plain_layer_in_its_place_would_be_noticed():
    layers, parameters = ensemble("rowwise")
    x = normal(M, K)
    plain = func.vmap(call(Float8Linear.to_linear(layers[0])), (0, None))(parameters, x)
    assert not close(plain, func.vmap(call(layers[0]), (0, None))(parameters, x))
