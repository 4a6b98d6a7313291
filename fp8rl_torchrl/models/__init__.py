"""Networks as TensorDictModules."""

from fp8rl_torchrl.models.actor_critic import ActorCritic
from fp8rl_torchrl.models.networks import Float32Head

__all__ = ["ActorCritic", "Float32Head"]
