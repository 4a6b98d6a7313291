"""The emulated product: the exact one of the same codes, rounded once, eager and compiled."""

import pytest
import torch
from products import CASTS, DEVICES, FORMATS, PAIRS, exact_product, normal, operands, relative_error

from fp8rl_torchrl.precision.matmul import scaled_matmul
from fp8rl_torchrl.precision.quantize import DTYPES, cast_saturating, quantize
from fp8rl_torchrl.precision.recipe import Cast

BOUND = 1e-6

pairs = pytest.mark.parametrize(("left", "right"), PAIRS)
scalings = pytest.mark.parametrize("scaling", ["row", "tensor"])
devices = pytest.mark.parametrize("device", DEVICES)


def fp32_product(*quantized):
    return scaled_matmul(*quantized, out_dtype=torch.float32)


def unit_scale(rows=1):
    return torch.ones(rows, 1)


# --- what the codes stand for ---


@devices
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_all_256_codes_are_read_as_pytorch_reads_them(format, side, device):
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[format])[:, None].to(device)
    one = cast_saturating(torch.ones(1, 1), "e4m3").to(device)
    scales = unit_scale(256).to(device), unit_scale().to(device)
    if side == "left":
        product = fp32_product(codes, scales[0], one, scales[1])
    else:
        product = fp32_product(one, scales[1], codes, scales[0])
    expected = codes.float().flatten()
    torch.testing.assert_close(product.flatten(), expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().sum() == {"e4m3": 2, "e5m2": 6}[format]
    assert expected.isinf().sum() == {"e4m3": 0, "e5m2": 2}[format]


@pytest.mark.parametrize("format", FORMATS)
def test_a_nan_code_reaches_its_row_or_column_and_nothing_else(format):
    left, left_scale, right, right_scale = operands((3, 32), (4, 32), format, format)
    clean = fp32_product(left, left_scale, right, right_scale)
    left.view(torch.uint8)[1, 5] = 0x7F
    right.view(torch.uint8)[2, 7] = 0xFF
    product = fp32_product(left, left_scale, right, right_scale)
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1], expected[:, 2] = True, True
    assert torch.equal(product.isnan(), expected)
    assert torch.equal(product[~expected], clean[~expected])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_was_not_finite_before_quantizing_is_not_finite_after_the_product(bad):
    x = normal(3, 32)
    x[1, 2] = bad
    product = fp32_product(*quantize(x, Cast("e4m3", "row")), *quantize(normal(4, 32), Cast("e4m3", "row")))
    assert product.isnan().all(1).tolist() == [False, True, False]
    assert product[::2].isfinite().all()


def test_a_product_by_hand():
    # [1, -3.5] · 128 and [2, 4] · 64: codes 128, -448 and 128, 256; (16384 - 114688) / 128 / 64 = -12.
    left, right = torch.tensor([[1.0, -3.5]]), torch.tensor([[2.0, 4.0], [0.0, 1.0]])
    cast = Cast("e4m3", "row")
    assert fp32_product(*quantize(left, cast), *quantize(right, cast)).tolist() == [[-12.0, -3.5]]


# --- exact ---


@devices
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 8192])
@scalings
@pairs
def test_as_exact_as_fp32_sums_are(left, right, scaling, size, device):
    found = operands((24, size), (40, size), left, right, scaling, device=device)
    assert relative_error(fp32_product(*found), exact_product(*found)) <= BOUND


@pytest.mark.parametrize("left", ["row", "tensor"])
@pytest.mark.parametrize("right", ["row", "tensor"])
def test_each_operand_has_its_own_kind_of_scale(left, right):
    found = []
    for seed, (scaling, rows) in enumerate(((left, 24), (right, 40))):
        found += quantize(normal(rows, 96, seed=seed) * torch.arange(1, rows + 1)[:, None], Cast("e4m3", scaling))
    assert relative_error(fp32_product(*found), exact_product(*found)) <= BOUND


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_the_output_dtype_is_the_last_rounding_and_the_only_one(dtype, unit):
    found = operands((24, 512), (40, 512))
    product = scaled_matmul(*found, out_dtype=dtype)
    assert product.dtype == dtype
    assert torch.equal(product, fp32_product(*found).to(dtype))
    assert unit / 8 < relative_error(product, exact_product(*found)) < unit


def test_float64_output():
    found = operands((24, 512), (40, 512))
    assert torch.equal(scaled_matmul(*found, out_dtype=torch.float64), fp32_product(*found).double())


def sum_in_bfloat16(left, left_scale, right, right_scale):
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.bfloat16)
    for a, b in zip(left.float().split(32, 1), right.float().split(32, 1), strict=True):
        total = total + (a @ b.T).bfloat16()
    return total.float() / left_scale / right_scale.T


def multiply_into_fp8(left, left_scale, right, right_scale):
    return torch.mm(left, right.t()).float() / left_scale / right_scale.T


def forget_a_scale(left, left_scale, right, right_scale):
    return left.float() @ right.float().T / left_scale


def swap_the_scales(left, left_scale, right, right_scale):
    return left.float() @ right.float().T / left_scale.flip(0) / right_scale.T


def multiply_before_quantizing(*_):
    # The very numbers that `operands` made codes of.
    left, right = (normal(24, 512, seed=s) * 4.0 ** (torch.arange(24) % 3)[:, None] for s in (0, 1))
    return left @ right.T


@pytest.mark.parametrize(
    "wrong", [sum_in_bfloat16, multiply_into_fp8, forget_a_scale, swap_the_scales, multiply_before_quantizing]
)
def test_wrong_products_are_outside_the_bound(wrong):
    found = operands((24, 512), (24, 512))
    if wrong is multiply_into_fp8:  # smaller codes, lest FP8 overflows
        found = [each if each.dtype == torch.float32 else (each.float() / 128).to(each.dtype) for each in found]
    assert relative_error(wrong(*found), exact_product(*found)) > 1e3 * BOUND


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_precision_of_fp32_products_leaves_it_exact(precision):
    # TF32 and BF16 products hold a code exactly, a number divided by its scale not always. So scales come last.
    found = operands((24, 1024), (40, 1024), scaling="tensor")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert relative_error(fp32_product(*found), exact_product(*found)) <= BOUND
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_does_not_reach_in():
    found = operands((24, 64), (40, 64))
    with torch.autocast("cpu", torch.bfloat16):
        product = fp32_product(*found)
    assert torch.equal(product, fp32_product(*found))


# --- shapes ---


@pytest.mark.parametrize("backend", ["emulated", "native"])
@scalings
@pytest.mark.parametrize(
    ("left_shape", "right_shape"),
    [
        ((5, 7), (9, 7)),
        ((3, 5, 7), (9, 7)),
        ((5, 7), (3, 9, 7)),
        ((3, 5, 7), (3, 9, 7)),
        ((2, 3, 5, 7), (3, 9, 7)),
        ((2, 1, 5, 7), (3, 9, 7)),
        ((3, 5, 7), (1, 9, 7)),
        ((2, 3, 1, 7), (9, 7)),
        ((1, 7), (1, 7)),
    ],
)
def test_leading_dimensions_are_broadcast(left_shape, right_shape, scaling, backend):
    found = operands(left_shape, right_shape, scaling=scaling)
    product = scaled_matmul(*found, out_dtype=torch.float32, backend=backend)
    expected = exact_product(*found)
    assert product.shape == expected.shape
    assert relative_error(product, expected) <= BOUND


@pytest.mark.parametrize("backend", ["emulated", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("left_shape", "right_shape", "shape"),
    [
        ((0, 8), (4, 8), (0, 4)),
        ((3, 8), (0, 8), (3, 0)),
        ((3, 0), (4, 0), (3, 4)),
        ((0, 3, 8), (4, 8), (0, 3, 4)),
        ((3, 8), (2, 0, 8), (2, 3, 0)),
    ],
)
def test_empty_operands(left_shape, right_shape, shape, dtype, backend):
    cast = Cast("e4m3", "row")
    found = *quantize(torch.empty(left_shape), cast), *quantize(torch.empty(right_shape), cast)
    product = scaled_matmul(*found, out_dtype=dtype, backend=backend)
    assert product.shape == shape
    assert product.dtype == dtype
    assert not product.any()  # a sum over nothing is 0


@pytest.mark.parametrize("cast", [each for each in CASTS if each.scaling == "tensor"], ids=str)
def test_operands_may_be_views(cast):
    left, left_scale = quantize(normal(48, 24), cast)
    right, right_scale = quantize(normal(48, 40, seed=1), cast)
    turned = left.mT, left_scale.mT, right.mT, right_scale.mT
    assert torch.equal(fp32_product(*turned), fp32_product(*(each.contiguous() for each in turned)))


# --- refusals ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int8])
@pytest.mark.parametrize("side", [0, 2])
def test_only_fp8_codes_are_multiplied(dtype, side):
    found = operands((8, 16), (8, 16))
    found[side] = found[side].float().to(dtype)
    with pytest.raises(TypeError, match=rf"scaled_matmul multiplies FP8 codes, which quantize makes; got {dtype}"):
        fp32_product(*found)


@pytest.mark.parametrize("backend", ["auto", "banana", "Native", None])
def test_an_unknown_backend_is_refused(backend):
    with pytest.raises(ValueError, match=f"backend must be 'native' or 'emulated'; got {backend!r}"):
        scaled_matmul(*operands((8, 16), (8, 16)), out_dtype=torch.float32, backend=backend)


# --- compiled ---


ROWWISE = (Cast("e4m3", "row"),)


def quantize_and_multiply(x, weight, casts=CASTS):
    """For each cast of x: codes, scales, and the product with a weight."""
    quantized = [quantize(x, cast) for cast in casts]
    products = [fp32_product(*each, *quantize(weight, Cast("e4m3", "row"))) for each in quantized]
    return [codes.view(torch.uint8) for codes, _ in quantized], [scale for _, scale in quantized], products


def without_rounding(x, weight):
    """What is left of `quantize_and_multiply` where a compiler reads the numbers before the cast to FP8."""
    codes, scales, products = quantize_and_multiply(x, weight)
    return codes, scales, [x @ weight.T for _ in products]


def same(found, expected):
    """Equal codes and scales, products within the bound, which no product of unrounded numbers is."""
    (codes, scales, products), (expected_codes, expected_scales, expected_products) = found, expected
    return (
        all(map(torch.equal, codes, expected_codes))
        and all(map(torch.equal, scales, expected_scales))
        and all(relative_error(*each) <= BOUND for each in zip(products, expected_products, strict=True))
    )


def inputs(device):
    x = normal(32, 64, seed=4, device=device) * 10.0 ** (torch.arange(32, device=device) % 12 - 6)[:, None]
    x[3] = 0
    return x, normal(48, 64, seed=5, device=device)


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True)


@devices
@pytest.mark.parametrize(
    ("casts", "dtype"),
    [
        pytest.param(ROWWISE, torch.float32, id="rowwise"),
        pytest.param(CASTS, torch.float32, id="every-cast", marks=pytest.mark.slow),
        pytest.param(CASTS, torch.bfloat16, id="every-cast-bf16", marks=pytest.mark.slow),
    ],
)
def test_compiled_code_rounds_as_eager_code_does(casts, dtype, device):
    x, weight = (each.to(dtype) for each in inputs(device))
    assert same(compiled(quantize_and_multiply)(x, weight, casts), quantize_and_multiply(x, weight, casts))


def test_the_comparison_sees_that_rounding_was_deleted():
    x, weight = inputs("cpu")
    expected = quantize_and_multiply(x, weight)
    assert same(quantize_and_multiply(x, weight), expected)
    deleted = without_rounding(x, weight)
    assert same((*deleted[:2], expected[2]), expected)  # codes that are written out look right: the product shows it
    assert not same(deleted, expected)


@pytest.mark.slow
@devices
def test_compiled_code_keeps_what_is_not_finite(device):
    x, weight = inputs(device)
    x[1, 2], x[5, 6] = float("nan"), float("inf")
    codes, scales, products = compiled(quantize_and_multiply)(x, weight)
    expected_codes, expected_scales, expected_products = quantize_and_multiply(x, weight)
    for found, expected, cast in zip(codes, expected_codes, CASTS, strict=True):
        # NaN is NaN, whatever its sign.
        numbers = found.view(DTYPES[cast.format]).float(), expected.view(DTYPES[cast.format]).float()
        torch.testing.assert_close(*numbers, rtol=0, atol=0, equal_nan=True)
    for found, expected in zip(scales, expected_scales, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    for found, expected in zip(products, expected_products, strict=True):
        assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.gpu
def test_captured_code_rounds_as_eager_code_does():
    x, weight = inputs("cuda")
    captured_x, captured_weight = torch.zeros_like(x), torch.zeros_like(weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capturing wants every kernel and workspace to exist
        quantize_and_multiply(captured_x, captured_weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = quantize_and_multiply(captured_x, captured_weight)
    captured_x.copy_(x)
    captured_weight.copy_(weight)
    graph.replay()
    assert same(found, quantize_and_multiply(x, weight))
    on_cpu = quantize_and_multiply(x.cpu(), weight.cpu())
    assert same([[each.cpu() for each in part] for part in found], on_cpu)
