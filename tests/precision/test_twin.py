"""`twin`: the same parameters in another precision, for a collector, a target network, or plain tensors."""

import copy
import pickle

import pytest
import torch
from converted_models import BATCH, LAST, MODELS, chain, float8, observations, tensordict
from float8_layers import watch
from tensordict.nn import InteractionType, TensorDictModule, TensorDictModuleBase, set_interaction_type
from torch import nn
from torchrl.modules import MultiAgentMLP

import fp8rl_torchrl as f8
from fp8rl_torchrl.precision import ConversionError, Precision
from fp8rl_torchrl.precision.convert import convert
from fp8rl_torchrl.precision.last_layers import last_linears
from fp8rl_torchrl.precision.twin import twin

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def model():
    """Layers ``0``, ``2`` and ``4``, of which the first two are for FP8."""
    return chain(24, 40, 56, 4)


def agent(name="agent"):
    torch.manual_seed(0)
    return MODELS[name].build()


def autocast(dtype):
    return torch.autocast("cpu", dtype=dtype)


# --- what it computes ---


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", DTYPES)
def test_a_precision_without_fp8(model, name, converted, monkeypatch):
    x, plain = observations(), copy.deepcopy(model)
    if converted:
        convert(model, "fp8")
    low = twin(model, name)
    products = watch(monkeypatch)
    assert float8(low) == {}
    with Precision(name).autocast("cpu"):
        expected = plain(x)
    assert low(x).dtype == DTYPES[name]
    assert torch.equal(low(x), expected)
    assert not products
    assert float8(model) == ({"0": "rowwise", "2": "rowwise"} if converted else {})


@pytest.mark.parametrize("converted", [None, "fp8", "fp8-rowwise-gw-hp"])
@pytest.mark.parametrize("base", ["bf16", "fp32"])
@pytest.mark.parametrize(("name", "recipe"), [("fp8", "rowwise"), ("fp8-tensorwise", "tensorwise")])
def test_an_fp8_precision(model, name, recipe, base, converted):
    precision, x = Precision(name, base=base, backend="emulated"), observations()
    reference = copy.deepcopy(model)
    convert(reference, precision)
    if converted:
        convert(model, converted)
    before = float8(model)
    low = twin(model, precision)
    assert float8(low.module) == {"0": recipe, "2": recipe}
    assert low.module[0].backend == "emulated"
    assert float8(model) == before
    with precision.autocast("cpu"):
        expected = reference(x)
    assert low(x).dtype == DTYPES[base]
    assert torch.equal(low(x), expected)
    assert not torch.equal(low(x).float(), chain(24, 40, 56, 4)(x))


def test_the_layers_chosen_for_the_model_are_the_twins(model):
    convert(model, "fp8", skip=("0",))
    assert float8(twin(model, "fp8-tensorwise").module) == {"2": "tensorwise"}
    # Unless they are chosen anew.
    assert float8(twin(model, "fp8-tensorwise", skip=("2",)).module) == {"0": "tensorwise"}
    assert float8(model) == {"2": "rowwise"}


@pytest.mark.parametrize("name", MODELS)
def test_of_every_model_that_can_be_called(name):
    model = MODELS[name].build()
    model = model.joint if isinstance(model, f8.ActorCritic) else model
    if type(model) in (nn.ModuleDict, nn.ModuleList) or not hasattr(type(model), "forward") or name == "cleanrl":
        with pytest.raises(TypeError, match="cannot: pass one of its networks"):
            twin(model, "fp8")
        return
    low, last = twin(model, "fp8"), last_linears(model)
    assert [id(p) for p in low.parameters()] == [id(p) for p in model.parameters()]
    assert len(float8(low)) == len(MODELS[name].float8)
    assert not float8(model)
    assert not {*low.modules()} & {*model.modules()}
    assert last_linears(model) == last
    assert isinstance(low, TensorDictModuleBase) == isinstance(model, TensorDictModuleBase)


# --- what it shares ---


def test_parameters_and_buffers_are_the_models_and_modules_its_own():
    model = nn.Sequential(nn.Linear(24, 40), nn.BatchNorm1d(40), nn.Linear(40, 4))
    low = twin(model, "bf16")
    for own, its in zip([*low.parameters(), *low.buffers()], [*model.parameters(), *model.buffers()], strict=True):
        assert own is its
    low.eval()
    assert model.training
    assert not low.module[1].training
    low.module[0].register_forward_hook(lambda *_: pytest.fail("a hook of the twin ran in the model"))
    model(torch.ones(2, 24))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_an_update_of_the_model_is_one_of_the_twin(model, precision):
    low, x = twin(model, precision), observations()
    with torch.no_grad():
        low(x)  # the codes of its weights are kept from now on
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for update in ("optimizer", "data", "state_dict"):
        with torch.no_grad():
            before = low(x)
        if update == "optimizer":
            model(x).square().mean().backward()
            optimizer.step()
        elif update == "data":
            for parameter in model.parameters():
                parameter.data.mul_(1.25)
        else:
            model.load_state_dict(chain(24, 40, 56, 4).state_dict())
        with torch.no_grad():
            assert not torch.equal(low(x), before), update
            assert torch.equal(low(x), twin(model, precision)(x))


def test_a_gradient_through_the_twin_reaches_the_model(model):
    twin(model, "fp8")(observations()).float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_parameters_held_in_a_tensordict_are_shared():
    model = MultiAgentMLP(24, 4, 3, centralized=False, share_params=False, num_cells=[40, 56])
    low, x = twin(model, "fp8"), torch.randn(BATCH, 3, 24)
    assert [id(p) for p in low.parameters()] == [id(p) for p in model.parameters()]
    before = low(x)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert not torch.equal(low(x), before)


class CopiesItsParameters(nn.Linear):
    """A layer that is copied in a way of its own."""

    def __deepcopy__(self, memo):
        return CopiesItsParameters(self.in_features, self.out_features)


def test_parameters_that_cannot_be_shared_are_refused():
    with pytest.raises(TypeError, match="a part of this Sequential copies its parameters"):
        twin(nn.Sequential(CopiesItsParameters(24, 40)), "bf16")


@pytest.mark.parametrize("first", ["twin", "model"])
def test_a_model_without_sizes(first):
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 4))
    low, x = twin(model, "bf16"), torch.ones(2, 24)
    for each in (low, model) if first == "twin" else (model, low):
        each(x)
    assert low.module[0].weight is model[0].weight
    assert (low(x).dtype, model(x).dtype) == (torch.bfloat16, torch.float32)


# --- its own precision, wherever it is called ---


@pytest.mark.parametrize("outer", ["bf16", "fp16"])
@pytest.mark.parametrize("inner", ["fp32", "bf16", "fp16", "fp8"])
def test_inside_another_autocast_its_own_precision_wins(model, inner, outer):
    low, x = twin(model, inner), observations()
    expected, dtype = low(x), DTYPES.get(inner, torch.bfloat16)
    with autocast(DTYPES[outer]):
        before = model(x)  # the block has kept its casts of the weights, which are the twin's weights
        assert low(x).dtype == dtype
        assert torch.equal(low(x), expected)
        assert torch.equal(model(x), before)  # and goes on with them
        assert model(x).dtype == DTYPES[outer]
    with autocast(DTYPES[outer]):  # the twin first
        assert torch.equal(low(x), expected)
        assert torch.equal(model(x), before)


def test_autocast_alone_would_mix_the_formats_up(model):
    with autocast(torch.float16):
        model(observations())
        with autocast(torch.bfloat16), pytest.raises(RuntimeError, match="same dtype"):
            model(observations())


def test_of_a_twin_the_last_precision_counts(model):
    low = twin(twin(twin(model, "bf16"), "fp8"), "fp32")
    assert low(observations()).dtype == torch.float32
    assert type(low.module) is nn.Sequential
    assert low.module[0].weight is model[0].weight


def test_tf32_warns_where_there_is_none(model):
    with pytest.warns(UserWarning, match="cpu has no TF32"):
        twin(model, "tf32")(observations())


# --- as a module of tensors ---


def test_a_module_of_tensors_stays_one(model):
    low = twin(model, "bf16")
    assert not isinstance(low, TensorDictModuleBase)
    assert not hasattr(low, "in_keys")  # so TorchRL wraps it as it would wrap the model
    wrapped = TensorDictModule(low, ["observation"], ["logits"])
    assert wrapped(tensordict())["logits"].dtype == torch.bfloat16


def test_a_target_network_in_the_learners_precision(model):
    # A target network has parameters of its own, which a soft update moves; the twin sees it.
    target = copy.deepcopy(model)
    low, x = twin(target, "fp8"), observations()
    with torch.no_grad():
        assert torch.equal(low(x), twin(model, "fp8")(x))
        for own, learned in zip(target.parameters(), model.parameters(), strict=True):
            learned.mul_(3.0)
            own.data.lerp_(learned.data, 0.5)
        # Halfway from 1 to 3.
        torch.testing.assert_close(low.module[0].weight, model[0].weight * 2 / 3)
        assert torch.equal(low(x), twin(target, "fp8")(x))
        assert not torch.equal(low(x), twin(model, "fp8")(x))


# --- copies and files ---


def unpickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize(
    ("kind", "copied"),
    [
        ("policy", copy.deepcopy),
        ("policy", unpickled),
        ("tensors", copy.deepcopy),
        ("tensors", unpickled),
        ("parametrized", copy.deepcopy),  # has a way of its own to be copied, and none to be pickled
    ],
)
def test_a_copy_is_a_twin_that_stands_alone(model, kind, copied):
    source = {
        "policy": lambda: agent().policy,
        "tensors": lambda: model,
        "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(24, 4)),
    }[kind]()
    low = twin(source, "bf16" if kind == "parametrized" else "fp8")
    other = copied(low)
    assert type(other) is type(low)
    assert other.precision == low.precision
    assert float8(other) == float8(low)

    def run(module):
        with set_interaction_type(InteractionType.DETERMINISTIC), torch.no_grad():
            return module(tensordict())["logits"] if kind == "policy" else module(observations())

    before = run(low)
    assert torch.equal(run(other), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert torch.equal(run(low), before)
    assert not torch.equal(run(other), before)


def test_its_state_is_that_of_its_module(model):
    low = twin(model, "fp8")
    assert list(low.state_dict()) == [f"module.{key}" for key in model.state_dict()]
    assert len(list(low.parameters())) == len(list(model.parameters()))
    low.module.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()})
    assert not model(observations()).any()


def test_of_a_compiled_model(model):
    low = twin(torch.compile(model, backend="eager"), "bf16")
    assert low(observations()).dtype == torch.bfloat16
    assert [id(p) for p in low.parameters()] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_it_compiles_in_one_piece(model, precision):
    low = twin(model, precision)
    compiled = torch.compile(low, backend="eager", fullgraph=True)
    assert torch.equal(compiled(observations()), low(observations()))


# --- what is refused ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: agent(), r"a ActorCritic cannot: pass one of its networks, such as an ActorCritic's \.policy"),
        (lambda: nn.ModuleDict({"actor": chain(24, 4)}), "a ModuleDict cannot"),
        (lambda: chain(24, 4).forward, "a method cannot"),
        (lambda: [chain(24, 4)], "a list cannot"),
    ],
)
def test_what_cannot_be_called_is_refused(wrong, message):
    with pytest.raises(TypeError, match=message):
        twin(wrong(), "bf16")


def test_precision_and_skip_are_checked(model):
    with pytest.raises(ValueError, match="unknown precision 'banana'"):
        twin(model, "banana")
    with pytest.raises(ValueError, match="skip is for the fp8 precisions; in 'bf16' no layer is converted"):
        twin(model, "bf16", skip=("0",))
    with pytest.raises(ConversionError, match="skip='typo' matches no linear layer"):
        twin(model, "fp8", skip=("typo",))
    with pytest.raises(ConversionError, match=f"nothing to convert.*\n  0: {LAST}"):
        twin(chain(24, 4), "fp8")
