"""A video of one episode, rendered without a display."""

import importlib.util
import math
import sys

import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

from fp8rl_torchrl import ActorCritic
from fp8rl_torchrl.envs import CustomEnv
from fp8rl_torchrl.training.video import record_video


def constantly(action):
    return TensorDictModule(
        lambda observation: torch.full(observation.shape[:-1], action), in_keys=["observation"], out_keys=["action"]
    )


def test_a_gif_shows_the_whole_episode(tmp_path):
    path = tmp_path / "left.gif"
    written = record_video(constantly(0), "CustomEnv", path, seed=0)
    frames = imageio.imread(path, index=None)
    # Pushed left without end the mass, from within 0.5 of the middle, crosses 2.4 after t = sqrt(2 d): 19 to 24 steps
    # without friction, a few more with it.
    by_hand = [math.sqrt(2 * distance) * 10 for distance in (1.9, 2.9)]
    assert by_hand[0] < written < by_hand[1] + 5
    assert frames.shape == (written, 240, 600, 3)
    assert frames.shape[0] > 10
    assert len({frame.tobytes() for frame in frames}) > 10, "it moves"
    mass = (np.abs(frames.astype(int) - (52, 92, 168)).sum(-1) < 30).any(1)  # the columns in its colour
    middle = [np.flatnonzero(columns).mean() for columns in mass]
    assert middle[-1] < middle[0] - 100, "to the left"


def test_the_seed_chooses_the_episode_and_the_policy_plays_its_mode(tmp_path):
    agent = ActorCritic.for_env(CustomEnv(seed=0), hidden=(8,))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.zero_()  # the mode of two equal probabilities is action 0
    for name, policy, seed in (("mode", agent.policy, 3), ("left", constantly(0), 3), ("other", constantly(0), 4)):
        record_video(policy, "CustomEnv", tmp_path / f"{name}.gif", seed=seed)
    contents = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
    assert contents["mode"] == contents["left"] != contents["other"]


def test_mp4_is_written_or_says_what_it_needs(tmp_path):
    path = tmp_path / "left.mp4"
    if importlib.util.find_spec("imageio_ffmpeg") is None and importlib.util.find_spec("av") is None:
        with pytest.raises(ImportError, match=r'needs ffmpeg; run: pip install "imageio\[ffmpeg\]"'):
            record_video(constantly(0), "CustomEnv", path)
        assert not path.exists()
    else:
        written = record_video(constantly(0), "CustomEnv", path)
        assert len(imageio.imread(path)) == written


@pytest.mark.parametrize("name", ["out.avi", "out", "out.gif.txt", "out.GIF2"])
def test_other_endings_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"a video is written as .gif or .mp4; got"):
        record_video(constantly(0), "CustomEnv", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_refused_before_playing(tmp_path):
    def policy(tensordict):
        raise AssertionError("played")

    with pytest.raises(ValueError, match=r"the folder .*nowhere does not exist"):
        record_video(policy, "CustomEnv", tmp_path / "nowhere" / "out.gif")


def test_an_environment_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="NoSuchEnv-v0 cannot be rendered"):
        record_video(constantly(0), "NoSuchEnv-v0", tmp_path / "out.gif")


def test_without_imageio_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(ImportError, match=r'pip install "imageio\[ffmpeg\]"'):
        record_video(constantly(0), "CustomEnv", tmp_path / "out.gif")


def test_an_environment_whose_renderer_is_missing_is_refused_in_one_sentence(tmp_path, monkeypatch):
    def missing(self):
        raise gymnasium.error.DependencyNotInstalled("pygame is not installed")

    monkeypatch.setattr("gymnasium.envs.classic_control.CartPoleEnv.render", missing)
    with pytest.raises(ValueError, match="CartPole-v1 cannot be rendered: pygame is not installed; pip install"):
        record_video(lambda tensordict: tensordict, "CartPole-v1", tmp_path / "out.gif")
    assert not any(tmp_path.iterdir())
