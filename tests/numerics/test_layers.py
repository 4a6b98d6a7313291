"""A look at layers whose numbers are chosen so that what each format does to them is known."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from fp8rl_torchrl import Float8Linear, Precision
from fp8rl_torchrl.numerics import layers
from fp8rl_torchrl.numerics.layers import MEASURES, ROLES, look, names_of


class Loss(nn.Module):
    """The sum of a layer's outputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, batch):
        return TensorDict(loss=self.layer(batch["x"]).float().sum())


def seen(layer, x, precision, scale=1.0):
    """What a look says of a layer: by role, by measure."""
    loss = Loss(layer)
    found = look(
        loss,
        TensorDict(x=x, batch_size=[len(x)]),
        Precision(precision),
        names_of(loss, loss),
        {"loss": torch.tensor(scale)},
    )
    assert found.names == ("layer",)
    rows = found.measures[0].tolist()
    return {role: dict(zip(MEASURES, row, strict=True)) for role, row in zip(ROLES, rows, strict=True)}


def linear(weight):
    weight = torch.tensor(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return layer


def test_rounding_in_bf16_by_hand():
    """1 + 2^-9 is 1 in BF16, 3 stays 3: noise 2^-18 in the input."""
    found = seen(linear([[1.0, 0.0]]), torch.tensor([[1 + 2.0**-9, 3.0]]), "bf16")
    assert found["activation"]["noise"] == 2.0**-18
    assert found["activation"]["signal"] == (1 + 2.0**-9) ** 2 + 9
    assert found["activation"]["amax"] == 3.0
    assert found["weight"]["noise"] == 0
    expected = {"amax": 1.0, "count": 1.0, "signal": 1.0}
    assert found["gradient"] == dict.fromkeys(MEASURES, 0.0) | expected


def test_underflow_in_fp16_by_hand():
    """FP16's smallest number is 2^-24: 2^-26 is 0, and a weight of 0 has not vanished."""
    found = seen(linear([[2.0**-26, 0.0, 1.0, 2.0**-24]]), torch.ones(1, 4), "fp16")
    assert (found["weight"]["underflowed"], found["weight"]["count"]) == (1, 4)


def test_overflow_in_fp16_by_hand():
    found = seen(linear([[300.0, 1.0]]), torch.tensor([[300.0, 1.0], [1.0, 1.0]]), "fp16")
    assert (found["activation"]["saturated"], found["output"]["saturated"], found["output"]["count"]) == (0, 1, 2)
    assert found["output"]["reference_nonfinite"] == 0
    assert seen(linear([[300.0, 1.0]]), torch.tensor([[300.0, 1.0]]), "bf16")["output"]["saturated"] == 0


def test_gradients_are_seen_without_the_loss_scale_that_saves_them():
    layer = linear([[1.0]])

    class Small(Loss):
        def forward(self, batch):
            return TensorDict(loss=(self.layer(batch["x"]) * 2.0**-30).float().sum())

    loss = Small(layer)
    batch = TensorDict(x=torch.ones(1, 1), batch_size=[1])
    for scale, lost in ((1.0, 1), (2.0**15, 0)):
        found = look(loss, batch, Precision("fp16"), names_of(loss, loss), {"loss": torch.tensor(scale)})
        gradient = dict(zip(MEASURES, found.measures[0, ROLES.index("gradient")].tolist(), strict=True))
        assert gradient["underflowed"] == lost
        assert gradient["amax"] == (0.0 if lost else 2.0**-30)


def test_fp8_operands_are_seen_as_they_are_multiplied():
    """Of e4m3, 448 / 2^20 is below half of the smallest number, 2^-9, and so 0; rowwise scales leave 448 as it is."""
    layer = Float8Linear(16, 16, bias=False)
    layer.weight.data.fill_(1.0)
    x = torch.zeros(16, 16)
    x[:, 0], x[:, 1] = 448.0, 448.0 / 2**20
    found = seen(layer, x, "fp8")
    assert (found["activation"]["underflowed"], found["activation"]["saturated"]) == (16, 0)
    assert found["activation"]["amax"] == 448.0
    assert found["weight"]["noise"] == 0


@pytest.mark.parametrize("members", [2, 3])
def test_members_of_an_ensemble_count_together(members):
    layers = [nn.Linear(4, 2) for _ in range(members)]
    parameters = torch.func.stack_module_state(layers)[0]
    base = nn.Linear(4, 2)

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = (nn.Parameter(parameters[name].detach()) for name in ("weight", "bias"))

        def forward(self, batch):
            def member(weight, bias):
                return torch.func.functional_call(base, {"weight": weight, "bias": bias}, (batch["x"],))

            return TensorDict(loss=torch.vmap(member)(self.weight, self.bias).square().sum())

    loss = Ensemble()
    batch = TensorDict(x=torch.randn(5, 4), batch_size=[5])
    found = look(loss, batch, Precision("fp32"), {loss.weight.data_ptr(): "ensemble"}, {"loss": torch.ones(())})
    assert found.names == ("ensemble",)
    counts = found.measures[0, :, MEASURES.index("count")].tolist()
    assert counts == [5 * 4, members * 4 * 2, members * 5 * 2, members * 5 * 2]


def test_nothing_is_changed():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    loss = Loss(nn.Sequential(layer, nn.Dropout(0.5)))
    batch = TensorDict(x=torch.randn(4, 3), batch_size=[4])
    state = torch.get_rng_state()
    found = look(loss, batch, Precision("bf16"), names_of(loss, loss), {"loss": torch.ones(())})
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight.grad is None
    assert list(batch.keys()) == ["x"]
    # Both passes drew the same mask, so that only rounding tells them apart.
    assert found.loss.item() == pytest.approx(found.reference_loss.item(), rel=0.05)


@pytest.mark.parametrize("together", [1, 40])
def test_operands_are_the_same_in_groups_and_all_at_once(monkeypatch, together):
    weight, x = torch.randn(3, 4).tolist(), torch.randn(5, 4) * 1e-3
    whole = seen(linear(weight), x, "fp16")
    monkeypatch.setattr(layers, "TOGETHER", together)
    assert seen(linear(weight), x, "fp16") == whole


def test_what_is_infinite_in_fp32_has_not_underflowed():
    found = seen(linear([[3e38, 3e38], [1.0, 1.0]]), torch.tensor([[1.0, 1.0]]), "fp32")
    assert (found["output"]["reference_nonfinite"], found["output"]["underflowed"]) == (1, 0)
