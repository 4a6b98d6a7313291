"""`Float8Linear`: what it computes, how far that is from high precision, and what it takes and refuses."""

import pytest
import torch
from float8_layers import (
    RECIPES,
    base,
    bf16,
    by_the_textbook,
    every_recipe,
    forward_and_backward,
    in_high_precision,
    make,
    normal,
    relative,
)
from torch import nn

from fp8rl_torchrl.precision.linear import Float8Linear

# The relative error of one layer on normal numbers: output, gradient of the input, gradient of the weight.
ERRORS = {
    "rowwise": (0.037, 0.037, 0.037),
    "tensorwise": (0.037, 0.059, 0.059),
    "rowwise-gw-hp": (0.037, 0.037, 0.0),
}
NAN, INF = float("nan"), float("inf")


# --- the numbers ---


@every_recipe
@pytest.mark.parametrize("shape", [(64, 32, 48), (7, 5, 3), (1, 16, 16), (33, 100, 17)], ids=str)
def test_it_computes_what_the_textbook_says(recipe, shape):
    m, k, n = shape
    layer, x, g = make(k, n, recipe, bias=False), normal(m, k) * 3, normal(m, n, seed=2) * 1e-3
    x[0] *= 100
    found = forward_and_backward(layer, x, g)
    for value, expected in zip(found, by_the_textbook(recipe, x, layer.weight.detach(), g), strict=True):
        assert value.shape == expected.shape
        assert relative(value, expected) < 1e-6


@every_recipe
def test_a_recipe_is_not_another(recipe):
    layer, x, g = make(recipe=recipe, bias=False), normal(32, 64), normal(32, 48, seed=2)
    found = forward_and_backward(layer, x, g)
    for other in set(RECIPES) - {recipe}:
        expected = by_the_textbook(other, x, layer.weight.detach(), g)
        assert max(relative(*pair) for pair in zip(found, expected, strict=True)) > 0.01


@every_recipe
@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4], ids=str)
def test_the_error_is_that_of_fp8_at_every_magnitude(recipe, name, size):
    layer, x, g = make(256, 256, recipe, bias=False), normal(256, 256) * size, normal(256, 256, seed=2) * size
    with base(name):
        found = forward_and_backward(layer, x, g)
    for value, reference, error in zip(found, in_high_precision(layer, x, g), ERRORS[recipe], strict=True):
        high = 0.004 if name == "bf16" else 1e-6  # what is not FP8 is the base format
        assert 0.9 * error <= relative(value, reference) <= 1.1 * error + high


def test_a_cast_without_scales_is_far_from_that():
    # Gradients of 1e-4 are below the smallest number of e4m3, 2^-9, and inputs of 1e4 above the largest.
    x, w, g = normal(64, 64), normal(64, 64, seed=2), normal(64, 64, seed=3)
    for size, worst in ((1.0, 0.05), (1e-4, 1.0), (1e4, 0.9)):
        unscaled = [(each * size).clamp(-448, 448).to(torch.float8_e4m3fn).double() for each in (x, g)]
        assert relative(unscaled[0] @ w.double().mT, (x * size) @ w.mT) > (0 if size == 1 else worst * 0.9)
        assert relative(unscaled[1] @ w.double(), (g * size) @ w) > (0 if size == 1 else worst * 0.9)


@every_recipe
def test_by_hand(recipe):
    layer = Float8Linear(2, 1, recipe=recipe)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(0.5)
    # All codes are exact: 1 and 2 become 224 and 448 where the scale is 224, and 128 and 256 where it is 128.
    x = torch.tensor([[2.0, 4.0]], requires_grad=True)
    y = layer(x)
    assert y.item() == pytest.approx(2 - 8 + 0.5)
    y.backward(torch.tensor([[2.0]]))
    assert x.grad[0].tolist() == pytest.approx([2.0, -4.0])
    assert layer.weight.grad[0].tolist() == pytest.approx([4.0, 8.0])
    assert layer.bias.grad.tolist() == [2.0]


def test_rounding_by_hand():
    # 448/1.7 rounded down to a power of two is 256; 1.1 * 256 = 281.6 lies between the codes 256 and 288.
    layer = Float8Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0]]))
    assert layer(torch.tensor([[1.1, 1.7]])).item() == 288 / 256
    assert layer(torch.tensor([[1.1, 1.7e3]])).item() == 1.125  # now the scale is 2^-2, and 0.275 lies near 0.28125


# --- rows ---


@every_recipe
def test_rows_of_a_batch_are_independent_unless_one_scale_serves_all(recipe):
    layer, x, g = make(recipe=recipe), normal(8, 64), normal(8, 48, seed=2)
    y, grad_input, _ = forward_and_backward(layer, x, g)
    x[1:] *= 1000
    g[1:] *= 1000
    other_y, other_grad_input, _ = forward_and_backward(layer, x, g)
    independent = recipe != "tensorwise"
    assert torch.equal(y[0], other_y[0]) == independent
    assert torch.equal(grad_input[0], other_grad_input[0]) == independent
    if not independent:  # the small row is lost beside the large ones
        assert relative(other_grad_input[0], grad_input[0]) > 0.05


def test_a_row_alone_is_the_row_in_its_batch():
    layer, x = make(), normal(300, 64)
    with torch.no_grad():
        batch = layer(x)
        for row in (0, 17, 299):
            assert relative(layer(x[row]), batch[row]) < 1e-6  # the order of an FP32 sum may differ


# --- what is not finite ---


@every_recipe
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_a_bad_input_row_spoils_its_output_row_and_its_column_of_the_weights_gradient(recipe, bad):
    layer, x, g = make(recipe=recipe), normal(8, 64), normal(8, 48, seed=2)
    clean = forward_and_backward(layer, x, g)
    x[3, 5] = bad
    y, grad_input, grad_weight = forward_and_backward(layer, x, g)
    others = torch.arange(8) != 3
    assert torch.equal(grad_input, clean[1]), "which the input takes no part in"
    if recipe == "tensorwise":
        assert y.isnan().all()
        assert grad_weight.isnan().all()
        return
    assert y[3].isnan().all()
    assert torch.equal(y[others], clean[0][others])
    columns = torch.arange(64) != 5
    assert not grad_weight[:, 5].isfinite().any()
    assert torch.equal(grad_weight[:, columns], clean[2][:, columns])


@every_recipe
@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
def test_a_bad_weight_spoils_its_output_column(recipe, bad):
    layer, x, g = make(recipe=recipe), normal(8, 64), normal(8, 48, seed=2)
    clean = forward_and_backward(layer, x, g)
    with torch.no_grad():
        layer.weight[7, 5] = bad
    y, grad_input, grad_weight = forward_and_backward(layer, x, g)
    assert torch.equal(grad_weight, clean[2])
    if recipe == "tensorwise":
        assert y.isnan().all()
        assert grad_input.isnan().all()
        return
    columns = torch.arange(48) != 7
    assert y[:, 7].isnan().all()
    assert torch.equal(y[:, columns], clean[0][:, columns])
    # the weight's column 5 sums into column 5 of the input's gradient; with one scale for the weight, into all
    columns = torch.arange(64) != 5
    assert grad_input[:, 5].isnan().all()
    assert torch.equal(grad_input[:, columns], clean[1][:, columns]) == (recipe == "rowwise")


@every_recipe
@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
def test_a_bad_gradient_spoils_its_row_of_either_gradient(recipe, bad):
    layer, x, g = make(recipe=recipe), normal(8, 64), normal(8, 48, seed=2)
    _, clean_input, clean_weight = forward_and_backward(layer, x, g)
    g[3, 7] = bad
    _, grad_input, grad_weight = forward_and_backward(layer, x, g)
    if recipe == "tensorwise":
        assert grad_input.isnan().all()
        assert grad_weight.isnan().all()
        return
    rows = torch.arange(8) != 3
    assert grad_input[3].isnan().all()
    assert torch.equal(grad_input[rows], clean_input[rows])
    rows = torch.arange(48) != 7
    assert not grad_weight[7].isfinite().any()
    assert torch.equal(grad_weight[rows], clean_weight[rows])


def test_what_is_finite_but_enormous_stays_finite():
    layer = make()
    y, grad_input, grad_weight = forward_and_backward(layer, normal(8, 64) * 1e30, normal(8, 48) * 1e-10)
    assert all(each.isfinite().all() and each.any() for each in (y, grad_input, grad_weight))


def test_an_output_that_fp16_cannot_hold_is_infinite():
    layer = make(bias=False)
    with torch.no_grad():
        layer.weight.fill_(96)
    assert layer(torch.full((1, 64), 12.0, dtype=torch.float16)).isinf().all()  # 64 * 96 * 12 = 73,728 > 65,504
    assert layer(torch.full((1, 64), 10.0, dtype=torch.float16)).unique().item() == 64 * 96 * 10


# --- dtypes and shapes ---


@every_recipe
@pytest.mark.parametrize(
    ("dtype", "name", "expected"),
    [
        (torch.float32, "fp32", torch.float32),
        (torch.float64, "fp32", torch.float64),
        (torch.float16, "fp32", torch.float16),
        (torch.bfloat16, "fp32", torch.bfloat16),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.float64, "bf16", torch.bfloat16),
        (torch.float16, "bf16", torch.bfloat16),
        (torch.bfloat16, "bf16", torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes(recipe, dtype, name, expected):
    layer, x = make(recipe=recipe), normal(16, 64).to(dtype).requires_grad_()
    with base(name):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == expected
    assert x.grad.dtype == dtype
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    assert relative(y, in_high_precision(layer, x.detach(), y.detach())[0]) < 0.05


def test_the_gradient_of_the_weight_is_not_rounded_to_bf16():
    layer, x, g = make(), normal(64, 64), normal(64, 48, seed=2)
    with bf16():
        _, _, grad_weight = forward_and_backward(layer, x, g)
    assert not torch.equal(grad_weight, grad_weight.bfloat16().float())
    expected = by_the_textbook("rowwise", x.bfloat16(), layer.weight.detach(), g.bfloat16())[2]
    assert relative(grad_weight, expected) < 1e-6


@every_recipe
def test_the_bias_is_added_in_the_outputs_dtype(recipe):
    layer = make(recipe=recipe)
    x = normal(8, 64)
    with torch.no_grad():
        with_bias = layer(x)
        with bf16():
            low_with_bias = layer(x)
    bias, layer.bias = layer.bias.detach(), None
    with torch.no_grad():
        assert torch.equal(with_bias, layer(x) + bias)
        with bf16():
            assert torch.equal(low_with_bias, layer(x) + bias.bfloat16())


@every_recipe
@pytest.mark.parametrize("backend", ["emulated", "native"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (1, 2, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(recipe, backend, leading):
    layer = make(20, 12, recipe, backend=backend)  # padded to 32 and 16 by the native product
    x, g = normal(*leading, 20), normal(*leading, 12, seed=2)
    y, grad_input, grad_weight = forward_and_backward(layer, x, g)
    assert y.shape == (*leading, 12)
    assert grad_input.shape == x.shape
    if 0 in leading:
        assert not grad_weight.any()
        return
    flat = forward_and_backward(layer, x.reshape(-1, 20), g.reshape(-1, 12))
    for value, reference in zip((y, grad_input, grad_weight), flat, strict=True):
        assert torch.equal(value.reshape(reference.shape), reference)


def test_any_strides_will_do():
    layer, x, g = make(), normal(64, 16).t(), normal(48, 16).t()
    found = forward_and_backward(layer, x, g)
    for value, reference in zip(found, forward_and_backward(layer, x.contiguous(), g.contiguous()), strict=True):
        assert torch.equal(value, reference)
    y = layer(x)
    y.sum().backward()  # an expanded gradient
    assert torch.equal(layer.bias.grad, torch.full((48,), 16.0))


@every_recipe
@pytest.mark.parametrize(("name", "bound"), [("fp32", 1e-6), ("bf16", 2**-8)])
def test_native_products_on_a_cpu_agree_with_emulated_ones(recipe, name, bound):
    if name == "bf16" and recipe != "tensorwise" and torch.__version__ < "2.13":
        pytest.skip("PyTorch has a rowwise kernel for CPUs from 2.13")
    emulated, native = make(recipe=recipe, backend="emulated"), make(recipe=recipe, backend="native")
    x, g = normal(32, 64), normal(32, 48, seed=2)
    with base(name):
        pairs = zip(forward_and_backward(native, x, g), forward_and_backward(emulated, x, g), strict=True)
    assert max(relative(*pair) for pair in pairs) <= bound


# --- refusals ---


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(4, 63), ValueError, r"expects input \[\.\.\., 64\]; got \[4, 63\]"),
        (torch.ones(64, 4), ValueError, r"got \[64, 4\]"),
        (torch.tensor(1.0), ValueError, r"got \[\]"),
        (torch.ones(4, 64, dtype=torch.int64), TypeError, "takes floating-point input; got torch.int64"),
        (torch.ones(4, 64, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.ones(4, 64, dtype=torch.complex64), TypeError, "got torch.complex64"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(x, error, message):
    with pytest.raises(error, match=message):
        make()(x)


def test_unknown_recipes_and_backends_are_refused_with_the_names():
    with pytest.raises(ValueError, match="unknown FP8 recipe 'banana'; use one of rowwise, tensorwise, rowwise-gw-hp"):
        Float8Linear(16, 16, recipe="banana")
    with pytest.raises(ValueError, match="backend must be 'auto', 'native' or 'emulated'; got 'fast'"):
        Float8Linear(16, 16, backend="fast")
    with pytest.raises(ValueError, match="unknown FP8 recipe"):
        Float8Linear.from_linear(nn.Linear(16, 16), "fp8")


# --- what it says of itself ---


@pytest.mark.parametrize(
    ("recipe", "products"),
    [
        (
            "rowwise",
            "output: e4m3/row × e4m3/row, grad_input: e4m3/row × e4m3/row, grad_weight: e4m3/row × e4m3/row",
        ),
        (
            "tensorwise",
            "output: e4m3/tensor × e4m3/tensor, grad_input: e5m2/tensor × e4m3/tensor, "
            "grad_weight: e5m2/tensor × e4m3/tensor",
        ),
        (
            "rowwise-gw-hp",
            "output: e4m3/row × e4m3/row, grad_input: e4m3/row × e4m3/tensor, grad_weight: high precision",
        ),
    ],
)
def test_its_repr_says_what_runs(recipe, products):
    layer = Float8Linear(32, 48, recipe=recipe)
    expected = f"in_features=32, out_features=48, bias=True, recipe={recipe}, emulated, {products}"
    assert repr(layer) == f"Float8Linear({expected})"


def test_its_repr_names_native_kernels():
    said = repr(Float8Linear(32, 48, recipe="tensorwise", backend="native"))
    assert "tensorwise, native, output: e4m3/tensor × e4m3/tensor [tensorwise kernel, BF16, fast sum]" in said
    assert "grad_weight: e5m2/tensor × e4m3/tensor [tensorwise kernel, FP32]" in said
