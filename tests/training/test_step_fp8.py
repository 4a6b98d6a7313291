"""`OptimStep` in FP8: it refuses a loss that would not multiply in FP8, and updates one that does."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import MLP, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

from fp8rl_torchrl import ActorCritic, Float8Linear, OptimStep, Precision, convert
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.objectives import ReplayedActorCriticLoss
from fp8rl_torchrl.precision import linear_function

FP8 = ["fp8", "fp8-tensorwise", "fp8-rowwise-gw-hp"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


class OpenLoss(nn.Module):
    """A loss that holds its network."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return TensorDict(loss=self.model(batch["x"]).float().square().mean())


def closed_loss(model):
    """A loss whose network only its function knows."""

    class ClosedLoss(nn.Module):
        def forward(self, batch):
            return TensorDict(loss=model(batch["x"]).float().square().mean())

    return ClosedLoss()


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=1e-2, fused=True)


def batch():
    return TensorDict(x=torch.randn(8, 32, generator=torch.Generator().manual_seed(1)), batch_size=[8])


@pytest.mark.parametrize("name", FP8)
def test_a_loss_without_float8_layers_is_refused_before_anything_runs(name):
    model = network()
    with pytest.raises(ValueError, match=rf"no Float8Linear layer.*convert\(model, '{name}'\)"):
        OptimStep(OpenLoss(model), adam(model), name)


def test_a_torchrl_loss_that_keeps_its_network_out_of_its_tree_is_seen_into():
    value = QValueActor(MLP(4, 2, num_cells=[32, 32]), in_keys=["observation"], action_space="categorical")
    loss = DQNLoss(value, action_space="categorical", delay_value=True)
    assert not any(isinstance(module, nn.Linear) for module in loss.modules())
    with pytest.raises(ValueError, match="no Float8Linear layer"):
        OptimStep(loss, adam(loss), "fp8")
    convert(value, "fp8")  # after the loss was built
    OptimStep(loss, adam(loss), "fp8", target_updater=SoftUpdate(loss, tau=0.01))


def test_where_the_network_cannot_be_seen_the_first_call_finds_out():
    model = network()
    step = OptimStep(closed_loss(model), adam(model), "fp8")
    before = model[0].weight.clone()
    for _ in range(2):  # and the second call, too
        with pytest.raises(ValueError, match="no Float8Linear layer"):
            step(batch())
    assert torch.equal(model[0].weight, before)

    convert(model, "fp8")
    step = OptimStep(closed_loss(model), adam(model), "fp8")
    step(batch())
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize(("layers", "precision"), [("fp8", "bf16"), ("fp8", "fp32"), ("fp8-tensorwise", "fp8")])
def test_layers_of_another_precision_are_refused(layers, precision):
    model = network()
    convert(model, layers)
    with pytest.raises(ValueError, match=f"of recipe {Precision(layers).fp8_recipe}, but the precision is"):
        OptimStep(OpenLoss(model), adam(model), precision)


def test_layers_of_another_backend_are_refused():
    model = network()
    convert(model, "fp8")
    with pytest.raises(ValueError, match="converted with backend auto, but the precision says 'emulated'"):
        OptimStep(OpenLoss(model), adam(model), Precision("fp8", backend="emulated"))


@pytest.mark.parametrize("base", ["bf16", "fp32"])
@pytest.mark.parametrize("name", FP8)
def test_an_update_multiplies_fp8_codes_forward_and_backward(name, base, monkeypatch):
    model = network()
    report = convert(model, Precision(name, base=base))
    assert [layer.name for layer in report.converted] == ["0", "2"]
    products, real = [], linear_function.scaled_matmul

    def spy(left, left_scale, right, right_scale, **options):
        products.append((left.dtype.itemsize, right.dtype.itemsize, options["out_dtype"]))
        return real(left, left_scale, right, right_scale, **options)

    monkeypatch.setattr(linear_function, "scaled_matmul", spy)
    step = OptimStep(OpenLoss(model), adam(model), Precision(name, base=base))
    step(batch())  # whose checks run the backward pass once more
    products.clear()
    losses = step(batch())
    low = torch.bfloat16 if base == "bf16" else torch.float32
    # Layers 0 and 2 forward; back through 2: input and weight; through 0: its weight alone. `gw-hp` does the weights
    # in high precision.
    weights = 0 if name.endswith("gw-hp") else 2
    assert sorted(map(str, products)) == sorted(map(str, [(1, 1, low)] * 3 + [(1, 1, torch.float32)] * weights))
    assert losses["loss"].dtype == torch.float32
    assert step.updates == 2


def test_the_gradient_is_that_of_fp32_within_fp8s_error():
    gradients = {}
    for name in ("fp32", "fp8"):
        model = network()
        if name == "fp8":
            convert(model, name)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
        before = model[0].weight.detach().clone()
        OptimStep(OpenLoss(model), optimizer, name)(batch())
        gradients[name] = before - model[0].weight.detach()
    error = (gradients["fp8"] - gradients["fp32"]).norm() / gradients["fp32"].norm()
    assert 0.01 < error < 0.15  # two FP8 layers of about 4 % each, forward and backward; not 0, which FP32 would give


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_skips_the_update(bad):
    model = network()
    convert(model, "fp8")
    step = OptimStep(OpenLoss(model), adam(model), "fp8")
    before = [parameter.clone() for parameter in model.parameters()]
    poisoned = batch()
    poisoned["x"][3, 5] = bad
    assert step(poisoned)["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert step(batch())["skipped"] == 0


def test_the_agent_keeps_fp8_in_its_hidden_layers_and_fp32_in_its_heads():
    env = CustomEnv(num_envs=4, seed=0)
    agent = ActorCritic.for_env(env, hidden=(32, 32, 32))
    convert(agent, "fp8")
    step = OptimStep(ReplayedActorCriticLoss(agent), adam(agent), "fp8")
    kinds = [type(layer) for layer in agent.modules() if isinstance(layer, nn.Linear)]
    assert kinds.count(Float8Linear) == 2
    losses = step(env.rollout(8, agent.policy).reshape(-1).detach())
    assert step.updates == 1
    assert all(value.dtype == torch.float32 for key, value in losses.items() if key.startswith("loss_"))


def test_a_tensordict_module_is_seen_into():
    model = TensorDictModule(network(), ["x"], ["y"])

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = [model]  # in a list, where nn.Module does not look

        def forward(self, batch):
            return TensorDict(loss=model(batch)["y"].float().mean())

    convert(model, "fp8")
    OptimStep(Loss(), adam(model), "fp8")(batch())
