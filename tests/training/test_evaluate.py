"""Evaluation: unbiased by episode length, exact, and without a trace in the training run."""

import dataclasses
import random
import threading

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type

from fp8rl_torchrl import ActorCritic, evaluate
from fp8rl_torchrl.envs import CustomEnv, make
from fp8rl_torchrl.recipes import ActorCriticConfig, build
from fp8rl_torchrl.training import EvalResult


class Fixed(EnvBase):
    """Environment ``i`` pays ``rewards[i]`` a step in episodes of ``lengths[i]`` steps; 0 never ends.

    It has no `fresh`, keeps its step counts to itself, and notes how often it was stepped.
    """

    def __init__(self, lengths, rewards=None):
        super().__init__(batch_size=[len(lengths)])
        self.lengths = torch.tensor(lengths).unsqueeze(-1)
        self.rewards = torch.tensor(rewards or [1.0] * len(lengths)).unsqueeze(-1)
        self.observation_spec = Composite(observation=Unbounded((len(lengths), 1)), shape=self.batch_size)
        self.action_spec = Categorical(2, shape=self.batch_size)
        self.reward_spec = Unbounded((len(lengths), 1))
        self.at = torch.zeros(len(lengths), 1, dtype=torch.int64)
        self.steps, self.seeds = 0, []

    def _reset(self, tensordict=None):
        mask = None if tensordict is None else tensordict.get("_reset", None)
        self.at = self.at * 0 if mask is None else self.at.where(~mask.reshape(-1, 1), 0)
        return TensorDict({"observation": self.at.float()}, batch_size=self.batch_size)

    def _step(self, tensordict):
        self.steps += 1
        self.at = self.at + 1
        return TensorDict(
            {"observation": self.at.float(), "reward": self.rewards.clone(), "done": self.at == self.lengths},
            batch_size=self.batch_size,
        )

    def _set_seed(self, seed):
        self.seeds.append(seed)


def idle(tensordict):
    return tensordict.set("action", torch.zeros(tensordict.batch_size, dtype=torch.int64))


def first_finished(env, episodes):
    """The estimate that counts whichever episodes finish first."""
    finished, tensordict, steps = [], env.reset(), torch.zeros(env.batch_size, dtype=torch.int64)
    while len(finished) < episodes:
        stepped, tensordict = env.step_and_maybe_reset(idle(tensordict))
        steps += 1
        ended = stepped["next", "done"].squeeze(-1)
        finished += steps[ended].tolist()
        steps[ended] = 0
    return sum(finished[:episodes]) / episodes


# ------------------------------------------------------------------------------------------------------ the numbers


def test_short_episodes_do_not_count_more_often():
    env = Fixed([1, 1, 9, 9])  # the mean over environments is (1 + 1 + 9 + 9) / 4 = 5
    result = evaluate(idle, env, episodes=4)
    assert result.returns == (1.0, 1.0, 9.0, 9.0)
    assert result.mean == 5.0
    assert first_finished(Fixed([1, 1, 9, 9]), 4) == 1.0, "the estimate that this avoids"
    assert evaluate(idle, env, episodes=8).mean == 5.0
    assert first_finished(Fixed([1, 1, 9, 9]), 8) == 1.0


def test_episodes_that_do_not_divide_evenly_are_dealt_to_the_first_environments():
    result = evaluate(idle, Fixed([2, 3, 5]), episodes=7)  # quotas 3, 2, 2
    assert result.lengths == (2, 2, 2, 3, 3, 5, 5)
    result = evaluate(idle, Fixed([2, 3, 5, 7]), episodes=2)  # fewer episodes than environments
    assert result.lengths == (2, 3)


def test_returns_and_lengths_are_of_each_episode():
    result = evaluate(idle, Fixed([2, 4], rewards=[0.5, -1.5]), episodes=4)
    assert result.returns == (1.0, 1.0, -6.0, -6.0)
    assert result.lengths == (2, 2, 4, 4)


def test_mean_and_std_by_hand():
    result = EvalResult(returns=(1.0, 2.0, 6.0), lengths=(1, 2, 3))
    assert result.mean == 3.0
    assert result.std == pytest.approx((14 / 3) ** 0.5)  # deviations -2, -1, 3: squares 4, 1, 9
    assert EvalResult(returns=(4.0,), lengths=(1,)).std == 0.0


def test_custom_env_returns_by_hand():
    # So slow a mass stays where it starts: a step pays 0.1 + 1 - |x| / 2.4, and there are ten.
    env = CustomEnv(num_envs=3, seed=0, dt=1e-6, max_steps=10)
    result = evaluate(idle, env, episodes=5, seed=7)
    start = env.fresh(5, seed=7).reset()["observation"][:, 0]
    assert torch.allclose(torch.tensor(result.returns), 10 * (1.1 - start.abs() / 2.4), atol=1e-4)
    assert result.lengths == (10,) * 5


def test_the_seed_chooses_the_episodes():
    env = CustomEnv(num_envs=2, seed=0, max_steps=20)
    assert evaluate(idle, env, 5, seed=1) == evaluate(idle, env, 5, seed=1)
    assert evaluate(idle, env, 5, seed=1) != evaluate(idle, env, 5, seed=2)
    same = CustomEnv(num_envs=64, seed=9, max_steps=20)  # neither its seed nor its size matters
    assert evaluate(idle, env, 5, seed=1) == evaluate(idle, same, 5, seed=1)


@pytest.mark.parametrize("num_envs", [None, 1, 3])
def test_any_batch_size_will_do(num_envs):
    assert len(evaluate(idle, CustomEnv(num_envs=num_envs, seed=0, max_steps=5), 4).returns) == 4


def test_deterministic_takes_the_mode_and_otherwise_actions_are_sampled():
    env = CustomEnv(num_envs=4, seed=0, max_steps=30)
    agent = ActorCritic.for_env(env, hidden=(8,))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.zero_()  # both actions are equally likely; the mode is action 0, always left
    mode = evaluate(agent.policy, env, 6, seed=3)
    assert mode == evaluate(idle, env, 6, seed=3)
    sampled = evaluate(agent.policy, env, 6, seed=3, deterministic=False)
    assert sampled != mode
    assert sampled == evaluate(agent.policy, env, 6, seed=3, deterministic=False), "sampled from the same seed"
    assert sampled != evaluate(agent.policy, env, 6, seed=4, deterministic=False)


def test_the_policy_runs_in_eval_mode_without_gradients_and_is_left_in_training_mode():
    seen = []

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.frozen = nn.Dropout(), nn.Dropout().eval()

        def forward(self, tensordict):
            seen.append((self.training, self.layer.training, torch.is_grad_enabled(), exploration_type()))
            return idle(tensordict)

    policy = Policy()
    evaluate(policy, Fixed([2]), 1)
    assert set(seen) == {(False, False, False, ExplorationType.DETERMINISTIC)}
    assert policy.training
    assert policy.layer.training
    assert not policy.frozen.training


# -------------------------------------------------------------------------------------- nothing of training is touched


def test_the_environment_itself_is_neither_stepped_nor_seeded():
    env = Fixed([3, 3])
    tensordict = env.step(idle(env.reset()))["next"]
    env.seeds.clear()
    evaluate(idle, env, 4, seed=5)
    assert env.steps == 1
    assert env.seeds == []
    env.step(idle(tensordict))
    assert env.at.tolist() == [[2], [2]]


def test_the_copy_gets_the_seed():
    seeds = []

    class Noted(Fixed):
        def _set_seed(self, seed):
            seeds.append(seed)

    evaluate(idle, Noted([1]), 1, seed=11)
    assert seeds == [11]
    evaluate(idle, lambda: Noted([1]), 1, seed=12)
    assert seeds == [11, 12]


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]  # noqa: NPY002


def seed_all():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


def wasteful(tensordict):
    """A policy that draws from every global stream."""
    draws()
    return idle(tensordict)


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "raises"])
def test_the_global_random_streams_are_put_back(fails):
    seed_all()
    expected = draws()
    seed_all()
    if fails:
        with pytest.raises(RuntimeError):
            evaluate(wasteful, Fixed([0]), 1, max_episode_steps=3)
    else:
        evaluate(wasteful, Fixed([3]), 2)
    assert draws() == expected
    seed_all()
    wasteful(TensorDict(batch_size=[1]))
    assert draws() != expected, "the policy does draw from them"


CONFIG = ActorCriticConfig(
    num_envs=4, frames_per_collection=64, min_replay=64, updates_per_collection=3, hidden=(8,), total_frames=320
)


def train(env_id, evaluation):
    pipeline = build(dataclasses.replace(CONFIG, env=env_id))
    reports = []
    for report in pipeline:
        reports.append((report.episode_returns, dict(report.metrics)))
        evaluation(pipeline)
    return repr(reports), {name: value.tolist() for name, value in pipeline.agent.state_dict().items()}, draws()


@pytest.mark.parametrize("env_id", ["CustomEnv", "gymnasium:CartPole-v1"])
def test_training_with_and_without_evaluation_is_the_same_run(env_id):
    without = train(env_id, lambda pipeline: None)
    assert train(env_id, lambda pipeline: evaluate(pipeline.agent.policy, pipeline.env, 5)) == without
    sampled = lambda pipeline: evaluate(pipeline.agent.policy, pipeline.env, 5, deterministic=False)  # noqa: E731
    assert train(env_id, sampled) == without

    def careless(pipeline):  # negative twin: an evaluation on the training environment, from its random streams
        with set_exploration_type(ExplorationType.RANDOM):
            pipeline.env.rollout(5, pipeline.agent.policy)

    assert train(env_id, careless) != without


# ------------------------------------------------------------------------------------------------ what can be evaluated


def test_a_function_that_builds_the_environment():
    built = []

    def factory():
        built.append(Fixed([2, 4]))
        return built[-1]

    assert evaluate(idle, factory, 4).lengths == (2, 2, 4, 4)
    assert len(built) == 1
    assert built[0].is_closed


def test_a_wrapped_environment_keeps_its_transforms():
    env = TransformedEnv(CustomEnv(num_envs=2, seed=0, max_steps=50), StepCounter(max_steps=4, step_count_key="tally"))
    env.append_transform(RewardSum(in_keys=["reward"], out_keys=["total"]))
    seen = set()

    def policy(tensordict):
        seen.update(tensordict.keys())
        return idle(tensordict)

    assert evaluate(policy, env, 4).lengths == (4,) * 4  # cut by the transform, not by the environment at 50
    assert {"tally", "total"} <= seen


def test_a_gymnasium_environment():
    env = make("CartPole-v1", num_envs=3, seed=0, native=False)
    before = env.reset()
    result = evaluate(idle, env, 5, seed=0)
    # pushing left only, the pole falls within 8 to 10 steps, each of which pays 1
    assert result.returns == tuple(map(float, result.lengths))
    assert set(result.lengths) <= {8, 9, 10}
    assert result == evaluate(idle, lambda: make("CartPole-v1", num_envs=5, native=False), 5, seed=0)
    env.step(idle(before))  # still alive


def test_a_policy_of_tensordict_modules():
    policy = TensorDictModule(lambda x: (x[..., 0] < 0).long(), in_keys=["observation"], out_keys=["action"])
    steered = evaluate(policy, CustomEnv(num_envs=4, seed=0), 4).mean
    assert steered > 150 > evaluate(idle, CustomEnv(num_envs=4, seed=0), 4).mean


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("episodes", [0, -3])
def test_without_episodes_there_is_no_mean(episodes):
    with pytest.raises(ValueError, match=f"episodes must be >= 1; got {episodes}"):
        evaluate(idle, Fixed([1]), episodes)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match=r"seed must lie in \[0, 2\^32\)"):
        evaluate(idle, Fixed([1]), 1, seed=seed)


def test_an_environment_that_cannot_be_copied_is_refused_with_the_fix():
    class Held(Fixed):
        def __init__(self):
            super().__init__([1])
            self.lock = threading.Lock()

    with pytest.raises(ValueError, match=r"Held cannot be copied .* pass a function that builds a new one"):
        evaluate(idle, Held(), 1)
    assert evaluate(idle, Held, 1).lengths == (1,)


def test_an_environment_that_cannot_be_built_again_is_refused_with_the_fix():
    class Unregistered(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), 1.0, True, False, {}

    with pytest.raises(ValueError, match="pass a function that builds a new one"):
        evaluate(idle, make(Unregistered()), 1)
    assert evaluate(idle, lambda: make(Unregistered()), 2).returns == (1.0, 1.0)


def test_an_episode_without_end_is_an_error():
    with pytest.raises(RuntimeError, match="an episode has not ended after 20 steps"):
        evaluate(idle, Fixed([2, 0]), 2, max_episode_steps=20)
    assert evaluate(idle, Fixed([20]), 1, max_episode_steps=20).lengths == (20,)
    with pytest.raises(RuntimeError, match="20 steps"):
        evaluate(idle, Fixed([21]), 1, max_episode_steps=20)


def test_an_error_in_an_episode_closes_the_copy():
    built = []

    def factory():
        built.append(Fixed([0]))
        return built[-1]

    with pytest.raises(RuntimeError, match="has not ended"):
        evaluate(idle, factory, 1, max_episode_steps=2)
    assert built[0].is_closed


def test_what_is_no_policy_or_no_environment_is_refused():
    env = CustomEnv(4)
    for given in ((env, lambda seen: seen), ("policy", env), (lambda seen: seen, "CustomEnv")):
        with pytest.raises(TypeError, match="evaluate takes a policy, then an environment; got"):
            evaluate(*given)


def test_a_whole_agent_is_refused_by_name():
    env = CustomEnv(num_envs=2, seed=0)
    with pytest.raises(TypeError, match=r"takes a policy, not the whole ActorCritic: pass its \.policy"):
        evaluate(ActorCritic.for_env(env, hidden=(8,)), env)
