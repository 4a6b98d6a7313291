"""The recipes: what each product multiplies, and that nothing senseless is accepted."""

import dataclasses
import pickle

import pytest

from fp8rl_torchrl.precision.recipe import RECIPES, Cast, Float8Recipe, Gemm


def test_rowwise_scales_each_row_of_every_product():
    recipe = RECIPES["rowwise"]
    for gemm in (recipe.output, recipe.grad_input, recipe.grad_weight):
        assert gemm.left == gemm.right == Cast("e4m3", "row", power_of_two=True)


def test_tensorwise_has_e5m2_gradients_on_the_left():
    recipe = RECIPES["tensorwise"]
    e4m3, e5m2 = Cast("e4m3", "tensor", power_of_two=False), Cast("e5m2", "tensor", power_of_two=False)
    assert (recipe.output.left, recipe.output.right) == (e4m3, e4m3)
    assert (recipe.grad_input.left, recipe.grad_input.right) == (e5m2, e4m3)
    assert (recipe.grad_weight.left, recipe.grad_weight.right) == (e5m2, e4m3)


def test_gw_hp_leaves_the_weight_gradient_in_high_precision():
    recipe = RECIPES["rowwise-gw-hp"]
    assert recipe.grad_weight is None
    assert recipe.output == RECIPES["rowwise"].output
    assert (recipe.grad_input.left, recipe.grad_input.right) == (Cast("e4m3", "row"), Cast("e4m3", "tensor"))


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_forward_product_may_sum_fast(name):
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.output.fast_accum
    assert not any(gemm.fast_accum for gemm in (recipe.grad_input, recipe.grad_weight) if gemm)


def test_hardware_multiplies_no_two_e5m2_operands():
    for recipe in RECIPES.values():
        for gemm in (recipe.output, recipe.grad_input, recipe.grad_weight):
            assert gemm is None or "e4m3" in (gemm.left.format, gemm.right.format)


def test_they_read_well():
    assert str(Cast("e4m3", "row")) == "e4m3/row"
    assert str(RECIPES["tensorwise"].grad_input) == "e5m2/tensor × e4m3/tensor"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("banana", "row"), "unknown FP8 format 'banana'; use one of e4m3, e5m2"),
        (("fp8", "row"), "unknown FP8 format 'fp8'"),
        (("e4m3", "banana"), "unknown FP8 scaling 'banana'; use one of row, tensor"),
        (("e4m3", "rowwise"), "unknown FP8 scaling 'rowwise'"),
        (("e4m3", None), "unknown FP8 scaling None"),
    ],
)
def test_an_unknown_name_is_refused_with_the_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        Cast(*arguments)


def test_immutable_values():
    recipe = RECIPES["rowwise"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.output.left.format = "e5m2"
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    row = Cast("e4m3", "row")
    assert hash(Float8Recipe("mine", Gemm(row, row), Gemm(row, row), None))
    assert Gemm(row, row) != Gemm(row, row, fast_accum=True)
