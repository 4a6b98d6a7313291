"""`Float8Linear` against torchao's: the same bits wherever both make the same product in the same dtype."""

import contextlib
import dataclasses

import pytest
import torch
from float8_layers import bf16, forward_and_backward, make, normal, relative

torchao = pytest.importorskip("torchao.float8", reason="torchao is not installed: nothing to compare with")
float8_linear = pytest.importorskip("torchao.float8.float8_linear")

THEIRS = {"rowwise": "rowwise", "rowwise-gw-hp": "rowwise_with_gw_hp", "tensorwise": "tensorwise"}
SHAPES = [(64, 32, 48), (17, 100, 33), (256, 256, 256)]
power_of_two_recipes = pytest.mark.parametrize("recipe", ["rowwise", "rowwise-gw-hp"])


def twin(layer, recipe):
    """torchao's layer on the same parameters, emulated."""
    config = dataclasses.replace(torchao.Float8LinearConfig.from_recipe_name(THEIRS[recipe]), emulate=True)
    return float8_linear.Float8Linear.from_float(layer.to_linear(), config)


@power_of_two_recipes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3], ids=str)
def test_output_and_gradients_have_the_same_bits(recipe, shape, size):
    m, k, n = shape
    layer, x, g = make(k, n, recipe), normal(m, k) * size, normal(m, n, seed=2) * size
    x[0] *= 50
    ours, theirs = forward_and_backward(layer, x, g), forward_and_backward(twin(layer, recipe), x, g)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    # and would not have those of the other recipe
    (other,) = {"rowwise", "rowwise-gw-hp"} - {recipe}
    assert not torch.equal(ours[2], forward_and_backward(twin(layer, other), x, g)[2])


@power_of_two_recipes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "BF16 input"])
def test_in_bf16_too_but_for_the_gradient_of_the_weight(recipe, shape, autocast):
    m, k, n = shape
    layer, x, g = make(k, n, recipe), normal(m, k), normal(m, n, seed=2)
    # CPU autocast would reach into torchao's emulation and multiply its codes in BF16; given BF16 input it needs none.
    theirs = forward_and_backward(twin(layer, recipe), x.bfloat16(), g.bfloat16())
    with bf16() if autocast else contextlib.nullcontext():
        ours = forward_and_backward(layer, x if autocast else x.bfloat16(), g.bfloat16())
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1].bfloat16(), theirs[1])
    # torchao rounds the gradient of the weight to BF16 on its way to FP32; the rowwise product here writes FP32.
    assert torch.equal(ours[2].bfloat16().float(), theirs[2])
    assert torch.equal(ours[2], theirs[2]) == (recipe == "rowwise-gw-hp")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensorwise_agrees_but_for_the_last_bits_of_its_scales(shape):
    # Its scales are no powers of two, and are divided here in float64 and there in float32.
    m, k, n = shape
    layer, x, g = make(k, n, "tensorwise"), normal(m, k), normal(m, n, seed=2)
    ours, theirs = forward_and_backward(layer, x, g), forward_and_backward(twin(layer, "tensorwise"), x, g)
    assert all(relative(*pair) < 1e-3 for pair in zip(ours, theirs, strict=True))
    far = forward_and_backward(twin(layer, "rowwise"), x, g)
    assert all(relative(*pair) > 1e-2 for pair in zip(ours, far, strict=True))
