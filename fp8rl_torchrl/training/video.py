"""A video of a policy, one episode long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gymnasium
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs.utils import ExplorationType, set_exploration_type


def record_video(
    policy: Callable[[TensorDictBase], TensorDictBase], env_id: str, path: str | Path, *, seed: int = 0
) -> int:
    """Play one episode of the policy's mode in Gymnasium's renderer, headless, and write it to a file.

    Args:
        policy: Reads ``observation`` and writes ``action``.
        env_id: The task: a Gymnasium id, or ``CustomEnv`` for this package's own.
        path: The file to write; its ending, ``.gif`` or ``.mp4``, chooses the format.
        seed: Seed of the episode.

    Returns:
        The number of frames written.

    Raises:
        ValueError: If the ending is another, or the environment cannot be rendered.
        ImportError: If imageio, or for mp4 its ffmpeg, is not installed.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"a video is written as .gif or .mp4; got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder {path.absolute().parent} does not exist")
    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise ImportError('recording needs imageio; run: pip install "imageio[ffmpeg]"') from error
    try:
        env = gymnasium.make("fp8rl/CustomEnv-v0" if env_id == "CustomEnv" else env_id, render_mode="rgb_array")
        if isinstance(env.observation_space, gymnasium.spaces.Discrete):
            env = gymnasium.wrappers.FlattenObservation(env)  # one-hot, as `envs.make` presents it to the policy
        frames, fps = _play(policy, env, seed), env.metadata.get("render_fps", 30)
    except (gymnasium.error.Error, ImportError) as error:
        advice = 'pip install "gymnasium[classic-control]" may help'
        raise ValueError(f"{env_id} cannot be rendered: {error}; {advice}") from error
    if path.suffix == ".gif":
        imageio.imwrite(path, frames, duration=1000 / fps, loop=0)
    else:
        try:
            imageio.imwrite(path, frames, fps=fps)
        except (ImportError, OSError, ValueError) as error:
            raise ImportError('writing mp4 needs ffmpeg; run: pip install "imageio[ffmpeg]"') from error
    return len(frames)


def _play(policy: Callable[[TensorDictBase], TensorDictBase], env: gymnasium.Env, seed: int) -> list:
    device = next((p.device for p in policy.parameters()), None) if isinstance(policy, torch.nn.Module) else None
    observation, _ = env.reset(seed=seed)
    frames, over = [env.render()], False
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        while not over:
            seen = torch.as_tensor(observation, dtype=torch.float32, device=device)
            action = policy(TensorDict({"observation": seen}, batch_size=[])).get("action").cpu().numpy()
            observation, _, terminated, truncated, _ = env.step(action)
            frames.append(env.render())
            over = terminated or truncated
    env.close()
    return frames
