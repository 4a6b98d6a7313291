"""What belongs to the type of an option, and what is said of the rest."""

import numpy as np
import pytest

from fp8rl_torchrl.recipes import RECIPES, DQNConfig, PPOConfig


@pytest.mark.parametrize("recipe", [cls for cls, _ in RECIPES.values()])
def test_every_preset_and_variant_has_values_of_the_right_types(recipe):
    for task in recipe.PRESETS:
        recipe.for_task(task)
    for name in recipe.VARIANTS:
        recipe.variant(name, "CartPole-v1")


@pytest.mark.parametrize(
    "options", [{"lr": 1}, {"lr": np.float32(0.5)}, {"seed": np.int64(3)}, {"hidden": (8,)}, {"target_return": None}]
)
def test_numbers_of_every_kind_are_taken(options):
    assert {name: getattr(PPOConfig(**options), name) for name in options} == options


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        (PPOConfig, {"epochs": "4"}, "epochs takes an integer; got '4'"),
        (PPOConfig, {"num_envs": True}, "num_envs takes an integer; got True"),
        (PPOConfig, {"num_envs": 4.0}, "num_envs takes an integer; got 4.0"),
        (PPOConfig, {"lr": "fast"}, "lr takes a finite number or none; got 'fast'"),
        (PPOConfig, {"max_kl": "small"}, "max_kl takes a finite number or none; got 'small'"),
        (PPOConfig, {"hidden": 64}, "hidden takes widths of layers, such as .64, 64., or 64x64 as text; got 64"),
        (PPOConfig, {"hidden": (64, 32.0)}, "hidden takes widths of layers"),
        (PPOConfig, {"shared": 1}, "shared takes true or false; got 1"),
        (PPOConfig, {"fp8_skip": "encoder"}, "fp8_skip takes a tuple of texts; got 'encoder'"),
        (DQNConfig, {"env": 3}, "env takes text; got 3"),
        (DQNConfig, {"loss": "l3"}, "loss takes one of l2, smooth_l1; got 'l3'"),
    ],
)
def test_values_of_another_type_are_refused_in_words(recipe, options, words):
    with pytest.raises(ValueError, match=words):
        recipe(**options)
    with pytest.raises(ValueError, match=words):
        recipe.from_dict({"env": "CartPole-v1", **options})
