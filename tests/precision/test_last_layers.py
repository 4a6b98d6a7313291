"""`last_linears`: which layers write the results of a model, however it is put together."""

import itertools

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from fp8rl_torchrl.precision.last_layers import last_linears


def names(module):
    """The names of the last layers."""
    last = last_linears(module)
    return [name for name, each in module.named_modules() if any(each is layer for layer in last)]


def mlp(*widths):
    return nn.Sequential(*(nn.Linear(k, n) for k, n in itertools.pairwise(widths)))


def part(reads, writes, module=None):
    return TensorDictModule(module or nn.Linear(8, 8), [reads], [writes])


class Module(nn.Module):
    """Any parts by name, without a ``forward``."""

    def __init__(self, **parts):
        super().__init__()
        for name, each in parts.items():
            self.add_module(name, each)


class Forward(Module):
    """The same with one."""

    def forward(self, x):
        raise NotImplementedError


# --- one after the other ---


def test_a_layer_alone_and_no_layer():
    layer = nn.Linear(4, 4)
    assert last_linears(layer) == [layer]
    assert last_linears(nn.Tanh()) == last_linears(nn.Sequential()) == last_linears(nn.ModuleDict()) == []


def test_the_last_of_a_sequence_whatever_the_widths():
    assert names(mlp(4, 8, 8, 2)) == ["2"]
    assert names(nn.Sequential(mlp(4, 8), nn.Tanh(), mlp(8, 8, 2), nn.Softmax(-1))) == ["2.1"]
    assert names(nn.Sequential(nn.Linear(8, 32), nn.GLU(), nn.Linear(8, 2))) == ["2"]


@pytest.mark.parametrize("kind", [Module, Forward])
def test_a_module_of_one_network(kind):
    assert names(kind(network=mlp(4, 8, 2), noise=nn.Dropout())) == ["network.1"]


# --- modules with a forward of their own ---


def test_the_last_registered():
    assert names(Forward(fc1=nn.Linear(4, 8), fc2=nn.Linear(8, 8), head=nn.Linear(8, 2))) == ["head"]
    # Whatever stands between, which may change the width.
    assert names(Forward(before=nn.Linear(4, 8), lstm=nn.LSTM(8, 6), after=nn.Linear(6, 2))) == ["after"]
    assert names(Forward(observation=nn.Linear(4, 8), with_action=mlp(10, 8, 1))) == ["with_action.1"]


def test_heads_beside_it():
    heads = {"mean": nn.Linear(8, 3), "std": nn.Linear(8, 3)}
    assert names(Forward(trunk=mlp(4, 8, 8), **heads)) == ["mean", "std"]
    dueling = Forward(features=mlp(4, 16), advantage=mlp(16, 8, 3), value=mlp(16, 8, 1))
    assert names(dueling) == ["advantage.1", "value.1"]
    assert names(nn.Sequential(nn.Linear(4, 4), dueling)) == ["1.advantage.1", "1.value.1"]


def test_a_hidden_layer_as_wide_as_the_head_reads_is_no_head():
    assert names(Forward(trunk=mlp(4, 8), hidden=nn.Linear(8, 8), head=nn.Linear(8, 3))) == ["head"]


# --- collections ---


@pytest.mark.parametrize("kind", [lambda **parts: nn.ModuleDict(parts), lambda **p: nn.ModuleList(p.values()), Module])
def test_each_network_of_a_collection(kind):
    found = names(kind(a=mlp(4, 8, 2), b=mlp(4, 8, 2), c=mlp(5, 8, 1)))
    assert [name.split(".")[1] for name in found] == ["1", "1", "1"]
    assert len(names(kind(a=nn.Linear(8, 3), b=nn.Linear(8, 5)))) == 2


@pytest.mark.parametrize("kind", [lambda **parts: nn.ModuleDict(parts), lambda **p: nn.ModuleList(p.values()), Module])
def test_a_chain_of_layers(kind):
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 2)}
    assert last_linears(kind(**layers)) == [layers["c"]]


def test_a_trunk_and_bare_heads():
    assert names(Module(network=mlp(4, 8, 16), actor=nn.Linear(16, 6), critic=nn.Linear(16, 1))) == ["actor", "critic"]
    # Networks beside one that writes as much as they read: in doubt, it is a network like them.
    assert names(nn.ModuleDict({"a": mlp(4, 8), "b": mlp(8, 2)})) == ["a.0", "b.0"]


# --- TensorDict modules ---


def test_what_nothing_reads_is_last():
    sequence = TensorDictSequential(part("x", "h"), part("h", "logits"), part("h", "value"))
    assert names(sequence) == ["module.1.module", "module.2.module"]


def test_what_a_part_without_layers_hands_on_is_read_too():
    parts = [part("x", "h"), part("h", "n", nn.LayerNorm(8)), part("n", "m", nn.Tanh()), part("m", "y")]
    assert names(TensorDictSequential(*parts)) == ["module.3.module"]
    assert names(TensorDictSequential(*parts[:3])) == ["module.0.module"]
    del parts[2]  # now nothing writes what the last part reads
    assert names(TensorDictSequential(*parts)) == ["module.0.module", "module.2.module"]


@pytest.mark.parametrize("action", ["action", ("agents", "action")])
def test_the_network_of_an_actor_ends_in_its_action(action):
    q = TensorDictModule(nn.Linear(8, 8), ["x", action], ["q"])
    assert names(TensorDictSequential(part("x", action), q)) == ["module.0.module", "module.1.module"]
    squashed = TensorDictSequential(part("x", "param"), part("param", action, nn.Tanh()), q)
    assert names(squashed) == ["module.0.module", "module.2.module"]


def test_nested_sequences():
    body = TensorDictSequential(part("x", "h"), part("h", ("hidden", "last")))
    heads = TensorDictSequential(part(("hidden", "last"), "logits"), part(("hidden", "last"), "value"))
    sequence = TensorDictSequential(body, heads)
    assert names(sequence) == ["module.1.module.0.module", "module.1.module.1.module"]
    assert names(body) == ["module.1.module"]


def test_it_is_the_layers_that_count_in_a_forward_pass():
    # The layers that come last are those whose output reaches no other linear layer.
    torch.manual_seed(0)
    sequence = TensorDictSequential(part("x", "h"), part("h", "logits"), part("h", "value"))
    outputs, reached = {}, set()
    for layer in sequence.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, args: reached.update(each for each, out in outputs.items() if out is args[0])
            )
            layer.register_forward_hook(lambda each, _, out: outputs.update({each: out}))
    sequence(x=torch.ones(1, 8))
    assert set(last_linears(sequence)) == set(outputs) - reached
