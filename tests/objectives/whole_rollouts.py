"""Whole rollouts: one by hand, those of environments with short episodes, and what losses over them are compared by."""

import torch
from tensordict import TensorDict

from fp8rl_torchrl.envs.classic_control import CartPoleEnv
from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.models.actor_critic import ActorCritic

# Two environments, four steps; V(s) = s + 1, gamma = lambda = 1/2.
#   environment 0                                       environment 1
#   0 -> 1, r  1              delta  1    A  1.25       0 -> 2, r 1, truncated    delta  1.5  A  1.5
#   1 -> 4, r  3, terminated  delta  1    A  1          1 -> 4, r 0, both         delta -2    A -2
#   2 -> 3, r -1              delta -2    A -2.25       3 -> 0, r 2               delta -1.5  A -0.75
#   3 -> 5, r  0              delta -1    A -1          0 -> 5, r 1, truncated    delta  3    A  3
STATE = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 0]])
FOLLOWING = torch.tensor([[1, 4, 3, 5], [2, 4, 0, 5]])
ACTION = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
REWARD = torch.tensor([[1.0, 3.0, -1.0, 0.0], [1.0, 0.0, 2.0, 1.0]])
TERMINATED = torch.tensor([[False, True, False, False], [False, True, False, False]])
TRUNCATED = torch.tensor([[False, False, False, False], [True, True, False, True]])
VALUES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
ADVANTAGE = torch.tensor([[1.25, 1.0, -2.25, -1.0], [1.5, -2.0, -0.75, 3.0]])
HALVES = {"gamma": 0.5, "lmbda": 0.5}
# Truncations that are not terminations too, in environment 1.
ENDS = 2


def rollout_by_hand():
    """The rollout above, ``[2, 4]``, collected by a policy that takes either action with probability 1/2."""
    flags = {"terminated": TERMINATED, "truncated": TRUNCATED, "done": TERMINATED | TRUNCATED}
    after = {"observation": FOLLOWING, "reward": REWARD.unsqueeze(-1)}
    after |= {key: flag.unsqueeze(-1) for key, flag in flags.items()}
    return TensorDict(
        {
            "observation": STATE,
            "action": ACTION,
            "action_log_prob": torch.full((2, 4), 0.5).log(),
            "next": TensorDict(after, batch_size=[2, 4]),
        },
        batch_size=[2, 4],
    )


def custom_env(num_envs=4):
    """Episodes of at most 9 steps, which also leave the bound."""
    return CustomEnv(num_envs=num_envs, seed=0, max_steps=9, bound=0.7, force=6.0)


def cartpole(num_envs=4):
    """Episodes of at most 12 steps, some of which fall earlier."""
    return CartPoleEnv(num_envs=num_envs, seed=0, max_steps=12)


def agent_and_rollout(env, steps=40, **options):
    torch.manual_seed(0)
    agent = ActorCritic.for_env(env, hidden=(16, 16), **options)
    return agent, env.rollout(steps, agent.policy, break_when_any_done=False).detach()


def most_ends(rollout):
    """The largest number of truncations, terminations apart, of one environment."""
    ends = rollout["next", "truncated"] & ~rollout["next", "terminated"]
    return int(ends.squeeze(-1).sum(-1).max())


def perturb(module, size=0.05):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape))


def rows_seen(encoder):
    """A list that grows by the number of rows whenever the encoder runs."""
    rows = []
    encoder.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    return rows


def total(losses):
    return sum(value for key, value in losses.items() if key.startswith("loss_"))


def gradients(loss, batch, parameters):
    """The losses, and the gradient of their sum by the parameters' names."""
    losses = loss(batch)
    found = torch.autograd.grad(total(losses), list(parameters.values()), allow_unused=True)
    return losses, dict(zip(parameters, found, strict=True))


def assert_close(found, expected, bound):
    """Relative norms of the differences, entry by entry."""
    assert set(found) == set(expected)
    for key, entry in expected.items():
        assert entry.norm() > 0, key
        assert (found[key] - entry).norm() <= bound * entry.norm(), key
