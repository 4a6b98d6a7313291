"""Returns of a task's native and Gymnasium's form under the same policy, and the distance of their distributions."""

import math

import gymnasium
import numpy as np
import torch

# Two-sample Kolmogorov-Smirnov at alpha = 0.001: the critical scaled distance is sqrt(-ln(alpha / 2) / 2) = 1.949.
# Ties, where returns are whole numbers, only make the test more careful.
CRITICAL = math.sqrt(-math.log(0.001 / 2) / 2)


def scaled_distance(first, second):
    """The largest distance of two empirical distributions, times sqrt(n m / (n + m))."""
    points = np.concatenate((first, second))
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (first, second)]
    return np.abs(shares[0] - shares[1]).max() * math.sqrt(len(first) * len(second) / (len(first) + len(second)))


def gymnasium_returns(id, policy, episodes):
    """Returns of Gymnasium's episodes; ``policy(observation [N, obs], noise [N])`` acts, noise uniform; seed 0."""
    env, noise, returns = gymnasium.make(id), np.random.default_rng(0), []
    observation, _ = env.reset(seed=0)
    for _ in range(episodes):
        total, over = 0.0, False
        while not over:
            action = policy(observation[None], noise.random(1))[0]
            observation, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
        returns.append(total)
        observation, _ = env.reset()
    return np.array(returns)


def native_returns(env, policy):
    """Returns of the first episode of each environment of a batch, likewise."""
    noise, data = np.random.default_rng(1), env.reset()
    returns, running = torch.zeros(env.batch_size), torch.ones(env.batch_size, dtype=torch.bool)
    while running.any():
        action = policy(data["observation"].numpy(), noise.random(env.batch_size.numel()))
        stepped, data = env.step_and_maybe_reset(data.set("action", torch.as_tensor(action)))
        done = stepped["next", "done"].squeeze(-1)
        returns = torch.where(running & done, stepped["next", "episode_reward"].squeeze(-1), returns)
        running = running & ~done
    return returns.numpy()
