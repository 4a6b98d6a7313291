"""Models of every make, and which of their layers `convert` should choose."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Categorical
from torchrl.modules import (
    MLP,
    ActorCriticOperator,
    ActorCriticWrapper,
    ActorValueOperator,
    ConvNet,
    LSTMModule,
    NormalParamExtractor,
    ProbabilisticActor,
    QValueActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.modules.models import DuelingMlpDQNet

from fp8rl_torchrl import ActorCritic
from fp8rl_torchrl.models.networks import mlp_encoder
from fp8rl_torchrl.precision.linear import Float8Linear

BATCH, OBSERVATION, ACTIONS = 5, 24, 18
"""Rows, the observation's size, and as many actions as Atari has: wide enough for FP8, if the last layer were not."""

LAST, SMALL = "last layer of a network", "a dimension under 16"


@dataclass(frozen=True)
class Model:
    """A model and what should become of its layers."""

    build: Callable[[], Any]
    """Makes the model."""
    float8: dict[str, tuple[int, int]]
    """The layers that should be FP8: names and sizes."""
    alone: dict[str, str]
    """The layers that should be left alone: names and reasons."""
    call: Callable[[Any], Any] = lambda model: model(observations())
    """Runs the model on a batch."""
    fp32: tuple[str, ...] = ()
    """The layers that run in FP32 whatever the precision says."""


def observations(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, *(shape or (OBSERVATION,)), generator=generator).requires_grad_()


def tensordict() -> TensorDict:
    return TensorDict({"observation": observations()}, [BATCH])


def chain(*widths: int) -> nn.Sequential:
    """Linear layers, ``0``, ``2`` and so on, with a Tanh between."""
    torch.manual_seed(0)
    layers = [nn.Linear(k, n) for k, n in itertools.pairwise(widths)]
    return nn.Sequential(*[each for layer in layers for each in (layer, nn.Tanh())][:-1])


def float8(module: nn.Module) -> dict[str, str]:
    """The FP8 layers of a module, and their recipes."""
    return {name: each.recipe for name, each in module.named_modules() if isinstance(each, Float8Linear)}


def logits_actor(*widths: int, key: str = "observation") -> ProbabilisticActor:
    return ProbabilisticActor(
        TensorDictModule(_mlp(widths[0], *widths[1:], ACTIONS), [key], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )


def normal_actor(*widths: int, key: str = "observation") -> ProbabilisticActor:
    body = nn.Sequential(_mlp(widths[0], *widths[1:], 2 * ACTIONS), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(body, [key], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


class CleanRL(nn.Module):
    """A trunk with two heads, used through methods."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(OBSERVATION, 40), nn.ReLU(), nn.Linear(40, 56), nn.ReLU())
        self.actor = nn.Linear(56, ACTIONS)
        self.critic = nn.Linear(56, 1)

    def get_value(self, x: torch.Tensor) -> torch.Tensor:
        return self.critic(self.network(x))

    def get_action_and_value(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.network(x)
        return self.actor(hidden), self.critic(hidden)


class CleanRLActor(nn.Module):
    """Two heads on two layers, with a ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(OBSERVATION, 40), nn.Linear(40, 56)
        self.fc_mean, self.fc_logstd = nn.Linear(56, ACTIONS), nn.Linear(56, ACTIONS)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.fc2(self.fc1(x).relu()).relu()
        return self.fc_mean(x), self.fc_logstd(x)


def _mlp(*widths: int) -> MLP:
    return MLP(widths[0], widths[-1], num_cells=list(widths[1:-1]), activation_class=nn.Tanh)


def _agent(hidden: tuple[int, ...], shared: bool, continuous: bool = False) -> ActorCritic:
    critic_encoder = None if shared else mlp_encoder(OBSERVATION, hidden)
    spec = Bounded(-1.0, 1.0, (ACTIONS,)) if continuous else Categorical(ACTIONS)
    return ActorCritic(mlp_encoder(OBSERVATION, hidden), critic_encoder, hidden[-1], spec)


def _hidden(prefix: str, *widths: int) -> dict[str, tuple[int, int]]:
    """The layers of an MLP with an activation after each, so that their numbers are even."""
    pairs = itertools.pairwise(widths)
    return {f"{prefix}{2 * place}": pair for place, pair in enumerate(pairs)}


def _shared_agent(*hidden: int, continuous: bool = False) -> Model:
    heads = ("joint.module.1.module.0.module.0.module", "joint.module.2.module")
    heads = (heads[0] + ".0", heads[1]) if continuous else heads
    return Model(
        lambda: _agent(hidden, True, continuous),
        _hidden("joint.module.0.module.", OBSERVATION, *hidden),
        dict.fromkeys(heads, LAST),
        lambda agent: agent.joint(tensordict()),
        heads,
    )


def _separate_agent(*hidden: int, continuous: bool = False) -> Model:
    heads = ("joint.module.0.module.0.module.1.module", "joint.module.1.module.1.module")
    heads = (heads[0] + ".0", heads[1]) if continuous else heads
    return Model(
        lambda: _agent(hidden, False, continuous),
        _hidden("joint.module.0.module.0.module.0.module.", OBSERVATION, *hidden)
        | _hidden("joint.module.1.module.0.module.", OBSERVATION, *hidden),
        dict.fromkeys(heads, LAST),
        lambda agent: agent.joint(tensordict()),
        heads,
    )


def _critic(*widths: int, keys: tuple[str, ...] = ("observation",)) -> ValueOperator:
    return ValueOperator(_mlp(*widths, 1), list(keys))


def _on_tensordict(model: Any) -> TensorDictBase:
    return model(tensordict())


def _pixels() -> nn.Sequential:
    # 16 pixels, 3 by 3 in steps of 2: 7, then 3; 8 channels of 3 by 3 are 72.
    return nn.Sequential(ConvNet(3, num_cells=[8, 8], kernel_sizes=3, strides=2), _mlp(72, 40, 56, ACTIONS))


def _dueling() -> DuelingMlpDQNet:
    sizes = {"in_features": OBSERVATION, "num_cells": [40], "out_features": 56}
    network = DuelingMlpDQNet(ACTIONS, 1, sizes, {"num_cells": 72})
    network(observations())  # the first layers of the streams have no size before
    return network


def _lstm() -> TensorDictSequential:
    lstm = LSTMModule(OBSERVATION, 40, in_key="observation", out_key="embedding")
    return TensorDictSequential(lstm, TensorDictModule(_mlp(40, 56, ACTIONS), ["embedding"], ["logits"]))


def _gru() -> nn.ModuleDict:
    return nn.ModuleDict({"in": nn.Linear(OBSERVATION, 40), "gru": nn.GRU(40, 40), "out": nn.Linear(40, ACTIONS)})


def _squeezed_between() -> TensorDictSequential:
    """A part that has no linear layer stands between the body and the head."""
    return TensorDictSequential(
        TensorDictModule(nn.Linear(OBSERVATION, 40), ["observation"], ["features"]),
        TensorDictModule(nn.LayerNorm(40), ["features"], ["normalised"]),
        TensorDictModule(nn.Linear(40, ACTIONS), ["normalised"], ["logits"]),
        TensorDictModule(nn.Softmax(-1), ["logits"], ["probs"]),
    )


def _chain(layers: Any) -> torch.Tensor:
    x = observations()
    for layer in layers:
        x = layer(x)
    return x


MODELS = {
    "agent": _shared_agent(64, 64),
    "agent-continuous": _shared_agent(40, 56, continuous=True),
    "agent-wide": _shared_agent(256, 256, 256),
    "agent-separate": _separate_agent(64, 64),
    "agent-separate-continuous": _separate_agent(40, 56, continuous=True),
    "agent-separate-wide": _separate_agent(256, 256, 256),
    "mlp": Model(lambda: _mlp(OBSERVATION, 40, 56, ACTIONS), {"0": (OBSERVATION, 40), "2": (40, 56)}, {"4": LAST}),
    "actor": Model(
        lambda: logits_actor(OBSERVATION, 40, 56),
        _hidden("module.0.module.", OBSERVATION, 40, 56),
        {"module.0.module.4": LAST},
        _on_tensordict,
    ),
    "normal-actor": Model(
        lambda: normal_actor(OBSERVATION, 40),
        {"module.0.module.0.0": (OBSERVATION, 40)},
        {"module.0.module.0.2": LAST},
        _on_tensordict,
    ),
    "value": Model(
        lambda: _critic(OBSERVATION, 40, 56),
        _hidden("module.", OBSERVATION, 40, 56),
        {"module.4": LAST},
        _on_tensordict,
    ),
    "actor-value-operator": Model(
        lambda: ActorValueOperator(
            TensorDictModule(_mlp(OBSERVATION, 40, 56), ["observation"], ["hidden"]),
            logits_actor(56, 72, key="hidden"),
            _critic(56, 88, keys=("hidden",)),
        ),
        {
            "module.0.module.0": (OBSERVATION, 40),
            "module.0.module.2": (40, 56),
            "module.1.module.0.module.0": (56, 72),
            "module.2.module.0": (56, 88),
        },
        {"module.1.module.0.module.2": LAST, "module.2.module.2": LAST},
        _on_tensordict,
    ),
    # The critic reads the action: the actor ends there all the same.
    "actor-critic-operator": Model(
        lambda: ActorCriticOperator(
            TensorDictModule(_mlp(OBSERVATION, 40, 56), ["observation"], ["hidden"]),
            normal_actor(56, 72, key="hidden"),
            _critic(56 + ACTIONS, 88, keys=("hidden", "action")),
        ),
        {
            "module.0.module.0": (OBSERVATION, 40),
            "module.0.module.2": (40, 56),
            "module.1.module.0.module.0.0": (56, 72),
            "module.2.module.0": (56 + ACTIONS, 88),
        },
        {"module.1.module.0.module.0.2": LAST, "module.2.module.2": LAST},
        _on_tensordict,
    ),
    "actor-critic-wrapper": Model(
        lambda: ActorCriticWrapper(logits_actor(OBSERVATION, 40), _critic(OBSERVATION, 56)),
        {"module.0.module.0.module.0": (OBSERVATION, 40), "module.1.module.0": (OBSERVATION, 56)},
        {"module.0.module.0.module.2": LAST, "module.1.module.2": LAST},
        _on_tensordict,
    ),
    "dueling": Model(
        _dueling,
        {"features.0": (OBSERVATION, 40), "features.2": (40, 56), "advantage.0": (56, 72), "value.0": (56, 72)},
        {"advantage.2": LAST, "value.2": LAST},
    ),
    "q-values": Model(
        lambda: QValueActor(
            _mlp(OBSERVATION, 40, ACTIONS),
            in_keys=["observation"],
            spec=Categorical(ACTIONS),
            action_space="categorical",
        ),
        {"module.0.module.0": (OBSERVATION, 40)},
        {"module.0.module.2": LAST},
        _on_tensordict,
    ),
    "pixels": Model(
        _pixels, {"1.0": (72, 40), "1.2": (40, 56)}, {"1.4": LAST}, lambda model: model(observations(3, 16, 16))
    ),
    "lstm": Model(
        _lstm,
        {"module.1.module.0": (40, 56)},
        {"module.1.module.2": LAST},
        lambda model: model(tensordict().set("is_init", torch.zeros(BATCH, 1, dtype=torch.bool))),
    ),
    "gru": Model(
        _gru,
        {"in": (OBSERVATION, 40)},
        {"out": LAST},
        lambda model: model["out"](model["gru"](model["in"](observations()))[0]),
    ),
    "networks-by-name": Model(
        lambda: nn.ModuleDict({"actor": _mlp(OBSERVATION, 40, ACTIONS), "critic": _mlp(OBSERVATION, 56, 1)}),
        {"actor.0": (OBSERVATION, 40), "critic.0": (OBSERVATION, 56)},
        {"actor.2": LAST, "critic.2": LAST},
        lambda model: [each(observations()) for each in model.values()],
    ),
    "list-of-networks": Model(
        lambda: nn.ModuleList([_mlp(OBSERVATION, 40, ACTIONS), _mlp(OBSERVATION, 56, ACTIONS)]),
        {"0.0": (OBSERVATION, 40), "1.0": (OBSERVATION, 56)},
        {"0.2": LAST, "1.2": LAST},
        lambda model: [each(observations()) for each in model],
    ),
    "list-of-layers": Model(
        lambda: nn.ModuleList([nn.Linear(OBSERVATION, 40), nn.Linear(40, 56), nn.Linear(56, ACTIONS)]),
        {"0": (OBSERVATION, 40), "1": (40, 56)},
        {"2": LAST},
        _chain,
    ),
    "cleanrl": Model(
        CleanRL,
        {"network.0": (OBSERVATION, 40), "network.2": (40, 56)},
        {"actor": LAST, "critic": LAST},
        lambda model: model.get_action_and_value(observations()),
    ),
    "cleanrl-actor": Model(
        CleanRLActor, {"fc1": (OBSERVATION, 40), "fc2": (40, 56)}, {"fc_mean": LAST, "fc_logstd": LAST}
    ),
    "part-between": Model(
        _squeezed_between, {"module.0.module": (OBSERVATION, 40)}, {"module.2.module": LAST}, _on_tensordict
    ),
    "odd-widths": Model(
        lambda: _mlp(OBSERVATION, 17, 33, 100, 15, 40, ACTIONS),
        {"0": (OBSERVATION, 17), "2": (17, 33), "4": (33, 100)},
        {"6": SMALL, "8": SMALL, "10": LAST},
    ),
}
