"""`convert` in place: objects, hooks and optimizers stay, and whatever refers to a layer sees what became of it."""

import copy
import functools
import io

import pytest
import torch
from converted_models import ACTIONS, MODELS, chain, float8, logits_actor, normal_actor, tensordict
from float8_layers import watch
from torch import nn
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import A2CLoss, SACLoss

from fp8rl_torchrl.precision.convert import ConversionError, convert
from fp8rl_torchrl.precision.linear import Float8Linear


@pytest.fixture
def model():
    """Layers ``0``, ``2`` and ``4``, of which the first two are for FP8."""
    return chain(24, 40, 56, 4)


def test_layers_and_parameters_stay_the_same_objects(model):
    layers, parameters = list(model.modules()), dict(model.named_parameters())
    model[0].weight.requires_grad_(False)
    model[2].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    convert(model, "fp8")
    assert all(new is old for new, old in zip(model.modules(), layers, strict=True))
    assert {name: id(each) for name, each in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert [model[0].training, model[2].training] == [True, False]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    chain(24, 40, 56, 4).load_state_dict(model.state_dict())


def test_an_optimizer_goes_on(model):
    x = torch.randn(8, 24)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    convert(model, "fp8")
    assert set(optimizer.state) == set(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(not torch.equal(optimizer.state[p]["exp_avg"], old) for p, old in moments.items())
    assert {optimizer.state[p]["step"].item() for p in model.parameters()} == {2}


def test_hooks_still_run_once_and_can_be_removed(model):
    calls = []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: calls.append("before")),
        model[0].register_forward_hook(lambda *_: calls.append("after")),
        model[0].register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    convert(model, "fp8")
    model(torch.ones(2, 24, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(torch.ones(2, 24)).sum().backward()
    assert len(calls) == 3


def test_whatever_refers_to_a_layer_sees_it(monkeypatch):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(24, 40), nn.Linear(40, 56), nn.Linear(56, 4)]  # a plain list, which runs
            for place, layer in enumerate(self.layers):
                self.add_module(f"layer{place}", layer)
            self.first = functools.partial(self.layers[0])

        def forward(self, x):
            x = self.first(x)
            for layer in self.layers[1:]:
                x = layer(x)
            return x

    model = Module()
    convert(model, "fp8")
    products = watch(monkeypatch)
    model(torch.ones(2, 24))
    assert products.shapes == [((2, 24), (40, 24)), ((2, 40), (56, 40))]


def test_a_layer_used_in_two_places_is_one():
    shared = nn.Linear(24, 40)
    model = nn.ModuleDict(
        {"actor": nn.Sequential(shared, nn.Linear(40, 6)), "critic": nn.Sequential(shared, nn.Linear(40, 1))}
    )
    report = convert(model, "fp8")
    assert [layer.name for layer in report.layers] == ["actor.0", "actor.1", "critic.1"]
    assert model["critic"][0] is model["actor"][0] is shared
    assert type(shared) is Float8Linear
    # Either name is good for skip.
    with pytest.raises(ConversionError, match=r"actor\.0: matched by skip='critic\.0'"):
        convert(model, "fp8", skip=("critic.0",))


@pytest.mark.parametrize("name", ["agent", "agent-continuous", "agent-separate"])
def test_the_views_of_an_agent_see_it(name, monkeypatch):
    agent = MODELS[name].build()
    views = agent.policy, agent.value, agent._parts
    report = convert(agent, "fp8")
    assert (agent.policy, agent.value, agent._parts) == views
    products, critic = watch(monkeypatch), 2
    actor = len(report.converted) // (1 if agent.shared else 2)
    agent.policy(tensordict())
    assert len(products) == actor
    agent.value(tensordict())
    assert len(products) == actor + critic
    agent.distribution_and_value(tensordict())
    assert len(products) == actor + critic + len(report.converted)
    agent.state_value(tensordict())
    assert len(products) == actor + critic + len(report.converted) + critic


def test_losses_built_before_see_it(monkeypatch):
    actor, value = logits_actor(24, 40), ValueOperator(MLP(24, 1, num_cells=[56]), ["observation"])
    a2c = A2CLoss(actor, value)
    policy, q = normal_actor(24, 40), ValueOperator(MLP(24 + ACTIONS, 1, num_cells=[56]), ["observation", "action"])
    sac = SACLoss(policy, q, action_spec=None, target_entropy=-1.0)
    for network in (actor, value, policy, q):
        convert(network, "fp8")
    products = watch(monkeypatch)
    rows = tensordict().detach()
    done = torch.zeros(rows.numel(), 1, dtype=torch.bool)
    following = {"observation": rows["observation"], "reward": done.float(), "done": done, "terminated": done}
    rows.update({"action": torch.zeros(rows.numel(), dtype=torch.long), "next": following})
    rows.update({"advantage": done.float(), "value_target": done.float()})
    a2c(rows)
    assert {right for _, right in products.shapes} == {(40, 24), (56, 24)}
    products.clear()
    sac(rows.set("action", torch.zeros(rows.numel(), ACTIONS)))
    # Two critics, of which each product is one.
    assert {right for _, right in products.shapes} == {(40, 24), (2, 56, 24 + ACTIONS)}


def test_saved_and_loaded(model):
    convert(model, "fp8-tensorwise")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other, x = torch.load(buffer, weights_only=False), torch.randn(4, 24)
    assert list(float8(other)) == ["0", "2"]
    assert torch.equal(other(x), model(x))
    assert type(copy.deepcopy(model)[0]) is Float8Linear
