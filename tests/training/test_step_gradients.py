"""The gradients that `OptimStep` computes in eager mode are those of ``loss.backward()``, bit for bit."""

import copy

import pytest
import torch
from losses import PRECISIONS, Loss, adam, by_key, data, descent, dqn, named, regression, transitions, two_losses
from tensordict import TensorDict
from torch import nn

from fp8rl_torchrl import ActorCritic, OptimStep
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.objectives import ReplayedActorCriticLoss, RolloutA2CLoss
from fp8rl_torchrl.training._gradients import add_gradients
from fp8rl_torchrl.training.flat import FlatParameter

pytestmark = pytest.mark.filterwarnings("ignore:cpu has no TF32:UserWarning")

ONE = torch.ones(())


def cases():
    """Losses, each with a batch."""
    yield regression(), data()
    yield dqn(), transitions()
    torch.manual_seed(0)
    env = CustomEnv(num_envs=4, seed=0)
    agent = ActorCritic.for_env(env, hidden=(16, 16))
    rollout = env.rollout(8, agent.policy).detach()
    yield RolloutA2CLoss(agent), rollout
    yield ReplayedActorCriticLoss(agent), rollout.flatten()


def total(losses):
    return sum(value for key, value in losses.items() if key.startswith("loss"))


@pytest.mark.parametrize("case", range(4), ids=["regression", "dqn", "a2c", "replayed"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_they_are_those_of_backward(case, precision):
    loss, batch = list(cases())[case]
    reference = copy.deepcopy(loss)
    step = OptimStep(loss, adam(loss.parameters()), named(precision))
    scale = torch.tensor(8.0)
    outputs, finite, gradients = step._gradients(loss, batch, {"loss": scale})

    with named(precision).autocast("cpu"):
        expected = reference(batch)
    (total(expected) * scale).backward()
    for found, parameter in zip(gradients["loss"], reference.parameters(), strict=True):
        assert (found is None) == (parameter.grad is None)
        assert found is None or torch.equal(found, parameter.grad)
    assert finite["loss"]
    assert set(outputs) == set(expected.keys())
    assert all(torch.equal(outputs[key], expected[key]) for key in outputs)
    assert not any(value.requires_grad for value in outputs.values())
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_a_scale_left_out_is_noticed():
    """Negative twin: the comparison above can fail."""
    loss = regression()
    step = OptimStep(loss, adam(loss.parameters()), "fp32")
    _, _, gradients = step._gradients(loss, data(), {"loss": torch.tensor(2.0)})
    loss(data())["loss"].backward()
    for found, parameter in zip(gradients["loss"], loss.parameters(), strict=True):
        assert not torch.equal(found, parameter.grad)
        assert torch.equal(found, 2 * parameter.grad)


def test_each_loss_has_its_own_scale_and_its_own_parameters():
    """The losses a * 3 and b * 5 have the gradients 3 and 5."""
    loss = two_losses()
    step = OptimStep(loss, by_key(loss), "fp32")
    batch = TensorDict(x=torch.tensor([3.0, 5.0]))
    scales = {"loss_a": torch.tensor(2.0), "loss_b": torch.tensor(4.0)}
    _, finite, gradients = step._gradients(loss, batch, scales)
    assert [float(each) for (each,) in gradients.values()] == [6.0, 20.0]
    assert list(finite) == list(gradients) == ["loss_a", "loss_b"]


def test_losses_that_share_part_of_their_graph():
    """What both losses have in common is differentiated twice."""
    model = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})

    def function(model, batch):
        common = model["a"](batch["x"]) + model["b"](batch["x"])
        a, b = model["a"](batch["x"]), model["b"](batch["x"])
        shared = (common.detach() - a - b).square().sum()
        return {"loss_a": a.sum() + 0 * shared.detach(), "loss_b": b.square().sum()}

    loss = Loss(model, function)
    step = OptimStep(loss, {f"loss_{k}": descent(part.parameters()) for k, part in model.items()}, "fp32")
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    step(TensorDict(x=x))
    assert torch.allclose(before["a.weight"] - model["a"].weight, x.sum(0, keepdim=True), rtol=1e-5, atol=1e-6)
    b = x @ before["b.weight"].t() + before["b.bias"]
    assert torch.allclose(before["b.weight"] - model["b"].weight, (2 * b * x).sum(0, keepdim=True), rtol=1e-5)


def test_a_parameter_that_the_loss_does_not_reach_has_none():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    loss = Loss(model, lambda model, batch: (model["used"](batch["x"]) - batch["y"]).square().mean())
    step = OptimStep(loss, adam(loss.parameters()), "fp32")
    _, _, gradients = step._gradients(loss, data(), {"loss": ONE})
    assert [each is None for each in gradients["loss"]] == [False, False, True, True]
    step(data())
    assert all(parameter not in step.optimizers["loss"].state for parameter in model["unused"].parameters())


def test_a_parameter_that_thaws_is_trained():
    loss = regression()
    loss.model.bias.requires_grad_(False)
    step = OptimStep(loss, descent(loss.parameters()), "fp32")
    before = loss.model.bias.clone()
    step(data())
    assert torch.equal(loss.model.bias, before)
    loss.model.bias.requires_grad_(True)
    step(data())
    assert not torch.equal(loss.model.bias, before)


def test_accumulated_gradients_are_the_mean():
    loss = regression()
    before = copy.deepcopy(loss.state_dict())
    step = OptimStep(loss, descent(loss.parameters()), "fp32", accumulate=2)
    reference = regression()
    for seed in (0, 1):
        step(data(seed=seed))
        (reference(data(seed=seed))["loss"] / 2).backward()
    for name, parameter in reference.named_parameters():
        assert torch.equal(before[name] - parameter.grad, loss.state_dict()[name])


def test_gradients_are_added_to_what_is_there():
    model, other = nn.Linear(2, 1), nn.Parameter(torch.zeros(2))
    frozen, flat = nn.Parameter(torch.zeros(2), requires_grad=False), FlatParameter(model.parameters())
    gradients = [torch.tensor([[1.0, 2.0]]), None, torch.tensor([4.0, 5.0])]
    for times in (1, 2):
        add_gradients([flat, frozen, other], gradients)
        assert flat.grad.tolist() == [times * 1.0, times * 2.0, 0.0]
        assert other.grad.tolist() == [times * 4.0, times * 5.0]
    assert frozen.grad is None
    assert torch.equal(gradients[2], torch.tensor([4.0, 5.0])), "what was given is not written to"
    assert all(view.grad is None for view in flat.views)


def test_the_first_call_alone_is_checked():
    loss = two_losses()
    step = OptimStep(loss, by_key(loss), "fp32")
    assert not step._gradients.checked
    step(TensorDict(x=torch.tensor([1.0, 1.0])))
    assert step._gradients.checked

    loss = two_losses(shared=True)
    step = OptimStep(loss, by_key(loss), "fp32")
    for _ in range(2):
        with pytest.raises(ValueError, match="reaches parameters that belong to the optimizer of 'loss_a'"):
            step(TensorDict(x=torch.tensor([1.0, 1.0])))
        assert not step._gradients.checked, "a refused step is checked again"
