"""A policy and a value kept in tables, and batches of transitions between their states."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical

NEVER = float("inf")


class Table(nn.Module):
    """A policy and a value per state; the observation is the number of the state."""

    def __init__(self, logits, values, key="observation"):
        super().__init__()
        self.logits, self.values = nn.Parameter(torch.as_tensor(logits)), nn.Parameter(torch.as_tensor(values))
        self.key = key
        self.value = TensorDictModule(nn.Identity(), [key], ["state_value"])

    def distribution_and_value(self, tensordict):
        return Categorical(logits=self.logits[tensordict[self.key]]), self.state_value(tensordict)

    def state_value(self, tensordict):
        return self.values[tensordict[self.key]].unsqueeze(-1)


def transitions(state, action, probability, reward, following, terminated, key="observation"):
    """A batch of transitions; ``probability`` is that of the action under the behaviour policy."""
    size = len(state)
    after = TensorDict(
        {
            key: torch.as_tensor(following),
            "reward": torch.as_tensor(reward).reshape(size, 1),
            "terminated": torch.as_tensor(terminated).reshape(size, 1),
        },
        batch_size=size,
    )
    return TensorDict(
        {
            key: torch.as_tensor(state),
            "action": torch.as_tensor(action),
            "action_log_prob": torch.as_tensor(probability).log(),
            "next": after,
        },
        batch_size=size,
    )
