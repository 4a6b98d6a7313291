"""Which kernels ran, and how they are sorted."""

import pytest
import torch
from kernels import Ran, names, ran, where_the_time_went

from fp8rl_torchrl.precision.linear import Float8Linear


@pytest.mark.parametrize(
    ("op", "kernel", "part"),
    [
        ("aten::mm", "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("aten::addmm", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        (
            "aten::_scaled_mm",
            "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>",
            "products",
        ),
        ("aten::_scaled_grouped_mm", "void prepare_grouped_gemm_data<...>", "products"),
        ("triton_red_fused_abs_amax_0", "triton_red_fused_abs_amax_0", "casts"),
        ("triton_poi_fused__to_copy_clamp_mul_1", "triton_poi_fused__to_copy_clamp_mul_1", "casts"),
        ("aten::clamp", "void at::native::vectorized_elementwise_kernel<4, at::native::(...)>", "casts"),
        ("aten::copy_", "void at::native::elementwise_kernel<128, 4, ...>", "casts"),
        ("aten::sum", "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, ...>", "rest"),
        ("triton_poi_fused_add_2", "triton_poi_fused_add_2", "rest"),
        ("aten::add", "void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add<...>", "rest"),
        ("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", "", "rest"),
    ],
)
def test_parts(op, kernel, part):
    assert Ran(op, kernel, 1, 1.0).part == part


def test_the_table_adds_up():
    rows = [
        Ran("aten::mm", "gemm", 3, 6e-3),
        Ran("aten::clamp", "elementwise", 2, 3e-3),
        Ran("aten::add", "elementwise", 1, 1e-3),
    ]
    first, _, *table = where_the_time_went(rows).splitlines()
    assert first == "10.000 ms: products 6.000 ms (60%), casts 3.000 ms (30%), rest 1.000 ms (10%)"
    assert table[1].split() == ["3.000", "30.0%", "2", "casts", "aten::clamp", "elementwise"]
    assert names(rows) == ["gemm", "elementwise"]


def test_what_ran_is_found():
    layer, x = Float8Linear(32, 48, backend="emulated"), torch.randn(16, 32, requires_grad=True)
    found = ran(lambda: layer(x).sum().backward(), torch.device("cpu"))
    calls = {row.op: row.calls for row in found}
    assert calls["aten::mm"] == 3
    assert calls["aten::clamp"] > 3
    assert [row.seconds for row in found] == sorted((row.seconds for row in found), reverse=True)
    assert "aten::clamp" not in {row.op for row in ran(lambda: x @ x.T, torch.device("cpu"))}
