"""What an agent observes, and the heads of actors."""

import math

import pytest
import torch
from actor_critics import VECTOR, Specs
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, OneHot, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import TanhNormal

from fp8rl_torchrl.models import categorical
from fp8rl_torchrl.models.heads import ActorHead, bounds_of, observation_of
from fp8rl_torchrl.models.networks import Float32Head

ACTION = Categorical(3, (), dtype=torch.int64)
BOX = Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]))

# --- what it observes ---


@pytest.mark.parametrize(
    ("entries", "key"),
    [
        ({"observation": VECTOR}, "observation"),
        ({"pixels": VECTOR}, "pixels"),
        ({"pixels": Bounded(0, 1, (3, 8, 8)), "observation": VECTOR}, "observation"),
    ],
)
def test_the_entry_that_is_observed(entries, key):
    found, spec = observation_of(Specs(Composite(entries), ACTION), None)
    assert (found, spec.shape) == (key, (3,))


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (Composite(position=VECTOR, angle=VECTOR), r"only \['angle', 'position'\]; gather .*CatTensors"),
        (Bounded(0, 1, (3, 8, 8)), r"'observation' has shape \(3, 8, 8\), .*pass encoder="),
        (Categorical(5, (4,)), "'observation' holds torch.int64 numbers: pass encoder="),
    ],
)
def test_what_cannot_be_observed_is_refused(observation, message):
    with pytest.raises(ValueError, match=message):
        observation_of(Specs(observation, ACTION), None)


@pytest.mark.parametrize("observation", [Bounded(0, 1, (3, 8, 8)), Categorical(5, (4,))])
def test_an_encoder_of_ones_own_takes_anything(observation):
    key, spec = observation_of(Specs(observation, ACTION), nn.Identity())
    assert (key, spec) == ("observation", observation)


def test_what_is_no_environment_is_named():
    with pytest.raises(TypeError, match=r"built for an environment, such as .*make.*; got 'CartPole-v1'"):
        observation_of("CartPole-v1", None)


# --- intervals ---


def test_the_bounds_of_a_vector():
    bounds = bounds_of(BOX)
    assert {key: bound.tolist() for key, bound in bounds.items()} == {"low": [-2, 0], "high": [2, 10]}


@pytest.mark.parametrize(
    "spec",
    [
        ACTION,
        OneHot(3),
        Unbounded((2,)),
        Bounded(0, 5, (2,), dtype=torch.int64),
        Bounded(0, 1, (2, 2)),
        Bounded(0, 1, ()),
    ],
)
def test_what_is_no_bounded_vector_has_none(spec):
    assert bounds_of(spec) is None


def test_an_infinite_bound_is_refused():
    spec = Bounded(torch.tensor([-1.0, -math.inf]), torch.tensor([1.0, 1.0]))
    for refuse in (bounds_of, lambda spec: ActorHead.for_spec(8, spec)):
        with pytest.raises(ValueError, match=r"(?s)the action space is unbounded .*needs finite bounds"):
            refuse(spec)


# --- heads ---


def test_a_scale_of_its_own_is_one_parameter_for_all_observations():
    head = ActorHead.for_spec(8, BOX, scale_of_observation=False)
    assert sum(parameter.numel() for parameter in head.module.parameters()) == 8 * 2 + 2 + 2
    loc, scale = head.module(torch.randn(5, 8))
    assert loc.shape == scale.shape == (5, 2)
    assert loc.std(0).min() > 0
    torch.testing.assert_close(scale, torch.ones(5, 2))  # exp(0)


def test_the_head_of_a_categorical_action():
    head = ActorHead.for_spec(8, ACTION)
    assert type(head.module) is Float32Head
    assert (head.module.in_features, head.module.out_features) == (8, 3)
    assert head.parameters == ["logits"]
    assert head.distribution is categorical.Categorical


def test_the_head_of_a_bounded_vector():
    head = ActorHead.for_spec(8, BOX)
    loc, scale = head.module(torch.zeros(5, 8, dtype=torch.bfloat16))
    assert head.parameters == ["loc", "scale"]
    assert (loc.shape, scale.shape, loc.dtype, scale.dtype) == ((5, 2), (5, 2), torch.float32, torch.float32)
    assert not loc.any()  # the bias starts at 0
    assert (scale > 0).all()
    distribution = head.distribution(loc, scale, **head.options)
    assert type(distribution) is TanhNormal
    # The middle of each interval.
    torch.testing.assert_close(distribution.deterministic_sample, torch.tensor([[0.0, 5.0]]).expand(5, 2))


@pytest.mark.parametrize("spec", [OneHot(3), MultiCategorical([2, 3]), Unbounded((2,)), Categorical(3, (2,))])
def test_an_action_without_a_head_is_refused(spec):
    with pytest.raises(
        ValueError, match=r"(?s)unsupported action space .*categorical action .*bounded continuous vector"
    ):
        ActorHead.for_spec(8, spec)


@pytest.mark.parametrize("spec", [ACTION, BOX], ids=["categorical", "continuous"])
def test_the_actor_samples_unless_told_otherwise(spec):
    torch.manual_seed(0)
    head = ActorHead.for_spec(8, spec)
    actor = head.actor(spec, TensorDictModule(head.module, ["features"], head.parameters))
    assert actor.default_interaction_type is InteractionType.RANDOM
    data = TensorDict(features=torch.zeros(200, 8), batch_size=[200])
    output = actor(data.clone())
    assert spec.expand(200, *spec.shape).is_in(output["action"])
    assert output["action_log_prob"].shape == (200,)
    assert len(output["action"].unique(dim=0)) > 1
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert len(actor(data.clone())["action"].unique(dim=0)) == 1
