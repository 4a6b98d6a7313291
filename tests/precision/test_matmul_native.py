"""The native product: what the hardware demands, and its numbers, against emulation, within a derived bound."""

import pytest
import torch
from products import (
    DEVICES,
    FORMATS,
    exact_product,
    native_bound,
    need_native,
    normal,
    operands,
    relative_error,
    tensor_core_product,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8rl_torchrl.precision import matmul
from fp8rl_torchrl.precision.capability import float8_capability
from fp8rl_torchrl.precision.matmul import native_kernel, scaled_matmul
from fp8rl_torchrl.precision.quantize import DTYPES, quantize
from fp8rl_torchrl.precision.recipe import RECIPES, Cast

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

out_dtypes = pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
scalings = pytest.mark.parametrize("scaling", ["row", "tensor"])
devices = pytest.mark.parametrize("device", DEVICES)

# The recipes have no others. No NVIDIA GPU multiplies two e5m2 operands, and rowwise kernels want e4m3 on the right.
NATIVE_PAIRS = [("e4m3", "e4m3"), ("e5m2", "e4m3")]


# --- the hardware's rules, which fake CUDA tensors check and CPU kernels do not ---


class Launches(list):
    """The native calls, each with its operands' shapes and strides, its scales' shapes and its dtype."""

    def record(self, name, monkeypatch):
        original = getattr(torch, name)

        def call(left, right, *scales, out_dtype, use_fast_accum):
            self.append((name, tuple(left.shape), left.stride(), tuple(right.shape), right.stride(), out_dtype))
            self.scales = [tuple(scale.shape) for scale in scales]
            self.fast_accum = use_fast_accum
            return original(left, right, *scales, out_dtype=out_dtype, use_fast_accum=use_fast_accum)

        monkeypatch.setattr(torch, name, call)


@pytest.fixture
def launches(monkeypatch):
    found = Launches()
    found.record("_scaled_mm", monkeypatch)
    found.record("_scaled_grouped_mm", monkeypatch)
    return found


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(matmul, "has_grouped_products", lambda device: True)


@pytest.fixture
def ada(monkeypatch):
    monkeypatch.setattr(matmul, "has_grouped_products", lambda device: False)


def on_fake_gpu(
    left_shape, right_shape, scaling="row", out_dtype=torch.bfloat16, turned=False, left="e4m3", fast_accum=True
):
    """The native path on a GPU that need not exist: shapes, strides and checks are real, numbers are not."""
    with FakeTensorMode():
        found = []
        for shape, format in ((left_shape, left), (right_shape, "e4m3")):
            if turned:
                shape = (*shape[:-2], shape[-1], shape[-2])
            codes = torch.empty(shape, device="cuda", dtype=DTYPES[format])
            codes = codes.mT if turned else codes
            rows = codes.shape[-2] if scaling == "row" else 1
            found += [codes, torch.empty(*codes.shape[:-2], rows, 1, device="cuda")]
        product = scaled_matmul(*found, out_dtype=out_dtype, fast_accum=fast_accum, backend="native")
    assert product.dtype == out_dtype
    assert product.device.type == "cuda"
    return tuple(product.shape)


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@scalings
@out_dtypes
@pytest.mark.parametrize(
    ("rows", "columns", "size"),
    [(5, 9, 7), (32, 16, 32), (17, 33, 100), (1, 1, 1), (1, 16, 32), (16, 1, 32), (3, 16, 16)],
)
def test_any_shape_is_padded_to_what_the_hardware_takes(ada, launches, rows, columns, size, out_dtype, scaling, turned):
    assert on_fake_gpu((rows, size), (columns, size), scaling, out_dtype, turned) == (rows, columns)
    ((_, left, left_stride, right, right_stride, _),) = launches
    assert left[0] == rows  # nothing is asked of the rows
    assert left[1] == right[0] == -(-size // 16) * 16
    assert right[1] == -(-columns // 16) * 16
    assert left_stride == (left[1], 1)
    assert right_stride == (1, right[0])


@pytest.mark.parametrize(
    ("scaling", "out_dtype", "kernel", "dtype", "scales"),
    [
        ("row", torch.bfloat16, "rowwise kernel, BF16", torch.bfloat16, [(5, 1), (1, 16)]),
        ("row", torch.float16, "tensorwise kernel, FP32, scales after", torch.float32, [(), ()]),
        ("row", torch.float32, "tensorwise kernel, FP32, scales after", torch.float32, [(), ()]),
        ("tensor", torch.bfloat16, "tensorwise kernel, BF16", torch.bfloat16, [(), ()]),
        ("tensor", torch.float16, "tensorwise kernel, FP16", torch.float16, [(), ()]),
        ("tensor", torch.float32, "tensorwise kernel, FP32", torch.float32, [(), ()]),
        ("tensor", torch.float64, "tensorwise kernel, FP32", torch.float32, [(), ()]),
    ],
)
def test_the_kernel_that_runs_is_the_one_that_is_told(ada, launches, scaling, out_dtype, kernel, dtype, scales):
    on_fake_gpu((5, 32), (9, 32), scaling, out_dtype)
    assert native_kernel(scaling == "row", out_dtype) == kernel
    assert [launch[-1] for launch in launches] == [dtype]
    assert launches.scales == scales


@pytest.mark.parametrize("fast_accum", [True, False])
def test_fast_accumulation_is_passed_on(ada, launches, fast_accum):
    on_fake_gpu((5, 32), (9, 32), fast_accum=fast_accum)
    assert launches.fast_accum is fast_accum


def test_without_padding_the_check_fails(ada, monkeypatch):
    monkeypatch.setattr(matmul, "_pad", lambda codes, dim: codes)
    assert on_fake_gpu((5, 32), (16, 32)) == (5, 16)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        on_fake_gpu((5, 7), (16, 7))
    with pytest.raises(RuntimeError, match="divisible by 16"):
        on_fake_gpu((5, 32), (9, 32))


def test_with_the_second_operand_row_major_the_check_fails(ada, monkeypatch):
    monkeypatch.setattr(matmul, "_row_major", lambda codes: codes)
    assert on_fake_gpu((5, 32), (16, 32)) == (5, 16)
    with pytest.raises(RuntimeError, match="row_major"):
        on_fake_gpu((16, 32), (16, 32), turned=True)
    with pytest.raises(RuntimeError, match="row_major"):
        on_fake_gpu((1, 32), (16, 32), turned=True)


ENSEMBLES = [
    ((3, 5, 7), (3, 9, 7)),
    ((5, 7), (3, 9, 7)),
    ((2, 3, 5, 7), (3, 9, 7)),
    ((3, 1, 32), (3, 32, 32)),
]


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@scalings
@pytest.mark.parametrize(("left_shape", "right_shape"), ENSEMBLES)
def test_an_ensemble_is_one_grouped_product_on_hopper(hopper, launches, left_shape, right_shape, scaling, turned):
    shape = on_fake_gpu(left_shape, right_shape, scaling, turned=turned)
    assert shape == (
        *(left_shape if len(left_shape) > len(right_shape) else right_shape)[:-2],
        left_shape[-2],
        right_shape[-2],
    )
    assert [launch[0] for launch in launches] == ["_scaled_grouped_mm"]
    _, left, left_stride, right, right_stride, _ = launches[0]
    assert launches.scales == [left[:2], (right[0], right[2])]  # one a row, also where there is one a tensor
    assert left_stride[-2:] == (left[2], 1)
    assert right_stride[-2:] == (1, right[1])


@scalings
@pytest.mark.parametrize(
    ("left", "out_dtype"), [("e4m3", torch.float32), ("e4m3", torch.float16), ("e5m2", torch.bfloat16)]
)
def test_what_no_grouped_product_takes_is_a_launch_a_member_on_hopper_too(hopper, launches, left, out_dtype, scaling):
    assert on_fake_gpu((3, 5, 7), (3, 9, 7), scaling, out_dtype, left=left) == (3, 5, 9)
    assert [launch[0] for launch in launches] == ["_scaled_mm"] * 3


@scalings
@out_dtypes
@pytest.mark.parametrize(("left_shape", "right_shape"), ENSEMBLES)
def test_an_ensemble_is_a_launch_a_member_elsewhere(ada, launches, left_shape, right_shape, scaling, out_dtype):
    on_fake_gpu(left_shape, right_shape, scaling, out_dtype)
    members = 6 if len(left_shape) == 4 else 3
    assert [launch[0] for launch in launches] == ["_scaled_mm"] * members


@scalings
def test_one_weight_for_a_whole_ensemble_is_one_launch(ada, launches, scaling):
    assert on_fake_gpu((2, 3, 5, 7), (9, 7), scaling) == (2, 3, 5, 9)
    ((_, left, *_),) = launches
    assert left == (30, 16)


def test_an_unpadded_ensemble_fails_the_check(hopper, monkeypatch):
    monkeypatch.setattr(matmul, "_pad", lambda codes, dim: codes)
    with pytest.raises(RuntimeError, match="16 bytes"):
        on_fake_gpu((3, 5, 7), (3, 9, 7))


# --- numbers ---


def multiply(found, out_dtype, fast_accum=False, backend="native"):
    return scaled_matmul(*found, out_dtype=out_dtype, fast_accum=fast_accum, backend=backend)


def bound(size, out_dtype, fast_accum, device):
    """The CPU's reference kernels sum in FP32: only the rounding of the result is left."""
    return native_bound(size if device == "cuda" else 0, out_dtype, fast_accum)


@devices
@pytest.mark.parametrize("fast_accum", [True, False], ids=["fast", "promoted"])
@out_dtypes
@scalings
@pytest.mark.parametrize(("left", "right"), NATIVE_PAIRS)
@pytest.mark.parametrize(("rows", "columns", "size"), [(64, 48, 128), (33, 50, 100), (1, 16, 4096)])
def test_native_is_emulated_within_the_bound(left, right, scaling, out_dtype, fast_accum, rows, columns, size, device):
    need_native(device, rowwise_bf16=scaling == "row" and out_dtype == torch.bfloat16)
    found = operands((rows, size), (columns, size), left, right, scaling, device=device)
    product = multiply(found, out_dtype, fast_accum)
    assert product.dtype == out_dtype
    expected = multiply(found, torch.float32, backend="emulated")
    assert relative_error(product, expected) <= bound(size, out_dtype, fast_accum, device)


@pytest.mark.parametrize("wrong", ["scales swapped", "an operand forgotten", "FP8 output"])
@pytest.mark.parametrize("size", [128, 4096])
def test_wrong_products_are_outside_every_bound(wrong, size):
    found = operands((48, size), (48, size))
    expected = exact_product(*found)
    left, left_scale, right, right_scale = found
    product = {
        "scales swapped": lambda: exact_product(left, left_scale.flip(0), right, right_scale),
        "an operand forgotten": lambda: exact_product(left, left_scale, right, torch.ones_like(right_scale)),
        "FP8 output": lambda: (
            (expected / expected.abs().max() * 448).to(DTYPES["e4m3"]).double() * expected.abs().max() / 448
        ),
    }[wrong]()
    assert relative_error(product, expected) > native_bound(size, torch.bfloat16, fast_accum=True)


@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("size", [32, 128, 1024, 4096])
def test_the_bound_holds_for_an_accumulator_of_14_bits(size, fast_accum):
    left, _, right, _ = operands((16, size), (16, size))
    left, right = left.double(), right.double()
    error = relative_error(tensor_core_product(left, right, fast_accum), left @ right.T)
    accumulation = native_bound(size, torch.float32, fast_accum)
    assert accumulation / 50 < error < accumulation / 4


def test_the_accumulator_by_hand():
    # Beside 2^14 the 13 bits end at 2: 3 becomes 2, and 1 is lost.
    left, right = torch.zeros(2, 32, dtype=torch.float64)
    left[:3], right[:3] = torch.tensor([2.0**14, 3.0, 1.0]), 1.0
    assert tensor_core_product(left[None], right[None], fast_accum=True).item() == 2**14 + 2


@devices
@pytest.mark.parametrize("name", RECIPES)
def test_every_product_of_every_recipe(name, device):
    """Forward and backward of a linear layer as the recipes say: e5m2 gradients too."""
    need_native(device, rowwise_bf16="rowwise" in name)
    recipe = RECIPES[name]
    x, weight, grad = (
        normal(*shape, seed=seed, device=device) for seed, shape in enumerate([(40, 64), (72, 64), (40, 72)])
    )
    products = [(recipe.output, x, weight), (recipe.grad_input, grad, weight.mT), (recipe.grad_weight, grad.mT, x.mT)]
    for gemm, left, right in products:
        if gemm is None:
            continue
        found = *quantize(left, gemm.left), *quantize(right, gemm.right)
        product = multiply(found, torch.bfloat16, gemm.fast_accum)
        expected = multiply(found, torch.float32, backend="emulated")
        assert relative_error(product, expected) <= bound(left.shape[-1], torch.bfloat16, gemm.fast_accum, device)


@devices
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@scalings
@pytest.mark.parametrize("left", FORMATS)
@pytest.mark.parametrize(("left_shape", "right_shape"), [*ENSEMBLES, ((3, 5, 7), (9, 7))])
def test_native_ensembles(left_shape, right_shape, left, scaling, out_dtype, device):
    need_native(device, rowwise_bf16=out_dtype == torch.bfloat16)
    found = operands(left_shape, right_shape, left, scaling=scaling, device=device)
    product = multiply(found, out_dtype)
    expected = multiply(found, torch.float32, backend="emulated")
    assert product.shape == expected.shape
    assert relative_error(product, expected) <= bound(left_shape[-1], out_dtype, False, device)


@pytest.mark.gpu
def test_a_grouped_product_on_hopper(launches):
    need_native("cuda")
    if "grouped" not in float8_capability("cuda").ensembles:
        pytest.skip(f"no grouped products: {float8_capability('cuda').ensembles}")
    found = operands((4, 33, 100), (4, 50, 100), device="cuda")
    product = multiply(found, torch.bfloat16)
    assert [launch[0] for launch in launches] == ["_scaled_grouped_mm"]
    expected = multiply(found, torch.float32, backend="emulated")
    assert relative_error(product, expected) <= native_bound(100, torch.bfloat16, fast_accum=False)


@devices
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(out_dtype, bad, device):
    need_native(device, rowwise_bf16=out_dtype == torch.bfloat16)
    x = normal(5, 32, device=device)
    x[1, 2] = bad
    found = *quantize(x, Cast("e4m3", "row")), *quantize(normal(9, 32, seed=1, device=device), Cast("e4m3", "row"))
    product = multiply(found, out_dtype)
    assert product.isnan().all(1).tolist() == [False, True, False, False, False]
    assert product[[0, 2, 3, 4]].isfinite().all()
