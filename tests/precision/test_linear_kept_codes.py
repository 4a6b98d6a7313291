"""`Float8Linear` without gradients: a weight is cast once until it changes, by whatever way it changes."""

import pytest
import torch
from float8_layers import bf16, every_recipe, make, normal
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import func, nn
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

from fp8rl_torchrl.precision import linear_function
from fp8rl_torchrl.precision.linear import Float8Linear
from fp8rl_torchrl.precision.recipe import Cast

ROW = Cast("e4m3", "row")


@pytest.fixture
def casts(monkeypatch):
    """The shapes of what is cast."""
    shapes, original = [], linear_function.quantize

    def quantize(x, cast):
        shapes.append(tuple(x.shape))
        return original(x, cast)

    monkeypatch.setattr(linear_function, "quantize", quantize)
    return shapes


def casts_of_weight(casts, layer, calls=1):
    """How often a rollout's calls cast the weight."""
    casts.clear()
    with torch.no_grad():
        for _ in range(calls):
            layer(normal(8, 64))
    assert casts.count((8, 64)) == calls, "the input is cast at every call"
    return casts.count((48, 64))


def of_current_weight(layer):
    """What the layer should give: with gradients, nothing is kept."""
    x = normal(8, 64)
    with torch.no_grad():
        found = layer(x)
    return torch.equal(found, layer(x).detach())


@every_recipe
def test_a_weight_is_cast_once(casts, recipe):
    layer = make(recipe=recipe)
    assert casts_of_weight(casts, layer, calls=5) == 1
    assert casts_of_weight(casts, layer, calls=5) == 0
    with torch.inference_mode(), bf16():
        layer(normal(8, 64))
    assert casts.count((48, 64)) == 0
    assert of_current_weight(layer)


def by_optimizer(layer, kind, **options):
    layer(normal(8, 64)).sum().backward()
    kind(layer.parameters(), lr=0.01, **options).step()


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(1.5),
    "one element": lambda layer: layer.weight[3, 5].add_(1.0),
    "the last bit": lambda layer: layer.weight[3, 5].copy_(
        torch.nextafter(layer.weight[3, 5], layer.weight.new_tensor(10.0))
    ),
    "through .data": lambda layer: layer.weight.data.mul_(1.5),
    "new .data": lambda layer: setattr(layer.weight, "data", normal(48, 64, seed=5)),
    "through detach": lambda layer: layer.weight.detach().zero_(),
    "through numpy": lambda layer: layer.weight.detach().numpy().fill(1.0),
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(normal(48, 64, seed=5))),
    "load_state_dict": lambda layer: layer.load_state_dict(make(seed=3).state_dict()),
    "load_state_dict by assignment": lambda layer: layer.load_state_dict(make(seed=3).state_dict(), assign=True),
    "a TensorDict": lambda layer: TensorDict.from_module(make(seed=3)).data.to_module(layer),
    "SGD": lambda layer: by_optimizer(layer, torch.optim.SGD),
    "fused Adam": lambda layer: by_optimizer(layer, torch.optim.Adam, fused=True),
    "foreach Adam": lambda layer: by_optimizer(layer, torch.optim.Adam, foreach=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_cast_anew(casts, change):
    layer = make()
    with torch.no_grad():
        before = layer(normal(8, 64))
    with torch.set_grad_enabled("Adam" in change or "SGD" in change):
        CHANGES[change](layer)
    assert casts_of_weight(casts, layer, calls=3) == 1
    assert of_current_weight(layer)
    with torch.no_grad():
        assert torch.equal(layer(normal(8, 64)), before) == (change == "the last bit")


def test_a_write_that_changes_nothing_costs_no_cast(casts):
    layer = make()
    layer.weight.data[0, 0] = float("nan")  # equal in its bits, though not to itself
    assert casts_of_weight(casts, layer) == 1
    layer.weight.data.mul_(1)
    assert casts_of_weight(casts, layer) == 0


@pytest.mark.parametrize("change", ["in place", "through .data"])
def test_a_version_counter_would_not_do(monkeypatch, change):
    kept = {}

    def by_version(weight, cast):
        key = (id(weight), weight._version, cast)
        if key not in kept:
            kept[key] = linear_function.quantize(weight, cast)
        return kept[key]

    monkeypatch.setattr(linear_function, "_kept_codes", by_version)
    layer = make()
    assert of_current_weight(layer)
    with torch.no_grad():
        CHANGES[change](layer)
    assert of_current_weight(layer) == (change == "in place")


def test_a_target_network_is_cast_once_an_update(casts):
    network = nn.Sequential(make(64, 48), nn.ReLU(), nn.Linear(48, 4))
    actor = QValueActor(network, in_keys=["observation"], action_space="categorical", spec=None)
    loss = DQNLoss(actor, delay_value=True, action_space="categorical")
    loss.make_value_estimator(gamma=0.9)
    updater = SoftUpdate(loss, tau=0.1)
    x = normal(8, 64)

    def target():
        with torch.no_grad(), loss.target_value_network_params.to_module(loss.value_network):
            return loss.value_network[0].module(x) if hasattr(loss.value_network[0], "module") else network(x)

    casts.clear()
    first, second = target(), target()
    assert torch.equal(first, second)
    assert casts.count((48, 64)) == 1
    assert torch.equal(target(), network(x)), "at first the target is the network itself"
    with torch.no_grad():
        network[0].weight.mul_(1.5)
    casts.clear()
    updater.step()
    moved = target()
    assert not torch.equal(moved, first)
    assert not torch.equal(moved, network(x).detach())
    target()
    assert casts.count((48, 64)) == 2  # once for the target, once with gradients


@every_recipe
def test_with_gradients_nothing_is_kept(casts, recipe):
    layer = make(recipe=recipe)
    for _ in range(2):
        casts.clear()
        layer(normal(8, 64))
        assert casts.count((48, 64)) == 1


def test_under_vmap_nothing_is_kept(casts):
    layer, x = make(), normal(3, 8, 64)
    before = len(linear_function._kept)
    with torch.no_grad():
        for _ in range(2):
            casts.clear()
            func.vmap(layer)(x)
            assert casts.count((48, 64)) == 1
    assert len(linear_function._kept) == before


def test_what_is_kept_goes_with_the_weight():
    before = len(linear_function._kept)
    layer = make()
    with torch.no_grad():
        layer(normal(8, 64))
    assert len(linear_function._kept) == before + 1
    del layer
    assert len(linear_function._kept) == before


def test_two_recipes_on_one_weight_keep_codes_each(casts):
    row = make(recipe="rowwise")
    tensor = Float8Linear.from_linear(row, "tensorwise")
    assert casts_of_weight(casts, row) == 1
    assert casts_of_weight(casts, tensor) == 1
    assert casts_of_weight(casts, row) == 0
    assert casts_of_weight(casts, tensor) == 0
    assert of_current_weight(row)
    assert of_current_weight(tensor)


def test_a_policy_in_a_tensordict_module_keeps_them_too(casts):
    layer = make()
    policy = TensorDictModule(layer, ["observation"], ["out"])
    casts.clear()
    with torch.no_grad():
        for _ in range(3):
            policy(TensorDict({"observation": normal(8, 64)}, [8]))
    assert casts.count((48, 64)) == 1


def test_weights_of_other_dtypes_are_cast_each_time(casts):
    layer = make().bfloat16()
    assert casts_of_weight(casts, layer, calls=2) == 2


def test_a_frozen_weight_is_cast_once_also_where_gradients_are_enabled(casts):
    """TorchRL's value estimators call target networks with gradients enabled and parameters that need none."""
    layer = make()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    for _ in range(3):
        layer(normal(8, 64))
    assert casts.count((48, 64)) == 1
    casts.clear()
    x = normal(8, 64).requires_grad_()
    layer(x).sum().backward()  # the input's gradient needs the weight once more, the other way round
    assert x.grad.isfinite().all()
    assert casts.count((48, 64)) == 1
    assert casts.count((64, 48)) == 1
    casts.clear()
    layer.weight.requires_grad_(True)
    layer(normal(8, 64)).sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert casts.count((48, 64)) == 1
