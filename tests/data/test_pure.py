"""Environments as pure functions: which are refused, many steps as one function, random actions."""

import pytest
import torch
from gathering import ENVS, CustomEnv, DriftEnv, FusedCollector
from torchrl.envs import RewardSum, SerialEnv, TransformedEnv

from fp8rl_torchrl.data.pure import AHEAD, PURE, PureEnv, Starts, random_action, refuse_impure, unrolled
from fp8rl_torchrl.envs import make


def gym_env():
    return make("CartPole-v1", num_envs=2, seed=0, native=False)


def with_transform():
    return TransformedEnv(CustomEnv(2), RewardSum())


def several():
    return SerialEnv(2, CustomEnv)


class Lacking(CustomEnv):
    """One function short."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.pure_reset = None


@pytest.mark.parametrize(
    ("make_env", "missing"),
    [
        (gym_env, ", ".join(PURE)),
        (with_transform, ", ".join(PURE)),
        (several, ", ".join(PURE)),
        (lambda: Lacking(2), "pure_reset"),
    ],
)
def test_an_environment_that_is_not_pure_is_refused_by_what_it_lacks(make_env, missing):
    env = make_env()
    with pytest.raises(
        TypeError, match=rf"{type(env).__name__} cannot be fused: it does not offer {missing}\. Collect"
    ):
        FusedCollector(env, frames_per_batch=8)
    with pytest.raises(TypeError, match="cannot be fused"):
        refuse_impure(env)


def test_the_refused_functions_are_those_of_the_protocol():
    assert set(PURE) == {name for name in vars(PureEnv) if not name.startswith("_")}
    refuse_impure(CustomEnv(2))


@pytest.mark.parametrize("num_envs", [4, None])
@pytest.mark.parametrize("max_steps", [1, 3])
@pytest.mark.parametrize("make", ENVS)
def test_compiled_blocks_and_blocks_that_look_give_the_same(make, num_envs, max_steps, monkeypatch):
    # What a compiled block does instead of looking whether any episode has ended, run eagerly.
    env = make(num_envs, seed=5, max_steps=max_steps)
    actions = torch.stack([env.action_spec.rand() for _ in range(8)])

    def run():
        starts, state, transitions = Starts(env), env.read(env.reset()), []
        observation = env.observe(state)
        for _ in range(10):  # more episodes than a table has
            given, table = iter(actions), starts.ahead(state, 8)
            state, observation, new = unrolled(env, state, observation, lambda *_, g=given: next(g), 8, table)
            transitions += new
        return state, observation, transitions

    env.set_seed(5)
    expected = run()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    env.set_seed(5)
    got = run()
    assert expected[0].episode.max() >= 80 // max_steps
    for one, other in zip(_leaves(got), _leaves(expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", ENVS)
def test_a_table_of_starts_serves_until_an_environment_may_reach_its_end(make):
    env = make(4, seed=5)
    starts, state = Starts(env), env.read(env.reset())
    table = starts.ahead(state, 8)
    advanced = torch.tensor([0, AHEAD - 8, 3, 0])
    assert starts.ahead(state._replace(episode=advanced), 8) is table
    advanced[1] += 1
    following = starts.ahead(state._replace(episode=advanced), 8)
    assert following.before.tolist() == advanced.tolist()
    row, at = 5, torch.arange(4)
    expected = env.pure_reset(state.seed, state.index, advanced + 1 + row)
    for got, each in zip(following.states, expected, strict=True):
        assert torch.equal(got[row, at], each)
    starts.forget()
    assert starts.ahead(state._replace(episode=advanced), 8) is not following


def _leaves(tree):
    return [leaf for each in tree for leaf in _leaves(each)] if isinstance(tree, (tuple, list)) else [tree]


@pytest.mark.parametrize("num_envs", [4, None])
@pytest.mark.parametrize("make", ENVS)
def test_random_actions_are_those_of_the_spec_and_can_be_compiled(make, num_envs):
    spec = make(num_envs).action_spec
    compiled = torch.compile(lambda: random_action(spec), fullgraph=True, backend="eager")
    draws = []
    for draw in (spec.rand, lambda: random_action(spec), compiled):
        torch.manual_seed(3)
        draws.append(torch.stack([draw() for _ in range(5)]))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_what_the_spec_itself_draws_cannot_be_compiled():
    # If this fails, `random_action` is no longer needed.
    draw = torch.compile(DriftEnv(4).action_spec.rand, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        draw()
