"""Networks as TensorDictModules."""

from fp8rl_torchrl.models.actor_critic import ActorCritic
from fp8rl_torchrl.models.actor_q import ActorQ
from fp8rl_torchrl.models.exploration import StateDependentNoise
from fp8rl_torchrl.models.networks import Float32Head
from fp8rl_torchrl.models.normalize import Normalize, RunningStatistics
from fp8rl_torchrl.models.q_network import QNetwork

__all__ = ["ActorCritic", "ActorQ", "Float32Head", "Normalize", "QNetwork", "RunningStatistics", "StateDependentNoise"]
