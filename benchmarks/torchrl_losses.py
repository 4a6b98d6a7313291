"""TorchRL's losses on small networks with plain layers, and their twins with FP8 layers on the same parameters."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Categorical
from torchrl.modules import (
    MLP,
    NormalParamExtractor,
    ProbabilisticActor,
    QValueActor,
    TanhModule,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import (
    A2CLoss,
    ClipPPOLoss,
    DQNLoss,
    LossModule,
    REDQLoss,
    ReinforceLoss,
    SACLoss,
    TD3Loss,
)

from fp8rl_torchrl.models import Float32Head
from fp8rl_torchrl.precision.convert import convert

LOSSES = ("a2c", "ppo", "reinforce", "dqn", "sac", "td3", "redq")
OBSERVATION, ACTIONS = 24, 6
"""Sizes of the observation and of the action."""
BATCH = (16, 8)
"""Environments and steps of a batch: 128 rows."""
# No two layers have the same shape and each is wider than the one before, so that the shapes of a product tell which
# product of which layer it is; and most widths are no multiples of 16.
ACTOR, CRITIC = (40, 56, 72), (48, 64, 88)


def build(
    name: str,
    recipe: str | None = None,
    swap: str = "before",
    actor: tuple[int, ...] = ACTOR,
    critic: tuple[int, ...] = CRITIC,
) -> LossModule:
    """A loss and its networks; two calls that differ in recipe or swap have the same parameters.

    Args:
        name: One of `LOSSES`.
        recipe: Of the FP8 layers; None keeps the layers plain.
        swap: Whether layers are swapped ``before`` the loss is built or ``after``.
        actor: Widths of the actor's hidden layers.
        critic: Widths of the critic's.
    """
    torch.manual_seed(0)
    networks = _networks(name, actor, critic)
    if recipe is not None and swap == "before":
        for network in networks:
            convert(network, f"fp8-{recipe}")
    loss = _loss(name, networks)
    if recipe is not None and swap == "after":
        for network in networks:
            convert(network, f"fp8-{recipe}")
    _ = loss.value_estimator  # made by default when it is first asked for
    return loss


def batch_for(name: str, seed: int = 1) -> TensorDict:
    """A batch of transitions, ``[16, 8]``: observations of unit variance, rewards around 1, a few terminations."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*BATCH, *size, generator=generator)

    observation, drift, reward = normal(OBSERVATION), normal(OBSERVATION), 1 + normal(1)
    if name in ("sac", "td3", "redq"):
        action = torch.tanh(normal(ACTIONS))
    else:
        action = torch.randint(ACTIONS, BATCH, generator=generator)
    terminated = torch.rand(*BATCH, 1, generator=generator) < 0.05
    next = {"observation": observation + 0.3 * drift, "reward": reward, "terminated": terminated, "done": terminated}
    # ClipPPOLoss reads the behaviour's log-probability: here that of uniformly random actions.
    log_prob = torch.full(BATCH, 1 / ACTIONS).log()
    data = {"observation": observation, "action": action, "action_log_prob": log_prob, "next": next}
    return TensorDict(data, BATCH, names=[None, "time"])  # pyright: ignore


def gradients(loss: Any, batch: TensorDict, seed: int = 2) -> dict[str, torch.Tensor]:
    """One forward and backward pass of a loss, compiled or not, in a fixed random stream.

    Returns:
        The gradient of every trained parameter, by name.
    """
    torch.manual_seed(seed)
    terms = loss(batch.clone())
    sum(value for key, value in terms.items() if key.startswith("loss")).backward()  # pyright: ignore
    module = getattr(loss, "_orig_mod", loss)
    found = {}
    for key, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found[key], parameter.grad = parameter.grad, None
    return found


def traces_whole(name: str) -> bool:
    """Whether TorchRL's loss compiles into one graph: GAE looks for NaN in the next observation with a Python if."""
    return name not in ("a2c", "ppo", "reinforce")


# --- what the losses are made of ---


def _mlp(inputs: int, widths: tuple[int, ...], outputs: int, gain: float = 1.0) -> nn.Sequential:
    body = MLP(inputs, outputs, num_cells=list(widths), activation_class=nn.Tanh)
    body[-1] = Float32Head(widths[-1], outputs, gain)
    return body


def _networks(name: str, actor_widths: tuple[int, ...], critic_widths: tuple[int, ...]) -> list[Any]:
    if name == "dqn":
        network = _mlp(OBSERVATION, actor_widths, ACTIONS)
        return [QValueActor(network, in_keys=["observation"], spec=Categorical(ACTIONS), action_space="categorical")]
    if name in ("a2c", "ppo", "reinforce"):
        actor = ProbabilisticActor(
            TensorDictModule(_mlp(OBSERVATION, actor_widths, ACTIONS, gain=0.1), ["observation"], ["logits"]),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,
        )
        return [actor, ValueOperator(_mlp(OBSERVATION, critic_widths, 1), in_keys=["observation"])]
    spec = Bounded(-1, 1, (ACTIONS,))  # pyright: ignore
    if name == "td3":
        body = TensorDictModule(_mlp(OBSERVATION, actor_widths, ACTIONS), ["observation"], ["param"])
        squash = TanhModule(in_keys=["param"], out_keys=["action"], spec=spec)
        actor = TensorDictSequential(body, squash)  # pyright: ignore
    else:
        body = nn.Sequential(_mlp(OBSERVATION, actor_widths, 2 * ACTIONS), NormalParamExtractor())
        actor = ProbabilisticActor(
            TensorDictModule(body, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            spec=spec,
            distribution_class=TanhNormal,
            distribution_kwargs={"low": -1.0, "high": 1.0},
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,
        )
    critic = ValueOperator(_mlp(OBSERVATION + ACTIONS, critic_widths, 1), in_keys=["observation", "action"])
    return [actor, critic]


def _loss(name: str, networks: list[Any]) -> LossModule:
    if name == "td3":
        return TD3Loss(*networks, action_spec=networks[0][-1].spec["action"])
    makers = {
        "a2c": A2CLoss,
        "ppo": ClipPPOLoss,
        "reinforce": ReinforceLoss,
        "dqn": DQNLoss,
        "sac": SACLoss,
        "redq": REDQLoss,
    }
    return makers[name](*networks)
