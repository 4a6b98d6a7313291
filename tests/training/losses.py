"""Losses worked out by hand, the batches that drive them, and the optimizers that the tests of a step share."""

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical
from torchrl.modules import MLP, QValueActor
from torchrl.objectives import DQNLoss

from fp8rl_torchrl import Precision

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def named(precision):
    """The precision by its name; a first loss scale small enough that nothing overflows unless a test plants it."""
    return Precision(precision, init_scale=64.0)


def adam(parameters, **options):
    return torch.optim.Adam(parameters, fused=True, **options)


def descent(parameters):
    """With a learning rate of 1, minus what a parameter of 0 becomes is its gradient."""
    return torch.optim.SGD(parameters, lr=1.0, fused=True)


class Loss(nn.Module):
    """Any function of (model, batch), in FP32 after the model, as a loss module."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch):
        result = self.function(self.model, batch)
        return TensorDict(result if isinstance(result, dict) else {"loss": result}, batch_size=[])


def regression():
    torch.manual_seed(0)
    return Loss(nn.Linear(3, 2), lambda model, batch: (model(batch["x"]).float() - batch["y"]).square().mean())


def data(rows=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDict(
        {"x": torch.randn(rows, 3, generator=generator), "y": torch.randn(rows, 2, generator=generator)},
        batch_size=[rows],
    )


def linear(weights=2):
    """The loss sum(w * x), whose gradient is x itself; batches choose the gradient and, through ``add``, the loss."""
    model = nn.Linear(weights, 1, bias=False)
    nn.init.zeros_(model.weight)

    def function(model, batch):
        product = (model.weight[0] * batch["x"]).sum()
        return product + batch["add"] if "add" in batch.keys() else product

    return Loss(model, function)


def gradient_of(*values, add=None):
    extra = {} if add is None else {"add": torch.tensor(float(add))}
    return TensorDict({"x": torch.tensor(values), **extra}, batch_size=[])


def bits(tree):
    """Tensors of a nested structure as bytes, so that NaN equals NaN and -0.0 does not equal 0.0."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    return tree


INF, NAN = float("inf"), float("nan")
BAD = {
    "infinite loss": gradient_of(1.0, 1.0, add=INF),
    "NaN loss": gradient_of(1.0, 1.0, add=NAN),
    "infinite gradient": gradient_of(INF, 1.0),
    "NaN gradient": gradient_of(NAN, 1.0),
}


class OnlyGradient(torch.autograd.Function):
    """The sum of the weights forward, the second argument backward: a finite loss with any gradient."""

    @staticmethod
    def forward(ctx, weight, gradient):
        ctx.save_for_backward(gradient)
        return weight.sum()

    @staticmethod
    def backward(ctx, upstream):
        return (upstream * ctx.saved_tensors[0]).unsqueeze(0), None


def planted():
    """Loss and gradient chosen separately."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    return Loss(
        model,
        lambda model, batch: (
            OnlyGradient.apply(model.weight, batch["x"]) + (batch["add"] if "add" in batch.keys() else 0.0)
        ),
    )


def dqn(loss_function="l2"):
    torch.manual_seed(0)
    actor = QValueActor(
        MLP(3, 2, num_cells=[8]), in_keys=["observation"], spec=Categorical(2), action_space="categorical"
    )
    return DQNLoss(actor, action_space="categorical", delay_value=True, loss_function=loss_function)


def transitions(seed=0, reward=None):
    torch.manual_seed(seed)
    following = {
        "observation": torch.randn(8, 3),
        "reward": torch.randn(8, 1) if reward is None else torch.full((8, 1), reward),
        "done": torch.zeros(8, 1, dtype=torch.bool),
        "terminated": torch.zeros(8, 1, dtype=torch.bool),
    }
    return TensorDict(
        {"observation": torch.randn(8, 3), "action": torch.randint(2, (8,)), "next": following}, batch_size=[8]
    )


def target_bits(loss):
    return bits(loss.target_value_network_params.flatten_keys(".").to_dict())


def two_losses(shared=False):
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    for part in model.values():
        nn.init.zeros_(part.weight)

    def function(model, batch):
        a, b = model["a"].weight.sum(), model["b"].weight.sum()
        return {"loss_a": a * batch["x"][0], "loss_b": (b + a if shared else b) * batch["x"][1]}

    return Loss(model, function)


def by_key(loss, **options):
    return {f"loss_{key}": adam(part.parameters(), **options) for key, part in loss.model.items()}
