"""The Gymnasium form of the custom environment: how Gymnasium finds it, and what it may be asked for."""

import importlib.metadata
import subprocess
import sys
import warnings

import gymnasium

from fp8rl_torchrl.envs.custom_constants import CustomConstants
from fp8rl_torchrl.envs.gymnasium_env import (
    ENV_ID,
    CustomGymnasiumEnv,
    CustomGymnasiumVectorEnv,
    register,
)

register()


def test_registered_through_the_entry_point():
    (entry_point,) = [
        entry for entry in importlib.metadata.entry_points(group="gymnasium.envs") if entry.name == "fp8rl"
    ]
    assert entry_point.load() is register
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()  # once more: no warning of an override
    env = gymnasium.make(ENV_ID, target=0.5)
    assert isinstance(env.unwrapped, CustomGymnasiumEnv)
    assert env.unwrapped.constants == CustomConstants(target=0.5)
    assert gymnasium.make(env.spec).unwrapped.constants == CustomConstants(target=0.5)


def test_a_longer_or_shorter_episode_can_be_asked_for():
    def length(**kwargs):
        env = gymnasium.make(ENV_ID, **kwargs)
        env.reset(options={"state": [0, 0]})
        return next(step for step in range(1, 1000) if env.step(step % 2)[3])

    assert length() == 200
    assert length(max_steps=300) == 300
    assert length(max_episode_steps=20) == 20


def test_gymnasium_finds_it_by_package_name_without_loading_torch():
    code = (
        "import sys, gymnasium\n"
        "for make in (gymnasium.make, gymnasium.make_vec):\n"
        "    env = make('fp8rl_torchrl:fp8rl/CustomEnv-v0', render_mode='rgb_array')\n"
        "    env.reset(seed=0); env.render(); env.close(); env.close()\n"
        "print(sorted({'torch', 'torchrl', 'pygame'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_close_twice():
    for env in (CustomGymnasiumEnv(), CustomGymnasiumVectorEnv(2)):
        env.close()
        env.close()
