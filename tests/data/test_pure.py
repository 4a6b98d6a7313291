"""Environments as pure functions: which are refused, many steps as one function, random actions."""

import pytest
import torch
from gathering import ENVS, CustomEnv, DriftEnv, FusedCollector
from torchrl.envs import RewardSum, SerialEnv, TransformedEnv

from fp8rl_torchrl.data.pure import PURE, PureEnv, random_action, refuse_impure, unrolled
from fp8rl_torchrl.envs import make, noise


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
def test_the_table_of_starts_of_a_compiled_block_gives_the_same(make, num_envs, max_steps, monkeypatch):
    # What a compiled block does instead of looking whether any episode has ended, run eagerly.
    env = make(num_envs, seed=5, max_steps=max_steps)
    state = env.read(env.reset())
    actions = torch.stack([env.action_spec.rand() for _ in range(8)])

    def run():
        given = iter(actions)
        return unrolled(env, state, env.observe(state), lambda *_: next(given), 8)

    expected = run()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(noise, "_compiled", lambda: noise._hash)
    got = run()
    assert expected[0].episode.max() >= 8 // max_steps
    for one, other in zip(_leaves(got), _leaves(expected), strict=True):
        assert torch.equal(one, other)


def _leaves(tree):
    return [leaf for each in tree for leaf in _leaves(each)] if isinstance(tree, (tuple, list)) else [tree]


@pytest.mark.parametrize("num_envs", [4, None])
@pytest.mark.parametrize("make", ENVS)
def test_random_actions_are_those_of_the_spec_and_can_be_compiled(make, num_envs):
    env = make(num_envs)
    compiled = torch.compile(lambda: random_action(env), fullgraph=True, backend="eager")
    draws = []
    for draw in (env.action_spec.rand, lambda: random_action(env), compiled):
        torch.manual_seed(3)
        draws.append(torch.stack([draw() for _ in range(5)]))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_what_the_spec_itself_draws_cannot_be_compiled():
    # If this fails, `random_action` is no longer needed.
    draw = torch.compile(DriftEnv(4).action_spec.rand, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        draw()
